"""The benchmarks at tiny sizes: the numbers in their tables, and how the GPU suite fails."""

import csv
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssm_ops._library import OPERATORS, available

FOLDER = Path(__file__).parents[2] / "kernels" / "benchmarks"
PNG = b"\x89PNG"


def start(command, **env) -> subprocess.CompletedProcess:
    command = [str(part) for part in command]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


@pytest.fixture(scope="module")
def scripts():
    """The modules of the benchmarks by their names, as one of them finds the others that lie beside it."""
    names = ("run", "models", "timing", "verdict")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        for name in (*names, "cases", "output"):
            patch.delitem(sys.modules, name, raising=False)
        yield {name: importlib.import_module(name) for name in names}
        for name in (*names, "cases", "output"):
            sys.modules.pop(name, None)


def table(script, out: Path, *options) -> list[dict[str, str]]:
    script.main([*map(str, ("--repeats", 2, "--out", out, *options))])
    assert out.with_suffix(".png").read_bytes().startswith(PNG)
    with open(out, newline="") as file:
        return list(csv.DictReader(file))


# ---- operators ------------------------------------------------------------------------------------------------------

# float32 numbers that the forward and the backward must move at size 4 and batch 2, counted by hand
L = 49
NUMBERS = {
    "selective_scan": {
        "B2 D6144 L49 N1": (2 * L * (3 * 6144 + 2 * 4), 2 * L * (5 * 6144 + 4 * 4)),
        "B2 D3072 L49 N1": (2 * L * (3 * 3072 + 2 * 4), 2 * L * (5 * 3072 + 4 * 4)),
    },
    "ss2d_scan": {
        "B2 D1536 7x7 N1 R48": (2 * L * (2 * 1536 + 4 * 50), 2 * L * (3 * 1536 + 8 * 50)),
        "B2 D768 7x7 N1 R48": (2 * L * (2 * 768 + 4 * 50), 2 * L * (3 * 768 + 8 * 50)),
    },
    "bidirectional_scan": {"B2 L785 D384 N1 R12": (2 * 785 * (3 * 384 + 2 * 14), 2 * 785 * (5 * 384 + 4 * 14))},
    "cross_scan": {"B2 C1536 7x7": (2 * L * 5 * 1536, 2 * L * 5 * 1536)},
    "cross_merge": {"B2 C1536 7x7": (2 * L * 5 * 1536, 2 * L * 5 * 1536)},
    "ssd_chunk_scan": {"B2 L49 H16 P64 N64": (2 * L * (2 * 1024 + 16 + 128), 2 * L * (3 * 1024 + 32 + 256))},
    "nc_ssd": {"B2 L49 H16 P64 N64": (2 * L * (2 * 1024 + 16 + 128), 2 * L * (3 * 1024 + 32 + 256))},
    "causal_conv1d": {"B2 D384 L785 K4": (2 * 785 * 384 * 2, 2 * 785 * 384 * 3)},
}


@pytest.fixture(scope="module")
def operators(scripts, tmp_path_factory):
    """`main` ends with an exit status if an implementation is wrong."""
    out = tmp_path_factory.mktemp("operators") / "new" / "operators.csv"
    return table(scripts["run"], out, "--sizes", 4, "--batch", 2, "--state", 1)


def test_wrong_numbers_are_not_timed(scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys.modules["cases"], "padded_conv1d", lambda x, weight, bias: x + 0 * (weight.sum() + bias.sum())
    )
    options = ("--ops", "causal_conv1d", "--sizes", 1, "--batch", 1)
    with pytest.raises(SystemExit, match="1 results were wrong, see WRONG above"):
        table(scripts["run"], tmp_path / "wrong.csv", *options)
    assert "WRONG causal_conv1d B1 D384 L197 K4 conv1d: relative difference" in capsys.readouterr().out
    with open(tmp_path / "wrong.csv", newline="") as file:
        timed = {row["impl"] for row in csv.DictReader(file)}
    assert timed == set(available(OPERATORS["causal_conv1d"], "cpu", torch.float32))


def test_gpus_are_timed_by_triton(scripts, monkeypatch):
    """Milliseconds of its median and extremes, in seconds."""
    testing = pytest.importorskip("triton.testing")
    asked = []

    def do_bench(run, quantiles):
        asked.append(quantiles)
        return [run() * q + 4.0 for q in quantiles]

    monkeypatch.setattr(testing, "do_bench", do_bench)
    times = scripts["timing"].measure({"a": lambda: 2.0, "b": lambda: 8.0}, 7, torch.device("cuda"))
    assert asked == [[0.5, 0.0, 1.0]] * 2
    assert times["a"] == pytest.approx((0.005, 0.004, 0.006)) and times["b"] == pytest.approx((0.008, 0.004, 0.012))


