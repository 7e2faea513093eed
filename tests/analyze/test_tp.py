"""analyze/tp.py on models whose cost and memory are known, under a clock that only they move."""

import csv

import pytest
import torch
from PIL import Image
from torch import nn

from analyze import throughput
from analyze.impl import tp
from analyze.throughput import MODES, Result, Variant, measure
from analyze.tp import main

CPU = torch.device("cpu")
MIB = 2**20


class Clock:
    """Seconds that pass only while a `Costly` model works."""

    def __init__(self):
        self.now, self.log = 100.0, []

    def __call__(self):
        return self.now


class Costly(nn.Module):
    """Costs `seconds` per pixel of an image's side, and more in training mode; writes down when it was called."""

    def __init__(self, name, clock, seconds, fails=lambda calls, size: None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.name, self.clock, self.seconds, self.fails, self.calls = name, clock, seconds, fails, 0

    def forward(self, images):
        size = images.shape[-1]
        self.calls += 1
        self.fails(self.calls, size)
        self.clock.now += self.seconds * size * (3 if self.training else 1)
        self.clock.log.append((self.name, size, self.training))
        return self.weight.expand(len(images), 2) * 1.0


def run(models, variants, clock, **options):
    given = {"rounds": 3, "seconds": 0.0} | options
    return measure(variants, lambda variant: models[variant.model], CPU, clock=clock, **given)


def rows_of(results, device):
    return [dict(zip(tp.COLUMNS, row, strict=True)) for row in tp.table(results, device)]


def test_images_per_second_are_exact():
    clock = Clock()
    models = {"a": Costly("a", clock, 0.25), "b": Costly("b", clock, 0.5)}
    variants = [Variant(name, size, 6, mode) for mode in MODES for name in models for size in (2, 8)]
    results = run(models, variants, clock)
    seconds = {"a": 0.25, "b": 0.5}
    for result, variant in zip(results, variants, strict=True):
        cost = seconds[variant.model] * variant.size * (3 if variant.mode == "training" else 1)
        assert result.variant == variant and result.status == "ok"
        assert result.samples == [6 / cost] * 3 and result.images_per_second == 6 / cost


def test_median_and_spread():
    clock = Clock()
    model = Costly("a", clock, 1.0)
    # calls 1 to 3 are preparation; the rounds then take 2, 8 and 4 seconds
    slow = {4: 0.0, 5: 6.0, 6: 2.0}
    model.fails = lambda calls, size: setattr(clock, "now", clock.now + slow.get(calls, 0.0))
    [result] = run({"a": model}, [Variant("a", 2, 8)], clock)
    assert result.samples == [4.0, 1.0, 2.0] and result.images_per_second == 2.0
    [row] = rows_of([result], "somewhere")
    assert (row["slowest"], row["fastest"], row["rounds"], row["device"]) == (1.0, 4.0, 3, "somewhere")


def test_variants_take_turns():
    clock = Clock()
    models = {name: Costly(name, clock, 1.0) for name in "ab"}
    variants = [Variant("a", 4, 1), Variant("b", 4, 1), Variant("a", 4, 1, "training")]
    run(models, variants, clock, rounds=2)
    turn = [("a", 4, False), ("b", 4, False), ("a", 4, True)]
    prepared = [call for call in turn for _ in range(3)]  # warm-up, memory, length of a turn
    assert clock.log == prepared + turn + turn


def test_a_turn_is_as_long_as_asked():
    clock = Clock()
    models = {"a": Costly("a", clock, 1.0), "b": Costly("b", clock, 16.0)}
    results = run(models, [Variant("a", 2, 8), Variant("b", 2, 8)], clock, rounds=1, seconds=10.0)
    assert [call[0] for call in clock.log] == ["a"] * 3 + ["b"] * 3 + ["a"] * 5 + ["b"]
    assert [result.images_per_second for result in results] == [8 / 2, 8 / 32]


def test_a_gpu_is_timed_by_triton(monkeypatch):
    """Seconds of a step, from milliseconds."""
    testing = pytest.importorskip("triton.testing")
    asked = []
    monkeypatch.setattr(testing, "do_bench", lambda step, **options: asked.append(options) or step())
    assert throughput.bench(lambda: 4.0, 0.25) == 0.004
    assert asked == [{"warmup": 0, "rep": 250.0, "return_mode": "mean"}]


# ---- memory ----------------------------------------------------------------------------------------------------------


class Hungry(nn.Module):
    """12 MiB at once at most: 4 and 8 together, then 2."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("table", torch.zeros(MIB // 4))

    def forward(self, images):
        one = torch.empty(MIB, device=images.device)
        two = torch.empty(2 * MIB, device=images.device)
        del one, two
        three = torch.empty(MIB // 2, device=images.device)
        return self.weight.expand(len(images), 2) + three[:2]


def test_peak_memory_is_the_largest_sum_at_once():
    [result] = measure([Variant("a", 16, 4)], lambda variant: Hungry(), CPU, rounds=1, seconds=0.0)
    own = 4 * (2 + MIB // 4 + 4 * 3 * 16 * 16)  # weight, buffer, images
    assert result.peak_mib == (own + 12 * MIB) / MIB


@pytest.mark.gpu
def test_peak_memory_and_speed_on_cuda():
    device = torch.device("cuda")
    variants = [Variant("a", 16, 4), Variant("a", 16, 4, "training")]
    model, other = Hungry().to(device), torch.empty(64 * MIB, device=device)
    results = measure(variants, lambda variant: model, device, rounds=2, seconds=0.0)
    for result in results:
        assert result.peak_mib == pytest.approx(13, abs=0.1) and result.images_per_second > 0
    assert other.is_cuda


class Saves(nn.Module):
    """Keeps 4 MiB for its backward pass."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(MIB))

    def forward(self, images):
        kept = torch.exp(self.weight)  # exp saves its result
        return kept[:2].expand(len(images), 2)


def test_training_counts_what_is_kept_and_the_gradients():
    variants = [Variant("a", 1, 2), Variant("a", 1, 2, "training")]
    forward, both = measure(variants, lambda variant: Saves(), CPU, rounds=1, seconds=0.0)
    assert forward.peak_mib == pytest.approx(4 + 4, abs=0.01)
    # the gradients of kept[:2] and of exp, or of exp and the weight, lie beside what was kept
    assert both.peak_mib == pytest.approx(4 + 4 + 2 * 4, abs=0.01)


# ---- failures --------------------------------------------------------------------------------------------------------


def full(calls, size):
    """Ask PyTorch for more than there is."""
    if size == 8:
        torch.empty(2**58)


def broken(calls, size):
    if calls == 5:
        raise RuntimeError("shapes\ncannot be")


def test_failures_are_recorded_and_the_others_go_on():
    clock = Clock()
    models = {"a": Costly("a", clock, 1.0, full), "b": Costly("b", clock, 1.0, broken), "c": Costly("c", clock, 1.0)}
    variants = [Variant(name, size, 4) for name, size in (("a", 2), ("a", 8), ("b", 2), ("c", 8))]
    results = run(models, variants, clock)
    assert [result.status for result in results] == ["ok", "out of memory", "failed: shapes cannot be", "ok"]
    assert [result.images_per_second for result in results] == [2.0, None, None, 0.5]
    rows = rows_of(results, "cpu")
    assert [(row["slowest"], row["rounds"]) for row in rows] == [(2.0, 3), (None, 0), (None, 1), (0.5, 3)]
    crosses = [line for line in tp.draw(results, "cpu").axes[0].lines if line.get_marker() == "x"]
    assert sorted(x for line in crosses for x in line.get_xdata()) == [2, 8]


def test_a_failure_leaves_no_gradients():
    clock = Clock()
    model = Costly("a", clock, 1.0, broken)
    model.weight.grad = torch.ones(2)
    [result] = run({"a": model}, [Variant("a", 2, 4, "training")], clock)
    assert result.status == "failed: shapes cannot be" and model.weight.grad is None


def test_what_runs_is_on_record_before_it_can_fail():
    """A process that the system kills leaves the name of the variant that was at fault."""
    clock, seen = Clock(), []
    models = {"a": Costly("a", clock, 1.0), "b": Costly("b", clock, 1.0)}

    def changed(results):
        seen.append(([result.status for result in results], len(clock.log)))

    run(models, [Variant("a", 2, 1), Variant("b", 2, 1)], clock, rounds=1, changed=changed)
    assert seen[0] == (["running", "waiting"], 0) and (["running", "running"], 3) in seen
    assert seen[-1] == (["ok", "ok"], 8)


def test_compiled_models_are_specialised_and_called(monkeypatch):
    clock, asked = Clock(), []
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: asked.append(dynamic) or model)
    run({"a": Costly("a", clock, 1.0)}, [Variant("a", 2, 1), Variant("a", 2, 1, compiled=True)], clock)
    assert asked == [False]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_csv_and_picture(tmp_path, capsys, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tp, "builder", lambda device: lambda variant: Costly(variant.model, clock, 1.0))
    monkeypatch.setattr(tp.measure, "__kwdefaults__", tp.measure.__kwdefaults__ | {"clock": clock})
    out = tmp_path / "deep" / "tp.png"
    sizes = ["--sizes", "2", "4", "--batch", "8", "--rounds", "2", "--seconds", "0"]
    assert main(["--precisions", "fp32", "bf16", *sizes, "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == [str(out), str(out.with_suffix(".csv"))] and Image.open(out).size[0] > 1000
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert len(rows) == len(printed) - 2 == 2 * 2 * 2 * 3
    for row in rows:
        cost = int(row["size"]) * (3 if row["mode"] == "training" else 1)
        assert float(row["images_per_second"]) == float(row["slowest"]) == float(row["fastest"]) == 8 / cost
        assert (row["status"], row["batch"], row["rounds"], row["compiled"]) == ("ok", "8", "2", "False")
    described = {(row["model"], row["mode"], row["size"], row["precision"]) for row in rows}
    assert len(described) == 24 and {model for model, *_ in described} == set(tp.SETS["nano"].split())


@pytest.mark.filterwarnings("error:constrained_layout")
def test_a_real_model(tmp_path):
    out = tmp_path / "tp.png"
    command = ["--models", "vmamba_nano", "--sizes", "32", "--batch", "2", "--rounds", "1", "--seconds", "0"]
    assert main([*command, "--precisions", "bf16", "--device", "cpu", "--out", str(out)]) == 0
    inference, training = csv.DictReader(out.with_suffix(".csv").open())
    assert inference["status"] == training["status"] == "ok" and float(inference["images_per_second"]) > 0
    weights = 4 * 379_786 / MIB
    # training holds gradients of all weights beside them, before it forgets them
    assert weights < float(inference["peak_mib"]) < float(training["peak_mib"])
    assert 2 * weights < float(training["peak_mib"])


def test_models_for_one_size_are_built_for_every_size():
    build = tp.builder(CPU)
    assert build(Variant("vmamba_nano", 32, 1)) is build(Variant("vmamba_nano", 48, 1))
    deit = build(Variant("deit_tiny_patch16_224", 48, 1))
    assert deit.patch_embed.img_size == (48, 48) and deit(torch.zeros(1, 3, 48, 48)).shape == (1, 1000)
    assert deit is build(Variant("deit_tiny_patch16_224", 48, 2))


def test_sets_hold_registered_models():
    names = tp.named_models(["nano", "tiny", "small", "base", "vmamba_nano"])
    assert len(names) == len(set(names)) == 3 + 3 * 6
    for family in ("vmamba", "vim", "vssd", "swin", "convnext", "deit"):
        assert sum(name.startswith(family) for name in names) >= 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--models", "nano", "vmamba_nan"], "error: --model 'vmamba_nan' is not a registered model; did you mean"),
        (["--sizes", "32", "0"], "error: --size 0 must be at least 1"),
        (["--batch", "0"], "error: --batch 0 must be at least 1"),
        (["--rounds", "0"], "error: --rounds 0 must be at least 1"),
        (["--seconds", "-1"], "error: --seconds -1.0 must be at least 0"),
        (["--out", "tp.csv"], "error: --out tp.csv does not end in .png"),
    ],
)
def test_errors_name_the_value(arguments, message, capsys, tmp_path):
    assert main(["--device", "cpu", "--out", str(tmp_path / "tp.png"), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message) and len(captured.err.splitlines()) == 1 and captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_results_wait_until_measured():
    assert Result(Variant("a", 1, 1)).images_per_second is None
    assert Result(Variant("a", 1, 1), "failed: x", [1.0]).images_per_second is None
