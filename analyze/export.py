"""Models for other runtimes: ONNX and torch.export files, written only if they compute what the model computes.

python analyze/export.py --model vmamba_nano [--checkpoint FILE_OR_FOLDER] [--size H [W]] [--images PATH ...]
    [--out model.onnx model.pt2] [--tolerance 1e-4]

The graph is that of the reference implementation, of PyTorch's own operators alone; the file needs neither this
repository nor its kernels. The image size is fixed, the batch is free. Beside every file lies FILE.json: how its images
have to be normalised, and the differences found.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from PIL import Image
from timm.layers import set_exportable
from torch import Tensor, nn

from analyze import image_files, inputs
from ssm_train.common.command import run
from ssm_train.common.errors import UserError
from ssm_train.common.fileio import write_atomic

SUFFIXES = (".onnx", ".pt2")
BATCHES = (1, 3)  # of the check: one that frameworks like to treat as special, and one other than the traced

Runner = Callable[[Tensor], Tensor]


class Difference(NamedTuple):
    """Of the logits of an exported model from those of the eager one, on one batch."""

    what: str
    batch: int
    largest: float  # absolute, over all logits
    same_top1: bool


def trace(model: nn.Module, size: tuple[int, int], channels: int = 3) -> torch.export.ExportedProgram:
    """The graph of `model`, in evaluation mode, for images (B, channels, *size) with any B."""
    example = torch.zeros(2, channels, *size)
    batch = torch.export.Dim.DYNAMIC  # unlike a named Dim it need not prove that shapes fit for every B: we try some
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=False)


def write_pt2(program: torch.export.ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    """One file with the weights in it: images (batch, C, H, W) -> logits (batch, classes)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's, of its own parts
        torch.onnx.export(
            program,
            f=str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            external_data=False,
            dynamo=True,
            verbose=False,
        )


def load_pt2(path: Path) -> Runner:
    """The file as a function of images (B, C, H, W)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # PyTorch's, of its own reader
        return torch.export.load(path).module()


def load_onnx(path: Path) -> Runner:
    """As `load_pt2`, by onnxruntime on the CPU."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


FORMATS = {".onnx": (write_onnx, load_onnx), ".pt2": (write_pt2, load_pt2)}


@torch.inference_mode()
def compare(exported: Runner, eager: nn.Module, batches: dict[str, Tensor]) -> list[Difference]:
    """Both on every batch of images (B, C, H, W), by name."""
    found = []
    for what, images in batches.items():
        expected, given = eager(images), exported(images)
        if given.shape != expected.shape:
            raise UserError(f"on {what} the exported model gives {tuple(given.shape)}, not {tuple(expected.shape)}")
        same = torch.equal(expected.argmax(-1), given.argmax(-1))
        found.append(Difference(what, len(images), (given - expected).abs().max().item(), same))
    return found


def export(
    program: torch.export.ExportedProgram, eager: nn.Module, batches: dict[str, Tensor], path: Path, tolerance: float
) -> list[Difference]:
    """Write `program` to `path` (.onnx or .pt2), if the file, loaded again, gives the logits of `eager` within
    `tolerance` on all `batches`; returns how far they are apart. Until then the file has another name.

    Raises UserError where they differ; nothing is left then, and what had the name before stays.
    """
    write, load = FORMATS[path.suffix]
    aside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write(program, aside)
        found = compare(load(aside), eager, batches)
        worst = max(found, key=lambda difference: np.nan_to_num(difference.largest, nan=np.inf))
        if not worst.largest <= tolerance:  # also for nan
            raise UserError(
                f"{path} is not written: on {worst.what} its logits differ from the model's by {worst.largest:.2g}, "
                f"more than --tolerance {tolerance:g}"
            )
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return found


def check_batches(
    size: tuple[int, int], name: str, photographs: Collection[Image.Image], channels: int = 3
) -> dict[str, Tensor]:
    """Noise and photographs in batches of `BATCHES`."""
    noise = torch.Generator().manual_seed(0)
    pixels = torch.cat([image_files.to_tensor(image, name, size) for image in photographs])
    shape = (channels, *size)
    batches = {f"noise, batch {count}": torch.randn(count, *shape, generator=noise) for count in BATCHES}
    for count in BATCHES:
        batches[f"images, batch {count}"] = pixels[torch.arange(count) % len(pixels)]
    return batches


def describe(
    name: str, classes: int, size: tuple[int, int], channels: int, found: list[Difference], tolerance: float
) -> str:
    """What the JSON beside a file says."""
    mean, std = image_files.statistics(name, channels)
    colours = "RGB" if channels == 3 else "grey"
    preprocessing = {"layout": f"NCHW, {colours}, from 0 to 1, then (x - mean) / std"}
    preprocessing |= {"size": size, "mean": mean, "std": std}
    content = {"model": name, "classes": classes, "preprocessing": preprocessing, "tolerance": tolerance}
    content["differences"] = [difference._asdict() for difference in found]
    content["versions"] = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    return json.dumps(content, indent=1) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="analyze/export.py", description=__doc__.partition("\n")[0])
    inputs.add_model_arguments(parser)
    parser.add_argument("--size", type=int, nargs="+", metavar="H [W]", help="of the images (the run's or the model's)")
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="files or folders to compare on, up to 16")
    parser.add_argument("--out", type=Path, nargs="+", help=".onnx and .pt2 files to write (MODEL.onnx)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a logit (%(default)g)")
    image_files.add_range_argument(parser)
    args = parser.parse_args(argv)

    def command() -> int:
        name = inputs.model_name(args.model, args.checkpoint)
        paths = args.out or [Path(f"{name}.onnx")]
        wrong = [path for path in paths if path.suffix not in SUFFIXES]
        if wrong:
            raise UserError(f"--out {wrong[0]} does not end in {' or '.join(SUFFIXES)}")
        for path in paths:
            inputs.check_writable(path)
        eager = inputs.load_model(name, args.checkpoint, args.which, args.allow_nonfinite)
        with set_exportable(True):  # tells mixers to take the reference implementation
            plain = inputs.load_model(name, args.checkpoint, args.which, args.allow_nonfinite)
        if args.checkpoint is None:
            plain.load_state_dict(eager.state_dict())
        size = inputs.image_size(args.size, name, args.checkpoint)
        decoder = image_files.image_decoder(args.checkpoint, args.range)
        files = image_files.Readable(image_files.find_images(args.images)[:16], decoder)
        photographs = dict(files) or image_files.sample_images(decoder)
        batches = check_batches(size, name, photographs.values(), decoder.channels)
        inputs.check_image_size(eager, name, size, decoder.channels)
        print(f"tracing {name} at {size[0]}x{size[1]} pixels: this may take minutes for a large model", flush=True)
        program = trace(plain, size, decoder.channels)
        for path in paths:
            inputs.make_folder(path.parent)
            found = export(program, eager, batches, path, args.tolerance)
            report = path.with_name(f"{path.name}.json")
            write_atomic(report, describe(name, eager.num_classes, size, decoder.channels, found, args.tolerance))
            for difference in found:
                print(f"{difference.what:<16} largest difference {difference.largest:.1e}")
            print(path, report, sep="\n")
        return files.status

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
