"""Short runs of what users start on a GPU and no other test covers there: trainings in every precision and way of
starting, CUDA graphs, whole models beside the CPU, detection with mixed precision.

One of the trainings runs on the CPU, too (with --all), so that on the day of a GPU this file itself is known to work.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

import ssm_models  # noqa: F401
from ssm_train.data.digits import main as write_digits
from ssm_train.data.prefetch import DeviceBatches

ROOT = Path(__file__).parents[2]
MAIN = ROOT / "classification" / "main.py"
GPU = pytest.mark.gpu
MODELS = pytest.mark.parametrize("name", ["vmamba_nano", "vim_nano", "vssd_nano"])


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    assert not write_digits(["--out", str(folder)])
    return folder


def train(digits: Path, folder: Path, model: str, device: str, launcher: list[str], *opts: object) -> dict:
    """Two epochs on the digits in a process of its own; what they measured."""
    family = model.split("_")[0]
    command = [sys.executable, *launcher, str(MAIN)]
    command += ["--cfg", str(ROOT / f"configs/classification/{family}/{model}_digits.yaml")]
    command += ["--data-path", str(digits), "--output", str(folder), "--device", device]
    done = subprocess.run(
        [*command, "--opts", "TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "0", *map(str, opts)],
        env=os.environ | {"TMPDIR": str(folder.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "metrics.json").read_text())


def torchrun() -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return ["-m", "torch.distributed.run", "--nproc_per_node=1", f"--master_port={probe.getsockname()[1]}"]


# model, started by torchrun, options
TRAININGS = {
    "fp16-scaler": ("vmamba_nano", False, ("AMP", "fp16", "DATA.NUM_WORKERS", 2, "AUG.REPROB", 0.25)),
    "bf16": ("vim_nano", False, ("AMP", "bf16")),
    "compiled": ("vssd_nano", False, ("AMP", "bf16", "COMPILE", True)),
    "ddp-nccl": ("vmamba_nano", True, ("AMP", "off")),
    "fsdp2": ("vmamba_nano", True, ("AMP", "bf16", "PARALLEL", "fsdp")),
}


@GPU
@pytest.mark.parametrize("case", TRAININGS)
def test_training(case, digits, tmp_path):
    """It learns: two epochs, of 22 updates each, are far above one in ten."""
    model, launched, options = TRAININGS[case]
    metrics = train(digits, tmp_path / "run", model, "cuda", torchrun() if launched else [], *options)
    assert metrics["epochs"] == 2 and metrics["top1"] > 40


@pytest.mark.full
@pytest.mark.parametrize("case", ["bf16"])
def test_training_on_the_cpu(case, digits, tmp_path):
    """The same commands, in fp32, for there is no mixed precision on the CPU."""
    model, launched, options = TRAININGS[case]
    options = [option if option not in ("fp16", "bf16") else "off" for option in options]
    metrics = train(digits, tmp_path / "run", model, "cpu", torchrun() if launched else [], *options)
    assert metrics["epochs"] == 2 and metrics["top1"] > 40


@GPU
def test_batches_come_over_a_stream_of_their_own():
    """While the GPU is busy, and with the memory of earlier batches used again: every number arrives."""
    from ssm_train.data.dataset import Batch

    batches = [Batch(torch.full((64, 3, 64, 64), float(i)), torch.full((64,), i), [], []) for i in range(40)]
    pinned = [b._replace(images=b.images.pin_memory(), targets=b.targets.pin_memory()) for b in batches]
    busy = torch.randn(2048, 2048, device="cuda")
    moved, sums = DeviceBatches(pinned, torch.device("cuda"), torch.channels_last), []
    for _ in range(2):
        for batch in moved:
            for _ in range(4):
                busy = (busy @ busy).clamp(-1, 1)
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            sums.append((batch.images.double().mean(), batch.targets.double().mean()))
            del batch
    assert [tuple(map(float, pair)) for pair in sums] == [(float(i), float(i)) for i in range(40)] * 2


# ---- models ---------------------------------------------------------------------------------------------------------


@GPU
@MODELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_equal_the_cpu(name, dtype):
    """Logits and gradients; autocast to bfloat16 within its precision."""
    model = timm.create_model(name, drop_path_rate=0.0).double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    want = model(images)
    want.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.float().cuda()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        got = model(images.float().cuda())
    got.float().square().sum().backward()
    tolerance = 1e-3 if dtype == torch.float32 else 0.1  # TF32 is off by default in products
    assert (got.double().cpu() - want).norm() <= tolerance * want.norm()
    whole = torch.cat([g.flatten() for g in grads.values()])
    error = torch.cat([(p.grad.double().cpu() - grads[n]).flatten() for n, p in model.named_parameters()])
    assert error.norm() <= tolerance * whole.norm()


@GPU
@MODELS
def test_inference_in_a_cuda_graph(name):
    """Captured once, it computes the images that lie there when it is replayed."""
    model = timm.create_model(name).cuda().eval()
    images = torch.randn(8, 3, 32, 32, device="cuda")
    stream = torch.cuda.Stream()
    with torch.inference_mode():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(images)
        other = torch.randn_like(images)
        images.copy_(other)
        graph.replay()
        torch.testing.assert_close(logits, model(other))


@GPU
@MODELS
def test_inference_after_torch_compile(name):
    model = timm.create_model(name).cuda().eval()
    images = torch.randn(8, 3, 32, 32, device="cuda")
    with torch.inference_mode():
        want = model(images)
        got = torch.compile(model, mode="reduce-overhead")(images)
    assert F.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.9999


# ---- detection ------------------------------------------------------------------------------------------------------


@GPU
@pytest.mark.dense
def test_detection_with_mixed_precision(tmp_path):
    pytest.importorskip("mmdet")
    digit_scenes = importlib.import_module("detection.data.digit_scenes")
    tool = importlib.import_module("detection.tools.train")
    data = tmp_path / "data"
    assert digit_scenes.main(["--out", str(data), "--train", "8", "--val", "2"]) == 0
    config = ROOT / "configs/detection/digits/mask-rcnn_vmamba-nano_fpn_digits.py"
    options = ["train_cfg.max_epochs=1", "train_cfg.val_interval=1", "default_hooks.checkpoint.interval=1"]
    flags = ["--from-scratch", "--amp", "--work-dir", str(tmp_path / "run"), "--data-root", str(data)]
    assert tool.main([str(config), *flags, "--cfg-options", *options]) == 0
    assert list((tmp_path / "run").glob("epoch_1*.pth"))
