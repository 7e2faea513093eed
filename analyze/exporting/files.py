"""Exported files: how each kind is written, and loaded again as a function."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
import torch._inductor
from torch import Tensor, nn

import ssm_ops.onnxruntime
from ssm_train.common.errors import UserError

Runner = Callable[[Tensor], Tensor]


class Difference(NamedTuple):
    """Of the logits of an exported model from those of the eager one, on one batch."""

    what: str
    batch: int
    size: tuple[int, int]
    largest: float  # absolute, over all logits
    same_top1: bool


def session_options(custom: bool) -> onnxruntime.SessionOptions:
    """With as many threads as PyTorch has, and with our operators if `custom`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if custom:
        try:
            ssm_ops.onnxruntime.register(options)
        except RuntimeError as error:
            raise UserError(str(error)) from error
    return options


def load_onnx(path: Path, custom: bool = False) -> Runner:
    """The file as a function of images (B, C, H, W), by onnxruntime on the CPU."""
    session = onnxruntime.InferenceSession(path, session_options(custom), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def load_pt2(path: Path) -> Runner:
    """As `load_onnx`, by PyTorch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # PyTorch's, of its own reader
        return torch.export.load(path).module()


def save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a file of torch.export; by Python, whose errors say why a file cannot be written."""
    content = io.BytesIO()
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())


def compile_package(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a package of AOTInductor. It is machine code, for processors like this one.

    Raises UserError where it cannot be compiled.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's, of its own parts
        package = Path(folder, "model.pt2")
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        except RuntimeError as error:  # of the compiler, too, whose output may be long
            reason = " ".join(str(error).split())
            raise UserError(
                f"AOTInductor could not compile the model ({reason:.300}); it needs a C++ compiler: CXX names it"
            ) from error
        shutil.copyfile(package, path)  # by Python, as above: PyTorch's own writer ends the process on a full disk


def load_compiled(path: Path) -> Runner:
    """As `load_onnx`, of a file that AOTInductor has made."""
    return torch._inductor.aoti_load_package(str(path))


@torch.inference_mode()
def compare(exported: Runner, eager: nn.Module, batches: dict[str, Tensor]) -> list[Difference]:
    """Both on every batch of images (B, C, H, W), by name."""
    found = []
    for what, images in batches.items():
        expected, given = eager(images), exported(images)
        if given.shape != expected.shape:
            raise UserError(f"on {what} the exported model gives {tuple(given.shape)}, not {tuple(expected.shape)}")
        same = torch.equal(expected.argmax(-1), given.argmax(-1))
        largest = (given - expected).abs().max().item()
        found.append(Difference(what, len(images), tuple(images.shape[2:]), largest, same))
    return found


def write_checked(
    path: Path,
    write: Callable[[Path], None],
    load: Callable[[Path], Runner],
    eager: nn.Module,
    batches: dict[str, Tensor],
    tolerance: float,
) -> tuple[Runner, list[Difference]]:
    """Write a file to `path`, if it, loaded again, gives the logits of `eager` within `tolerance` on all `batches`;
    returns it as loaded, and how far they are apart. Until then the file has another name.

    Raises UserError where they differ, or there is no room; nothing is left then, and what had the name before stays.
    """
    aside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        try:
            write(aside)
        except OSError as error:
            reason = f"{error.strerror}: free some space, or choose another path"
            raise UserError(f"--out {path} cannot be written: {reason}") from error
        runner = load(aside)
        found = compare(runner, eager, batches)
        worst = max(found, key=lambda difference: np.nan_to_num(difference.largest, nan=np.inf))
        if not worst.largest <= tolerance:  # also for nan
            raise UserError(
                f"{path} is not written: on {worst.what} its logits differ from the model's by {worst.largest:.2g}, "
                f"more than --tolerance {tolerance:g}"
            )
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return runner, found