def test_the_host_is_timed_apart(scripts, monkeypatch):
    """Calls that return at once, from an empty queue; what the GPU still has to do is waited for outside the time."""
    timing, now, said = scripts["timing"], [0.0], []

    def run():
        now[0] += 0.25
        said.append("call")

    def synchronize(device):
        now[0] += 100.0
        said.append("wait")

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert timing.host_seconds(run, torch.device("cuda")) == 0.25
    assert said == ["call", "wait"] + ["call"] * timing.CALLS + ["wait"]
    assert timing.host_seconds(run, torch.device("cpu")) is None


def test_a_share_above_one_has_a_note(scripts, tmp_path, monkeypatch):
    for bandwidth, note in ((1.0, scripts["run"].IN_CACHE), (1e30, "")):
        monkeypatch.setattr(scripts["run"], "copy_bandwidth", lambda device, bandwidth=bandwidth: bandwidth)
        rows = table(scripts["run"], tmp_path / "run.csv", "--ops", "cross_scan", "--sizes", 4, "--batch", 1)
        assert {row["note"] for row in rows} == {note} and {row["host_ms"] for row in rows} == {""}
        assert all((float(row["copy_share"]) > 1) == bool(note) for row in rows)


def test_verdict(scripts, tmp_path):
    """From tables of known numbers; what is missing is named."""
    run, models = scripts["run"], scripts["models"]
    (tmp_path / "parts.csv").write_text("part,result,seconds,limit\nbuild,passed,61,90\ntests,status 1,80,105\n")
    (tmp_path / "environment.txt").write_text("gpu: NVIDIA H100\n")
    (tmp_path / "check.txt").write_text("cuda:0 a cuda right\ncuda:0 a triton it hangs\n1 of 2 are wrong: b\n")
    values = {"operator": "a", "dtype": "bfloat16", "pass": "forward", "impl": "cuda", "note": ""}
    rows = [
        values | {"size": "s", "speedup": 2.04, "copy_share": 0.5, "host_ms": 0.2, "median_ms": 0.1},
        values | {"size": "t", "speedup": 7.5, "copy_share": 1.2, "host_ms": 0.2, "median_ms": 0.3, "note": "cache"},
    ]
    scripts["run"].write_csv(rows, run.COLUMNS, tmp_path / "operators.csv")
    common = {"pass": "inference", "layout": "nchw", "batch": 64, "dtype": "bfloat16"}
    speeds = [common | {"model": m, "images_per_second": s} for m, s in (("ours", 150.0), ("swin", 100.0))]
    run.write_csv(speeds, models.COLUMNS, tmp_path / "models-eager.csv")
    scripts["verdict"].main([str(tmp_path)])
    page = (tmp_path / "verdict.md").read_text().splitlines()
    for line in (
        "* gpu: NVIDIA H100",
        "| tests | status 1 | 80 | 105 |",
        "Self-check: 1 of 2 are wrong: b",
        "* cuda:0 a triton it hangs",
        "Operators, bfloat16: ranges over 2 sizes",
        "| a | forward | cuda | 2.0..7.5 | 50%..120%* | 1 of 2 |",
        "Models, eager, batch 64, bfloat16: images/s as a ratio to swin",
        "* ours, inference, nchw: 1.50",
        "Models, compiled: not timed",
    ):
        assert page.count(line) == 1, line


@pytest.mark.parametrize("operator", NUMBERS)
def test_operator_table(operators, operator):
    rows = [row for row in operators if row["operator"] == operator]
    assert {row["size"] for row in rows} == set(NUMBERS[operator])
    expected = set(available(OPERATORS[operator], "cpu", torch.float32))
    if operator in ("ss2d_scan", "bidirectional_scan"):
        expected = expected - {"reference"} | {"composition"}
    if operator == "causal_conv1d":
        expected |= {"conv1d"}
    for size, (forward, backward) in NUMBERS[operator].items():
        for label, numbers in (("forward", forward), ("forward+backward", forward + backward)):
            mine = [row for row in rows if (row["size"], row["pass"]) == (size, label)]
            assert {row["impl"] for row in mine} == expected and len(mine) == len(expected)
            assert {row["bytes"] for row in mine} == {str(4 * numbers)}
            slowest = max(float(row["median_ms"]) for row in mine)
            rates = set()
            for row in mine:
                median = float(row["median_ms"])
                assert 0 < float(row["min_ms"]) <= median <= float(row["max_ms"])
                assert float(row["speedup"]) == pytest.approx(slowest / median)
                rates.add(float(row["copy_share"]) * median / int(row["bytes"]))
            assert max(rates) == pytest.approx(min(rates)) and min(rates) > 0  # one bandwidth for all


# ---- models ---------------------------------------------------------------------------------------------------------


def check_speeds(row: dict[str, str]) -> None:
    assert 0 < float(row["slowest"]) <= float(row["images_per_second"]) <= float(row["fastest"])
    assert float(row["images_per_second"]) == pytest.approx(1e3 * int(row["batch"]) / float(row["median_ms"]))
    assert row["peak_mb"] == ""  # nobody counts on the CPU


