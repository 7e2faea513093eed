"""Learning rates, weight decay, updates, accumulation, EMA, validation: values, not just that it runs."""

import json
import math

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssm_train import trainer
from ssm_train.common.distributed import World
from ssm_train.common.errors import UserError
from ssm_train.common.preemption import StopRequest
from ssm_train.config.load import load_config
from ssm_train.data.dataset import BadImages, Batch
from ssm_train.data.samplers import Key
from ssm_train.data.transforms import build_mixup
from ssm_train.record.results import Results, better_weights, training_metrics
from ssm_train.start import prepare
from ssm_train.step.engine import take_update, training_loss
from ssm_train.step.evaluate import Accuracy, Interrupted, validate
from ssm_train.step.optimizer import build_optimizer, decay_counts
from ssm_train.step.schedule import Rates, build_schedule, resolve_rates
from ssm_train.step.state import load_optimizer_state, optimizer_state

CPU = World(0, 1, torch.device("cpu"))


def update(run):
    return take_update(run, CPU, losses=[torch.zeros(())], stop=False)


@pytest.fixture
def make(tiny_cfg):
    """make(opts) -> config and a fresh Training with 5 updates per epoch."""

    def build(opts: str = ""):
        cfg = load_config(str(tiny_cfg), opts.split())
        return cfg, prepare(cfg, CPU, 5)

    return build


def test_learning_rate_curve(tiny_cfg):
    cfg = load_config(str(tiny_cfg), ["TRAIN.EPOCHS", "6", "TRAIN.WARMUP_EPOCHS", "2"])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    rates = Rates(base=1e-3, warmup=1e-6, minimum=1e-5)
    per_epoch = 7
    schedule = build_schedule(optimizer, cfg.TRAIN, rates, per_epoch)
    warmup, rest = 2 * per_epoch, 4 * per_epoch
    for t in range(warmup + rest + 3):
        if t < warmup:
            expected = 1e-6 + t * (1e-3 - 1e-6) / warmup
        elif t < warmup + rest:
            expected = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * (t - warmup) / rest))
        else:
            expected = 1e-5
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12), t
        schedule.set(t + 1)


def test_published_linear_scaling(tiny_cfg):
    train = load_config(str(tiny_cfg), ["TRAIN.BASE_LR", "5e-4"]).TRAIN
    assert resolve_rates(train, 128 * 8) == Rates(pytest.approx(1e-3), pytest.approx(1e-6), pytest.approx(1e-5))
    assert resolve_rates(train, 128 * 4 * 2) == resolve_rates(train, 128 * 8)


def test_decay_groups_by_name(tiny_cfg):
    train = load_config(str(tiny_cfg)).TRAIN
    model = timm.create_model("vmamba_nano", num_classes=10)
    listed = {"A_logs", "Ds", "dt_projs_bias"}
    expected = {
        name
        for name, p in model.named_parameters()
        if p.ndim <= 1 or name.endswith(".bias") or name.split(".")[-1] in listed
    }
    assert {"layers.0.blocks.0.op.A_logs", "layers.0.blocks.0.op.dt_projs_bias", "layers.0.blocks.0.op.Ds"} <= expected
    assert "layers.0.blocks.0.op.x_proj_weight" not in expected and "classifier.head.weight" not in expected

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    for wrapped in (model, Wrapper(model), torch.compile(model), Wrapper(torch.compile(model))):
        optimizer = build_optimizer(wrapped, train, 1e-3)
        names = {parameter: name for name, parameter in model.named_parameters()}
        undecayed = {
            names[p] for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]
        }
        decayed = {
            names[p] for group in optimizer.param_groups if group["weight_decay"] == 0.05 for p in group["params"]
        }
        assert undecayed == expected
        assert decayed == set(names.values()) - expected
        assert decay_counts(optimizer) == (len(decayed), len(undecayed))


def test_optimizer_state_travels_by_name(make):
    _, first = make()
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    for _ in range(2):
        training_loss(first, images, targets).backward()
        update(first)
    saved = optimizer_state(first.network, first.optimizer)
    assert set(saved) == {name for name, _ in first.network.named_parameters()}
    _, second = make()
    # other groups, other order
    optimizer = torch.optim.AdamW(list(second.network.parameters())[::-1], lr=0.5, weight_decay=0.25, fused=True)
    load_optimizer_state(second.network, optimizer, saved)
    restored = optimizer_state(second.network, optimizer)
    for name, state in saved.items():
        for key, value in state.items():
            assert torch.equal(value, restored[name][key]), (name, key)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.5, 0.25)


def test_ema_and_clipping(make):
    cfg, run = make("TRAIN.EMA_DECAY 0.75 TRAIN.CLIP_GRAD 1e-4")
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    images, targets = torch.randn(4, 3, 32, 32) * 50, torch.tensor([0, 1, 2, 0])
    training_loss(run, images, targets).backward()
    assert update(run).norm > 1e-4
    after = run.network.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name, value in run.ema.module.state_dict().items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * after[name])
    assert run.updates == 1
    # the gradient that AdamW saw was scaled down to the limit: exp_avg = (1 - beta1) * gradient
    seen = math.sqrt(sum(s["exp_avg"].square().sum().item() for s in run.optimizer.state.values())) / 0.1
    assert seen == pytest.approx(1e-4, rel=1e-3)


def test_skipped_fp16_step_moves_nothing(make):
    cfg, run = make("AMP fp16")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    rate = run.optimizer.param_groups[0]["lr"]
    before = [p.clone() for p in run.network.parameters()]
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    run.scaler.scale(training_loss(run, images, targets) * 1e30).backward()
    outcome = update(run)
    assert (outcome.made, outcome.overflow) == (False, True)
    assert run.scaler.get_scale() < 2.0**40
    assert run.updates == 0 and run.optimizer.param_groups[0]["lr"] == rate
    for now, old, averaged in zip(run.network.parameters(), before, run.ema.module.parameters(), strict=True):
        assert torch.equal(now, old) and torch.equal(averaged, old)
    # the next one, without overflow, counts
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    run.scaler.scale(training_loss(run, images, targets)).backward()
    assert update(run).made
    assert run.updates == 1 and run.optimizer.param_groups[0]["lr"] > rate


class Questions(TorchDispatchMode):
    """Counts the numbers that the host asks tensors for, one by one: on a GPU it waits for each."""

    asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.asked += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def test_an_update_reads_the_device_once(make, monkeypatch):
    """With everything that an update can have; the host does not wait for the step itself."""
    _, run = make("AMP fp16 TRAIN.CLIP_GRAD 1.0 TRAIN.EMA_DECAY 0.9")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    reads, read = [], World.read_with_sums
    monkeypatch.setattr(World, "read_with_sums", lambda *args: reads.append(args) or read(*args))
    for _ in range(2):  # the first one makes the optimizer's state
        run.scaler.scale(training_loss(run, images, targets)).backward()
        with Questions() as questions:
            assert update(run).made
    assert len(reads) == 2 and questions.asked == 0


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_loss_is_fp32(make, amp):
    _, run = make(f"AMP {amp}")
    assert training_loss(run, torch.randn(2, 3, 32, 32), torch.tensor([0, 1])).dtype == torch.float32


def test_label_smoothing_and_mixing_agree_with_their_definitions(make):
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    _, run = make("MODEL.LABEL_SMOOTHING 0.1")
    run.network.eval()
    log_p = run.network(images).log_softmax(-1)
    smooth = torch.full((4, 3), 0.1 / 3).scatter_(1, targets[:, None], 0.9 + 0.1 / 3)
    torch.testing.assert_close(training_loss(run, images, targets), -(smooth * log_p).sum(-1).mean())
    # cutmix alone mixes the targets as well: the loss follows the target, whatever made it
    cfg, run = make("MODEL.LABEL_SMOOTHING 0.1 AUG.MIXUP 0 AUG.CUTMIX 1.0")
    run.network.eval()
    seen = {}
    mix = run.mixup
    assert mix is not None and mix.cutmix_alpha == 1.0 and mix.mixup_alpha == 0.0

    def spy(images, targets):
        seen["x"], seen["y"] = mix(images, targets)
        return seen["x"], seen["y"]

    run.mixup = spy
    loss = training_loss(run, images.clone(), targets)
    assert seen["y"].shape == (4, 3)
    torch.testing.assert_close(loss, -(seen["y"] * run.network(seen["x"]).log_softmax(-1)).sum(-1).mean())


def test_mixup_needs_an_even_batch(tiny_cfg):
    cfg = load_config(str(tiny_cfg), ["AUG.MIXUP", "0.8", "DATA.BATCH_SIZE", "5"])
    with pytest.raises(UserError, match="BATCH_SIZE is 5"):
        build_mixup(cfg)
    assert build_mixup(load_config(str(tiny_cfg))) is None