def test_model_table(scripts, tmp_path):
    names = ("vmamba_nano", "swin_s3_tiny_224")
    options = ("--models", *names, "--size", 32, "--batch", 3, "--dtype", "bfloat16", "--channels-last")
    rows = table(scripts["models"], tmp_path / "models.csv", *options)
    made = [(row["pass"], row["model"], row["layout"]) for row in rows]
    layouts = ("nchw", "channels_last")
    assert made == [(p, m, l) for p in ("inference", "training") for m in names for l in layouts]
    for row in rows:
        assert (row["size"], row["batch"], row["dtype"], row["compiled"]) == ("32", "3", "bfloat16", "False")
        check_speeds(row)


def test_cost_of_larger_images(scripts, tmp_path):
    out = tmp_path / "linear.csv"
    rows = table(scripts["models"], out, "--models", "vmamba_nano", "--size", 32, "--linear")
    assert [(row["pass"], row["size"], row["batch"]) for row in rows] == [
        ("inference", "32", "1"),
        ("inference", "128", "1"),
    ]
    for row in rows:
        check_speeds(row)


def test_unknown_model_is_named(tmp_path):
    """As a user starts it."""
    done = start([sys.executable, FOLDER / "models.py", "--models", "vmamba_nan", "--out", tmp_path / "models.csv"])
    assert done.returncode == 1 and "--models vmamba_nan is not in timm's registry" in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- the suite for a GPU machine ------------------------------------------------------------------------------------

BASH = shutil.which("bash")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_suite_stops_at_once_without_a_gpu(tmp_path):
    done = start([BASH, FOLDER / "gpu_suite.sh", tmp_path / "out"], PYTHON=sys.executable)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: torch {torch.__version__} finds no GPU here; nothing was built or measured\n"
    assert not (tmp_path / "out").exists()


# Stands in for an interpreter on a machine with a GPU: answers what the suite asks, writes down how it is called.
ACTOR = """#!/usr/bin/env bash
echo "$TORCH_CUDA_ARCH_LIST|${SSM_OPS_BUILD:-}|$*" >>"$CALLS"
case "$*" in
*is_available*) echo 9.0 ;;
*"-m pytest"*) echo "2 failed"; exit 1 ;;
*models.py*--compile*) exit 124 ;;
*verdict.py*) echo "# Verdict" | tee "${@: -1}/verdict.md" ;;
*--check*) echo "all 7 are right" ;;
*.csv*) echo new >"${@: -1}" ;;
esac
"""


PARTS = ("build", "check", "tests", "smoke", "operators", "models-eager", "models-compiled")


def test_suite_goes_on_after_a_failure_and_names_it(tmp_path):
    python, out, calls = tmp_path / "python", tmp_path / "out", tmp_path / "calls"
    python.write_text(ACTOR)
    python.chmod(0o755)
    out.mkdir()
    for name in ("operators.csv", "models-compiled.csv", "mine.txt"):
        (out / name).write_text("old")
    done = start([BASH, FOLDER / "gpu_suite.sh", out], PYTHON=str(python), CALLS=str(calls), TORCH_CUDA_ARCH_LIST="")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "FAILED: tests (status 1), smoke (status 1), models-compiled (out of time)"
    assert (out / "log.txt").read_text() == done.stdout
    files = {path.name: path.read_text() for path in out.iterdir()}
    assert files["operators.csv"] == files["models-eager.csv"] == "new\n" and files["mine.txt"] == "old"
    assert "models-compiled.csv" not in files and {"environment.txt", "log.txt"} <= set(files)
    assert files["check.txt"] == "all 7 are right\n" and files["verdict.md"] == "# Verdict\n"
    rows = [line.split(",") for line in files["parts.csv"].splitlines()]
    assert rows[0] == ["part", "result", "seconds", "limit"]
    results = ["passed", "passed", "status 1", "status 1", "passed", "passed", "out of time"]
    assert [row[1] for row in rows[1:]] == results and [row[0] for row in rows[1:]] == list(PARTS)
    assert "commit: " in files["environment.txt"] and "nvcc: " in files["environment.txt"]
    installs = [line for line in calls.read_text().splitlines() if "pip install" in line]
    assert installs == [f"9.0|{kind}|-m pip install -e . --no-build-isolation --no-deps" for kind in ("cpu", "cuda")]


def test_suite_says_what_the_build_lacks(tmp_path):
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(ACTOR.replace("case ", 'case "$*" in *"import setuptools, pip"*) exit 1 ;; esac\ncase ', 1))
    python.chmod(0o755)
    done = start([BASH, FOLDER / "gpu_suite.sh", out], PYTHON=str(python), CALLS=str(tmp_path / "calls"))
    assert done.returncode == 1
    assert "error: building needs pip and setuptools 77 or newer" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("FAILED: build (status 1), tests (status 1)")


def test_suite_fits_its_time():
    parts = [
        line.split() for line in (FOLDER / "gpu_suite.sh").read_text().splitlines() if line.startswith("    part ")
    ]
    assert [part[1] for part in parts] == list(PARTS)
    assert sum(int(part[2]) + 5 for part in parts) <= 9 * 60 - 5