def test_accumulation_equals_the_big_batch(cli, read_log, tmp_path):
    """Same images per update, in one micro-step or in four: same losses, same weights."""
    big, parts = tmp_path / "big", tmp_path / "parts"
    assert cli("--output", big, "--batch-size", 8).status == 0
    assert cli("--output", parts, "--batch-size", 2, "--accumulation-steps", 4, "--opts", "PRINT_FREQ", 4).status == 0
    entries = read_log(big, "train"), read_log(parts, "train")
    assert len(entries[0]) == 2 * 2
    for one, other in zip(*entries, strict=True):
        assert (one["update"], one["lr"]) == (other["update"], other["lr"])
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    weights = [load_file(run / "checkpoints/last/model.safetensors") for run in (big, parts)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_validation_counts_every_image_once():
    class Fixed(nn.Module):
        """Logits that are the image's first seven pixels."""

        def forward(self, x):
            return x[:, 0, 0, :7]

    torch.manual_seed(0)
    images, targets = torch.randn(11, 1, 1, 8), torch.randint(0, 7, (11,))
    batches = [Batch(images[i : i + 4], targets[i : i + 4], [], [Key(0, i)]) for i in range(0, 11, 4)]
    batches.insert(1, Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), [], []))
    stop = StopRequest()
    result = validate({"model": Fixed()}, batches, "off", CPU, BadImages(CPU, 11, None), stop)["model"]
    logits = images[:, 0, 0, :7]
    order = logits.argsort(1, descending=True)
    assert result.images == 11
    assert result.top1 == pytest.approx(100 * (order[:, 0] == targets).double().mean().item())
    assert result.top5 == pytest.approx(100 * (order[:, :5] == targets[:, None]).any(1).double().mean().item())
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)
    stop.signal = "SIGTERM"
    with pytest.raises(Interrupted):
        validate({"model": Fixed()}, batches, "off", CPU, BadImages(CPU, 11, None), stop)


def test_best_results():
    """Higher top-1, then lower loss; plain and averaged weights apart; links follow."""
    results = Results()
    for epoch, (top1, loss) in enumerate([(50, 1.0), (70, 0.9), (70, 0.8), (60, 0.1)], start=1):
        results.add(epoch, {"model": Accuracy(top1, 100, loss, 10), "model_ema": Accuracy(100 - top1, 100, loss, 10)})
    assert {name: (r["epoch"], r["top1"], r["loss"]) for name, r in results.records.items()} == {
        "best": (3, 70, 0.8),
        "best_ema": (1, 50, 1.0),
        "last": (4, 60, 0.1),
        "last_ema": (4, 40, 0.1),
    }
    assert results.best_epochs() == {"best": 3, "best_ema": 1}
    metrics = training_metrics(results, {})
    assert (metrics["top1"], metrics["weights"], metrics["epoch"]) == (70, "model", 3)
    assert metrics["checkpoint"] == "checkpoints/best/model.safetensors"
    assert better_weights(results.latest()) == "model"
    results.forget_missing({1, 4})
    assert results.best_epochs() == {"best": 4, "best_ema": 1}


def test_spoiled_weights_are_not_saved(fails, tmp_path, monkeypatch):
    """A last update that spoils the weights is noticed before they are saved."""
    original = trainer.take_update

    def spoil(run, *args, **kwargs):
        outcome = original(run, *args, **kwargs)
        if run.updates == 5:
            run.network.classifier.head.bias.data.fill_(math.inf)
        return outcome

    monkeypatch.setattr(trainer, "take_update", spoil)
    parts = ("error: weights (classifier.head.bias) became infinite or nan before epoch 1", "--resume auto")
    fails("--output", tmp_path, parts=parts)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"epoch_0000", "last"}


def test_speeds_print_one_line(cli):
    outcome = cli("--throughput", "--batch-size", 2, "--amp", "bf16", "--channels-last")
    assert outcome.status == 0
    assert "images/s (median of 5; batch 2, 32x32, amp bf16, cpu, channels last)" in outcome.out
    outcome = cli("--traincost", "--batch-size", 2)
    assert outcome.status == 0 and outcome.out.count("\n") == 3
    assert (
        "training of vmamba_nano: " in outcome.out and "MB (median of 5; batch 2, 32x32, amp off, cpu)" in outcome.out
    )


def test_run_leaves_its_records(cli, read_log, tmp_path):
    """One run with everything switched on: what is written, and that the numbers agree with each other."""
    options = "AUG.MIXUP 0.8 AUG.CUTMIX 1.0 AUG.REPROB 0.5 AUG.AUTO_AUGMENT rand-m5-inc1 MODEL.DROP_PATH_RATE 0.2"
    outcome = cli("--output", tmp_path, "--tag", "t", "--amp", "bf16", "--use-checkpoint", "--opts", *options.split())
    assert outcome.status == 0, outcome
    run = tmp_path / "t"
    cfg = load_config(str(run / "config.yaml"))
    assert (cfg.AMP, cfg.TRAIN.USE_CHECKPOINT, cfg.AUG.MIXUP) == ("bf16", True, 0.8)
    metrics = json.loads((run / "metrics.json").read_text())
    best = max((metrics["results"][name] for name in ("best", "best_ema")), key=lambda r: (r["top1"], -r["loss"]))
    assert {key: metrics[key] for key in best} == best
    assert (run / metrics["checkpoint"]).is_file()
    assert metrics["results"]["last"]["epoch"] == metrics["epochs"] == 2
    assert metrics["images_per_second"] > 0 and metrics["seconds"] > 0 and metrics["parameters"] == 6067
    assert {"python", "torch", "timm"} <= set(metrics["versions"])
    assert metrics["images"] == 15 and metrics["device"] == "cpu"
    validation = read_log(run, "val")
    assert [entry["epoch"] for entry in validation] == [1, 2]
    assert validation[-1]["top1"] == metrics["results"]["last"]["top1"]
    assert validation[-1]["ema_loss"] == metrics["results"]["last_ema"]["loss"]
    training = read_log(run, "train")
    assert [(entry["epoch"], entry["iteration"]) for entry in training] == [(e, i) for e in (1, 2) for i in range(1, 6)]
    # 4 images per update: rates are the configured ones x 4 / 512
    assert training[0]["lr"] == pytest.approx(5e-7 * 4 / 512) and training[5]["lr"] == pytest.approx(0.1 * 4 / 512)
    log = (run / "log.txt").read_text()
    assert "learning rate 0.0007813" in log and "4 images per update, 5 updates per epoch" in log
    assert all(word in outcome.out for word in ("epoch 2/2 [5/5] loss", "img/s", "eta", "MB", "grad"))
    assert list(run.glob("events.out.tfevents.*"))
    assert not list(run.rglob(".tmp-*"))


def test_ema_can_be_off(cli, tmp_path):
    assert cli("--output", tmp_path, "--opts", "TRAIN.EMA_DECAY", 0).status == 0
    assert not (tmp_path / "checkpoints/last/model_ema.safetensors").exists()
    assert set(json.loads((tmp_path / "metrics.json").read_text())["results"]) == {"best", "last"}


def test_any_registry_model_trains(cli, tiny_cfg, tmp_path):
    """One with batch norm: its running statistics are saved, averaged and continued like the weights."""
    config = yaml.safe_load(tiny_cfg.read_text())
    config["MODEL"] = {"NAME": "test_resnet", "NUM_CLASSES": 3}
    config["TRAIN"]["KEEP_CHECKPOINTS"] = 2
    other = tmp_path / "resnet.yaml"
    other.write_text(yaml.safe_dump(config))
    assert cli("--output", tmp_path / "a", cfg=other).status == 0
    weights = load_file(tmp_path / "a/checkpoints/last/model.safetensors")
    averaged = load_file(tmp_path / "a/checkpoints/last/model_ema.safetensors")
    assert weights["bn1.num_batches_tracked"] == averaged["bn1.num_batches_tracked"] == 10
    assert not torch.equal(weights["bn1.running_mean"], averaged["bn1.running_mean"])
    first = tmp_path / "a/checkpoints/epoch_0001"
    assert cli("--output", tmp_path / "b", "--resume", first, cfg=other).status == 0
    for name, value in load_file(tmp_path / "b/checkpoints/last/model_ema.safetensors").items():
        assert torch.equal(value, averaged[name]), name


def test_compiled_and_channels_last(cli, read_log, tmp_path, monkeypatch):
    """The same losses, and checkpoints without a trace of the wrappers. Graphs are captured but not lowered: compiling
    them takes half a minute and is timed elsewhere."""
    captured = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: captured(network, backend="aot_eager"))
    options = {"plain": [], "compiled": ["--compile"], "channels_last": ["--channels-last"]}
    for name, flags in options.items():
        assert cli("--output", tmp_path / name, *flags).status == 0
    losses = {name: [entry["loss"] for entry in read_log(tmp_path / name, "train")] for name in options}
    states = {name: load_file(tmp_path / name / "checkpoints/last/model.safetensors") for name in options}
    for name in ("compiled", "channels_last"):
        assert losses[name] == pytest.approx(losses["plain"], rel=1e-5)
        assert states[name].keys() == states["plain"].keys()


def test_an_update_is_read_from_the_device_once(make, monkeypatch):
    """Whether it may be taken, its norm, and who was asked to stop: every reading lets a GPU run out of work."""
    _, run = make("TRAIN.EMA_DECAY 0.75 TRAIN.CLIP_GRAD 1e-4")
    training_loss(run, torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])).backward()
    read = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, name=name, original=original: read.append(name) or original(self)
        )
    assert update(run).made
    assert read == ["tolist"]
