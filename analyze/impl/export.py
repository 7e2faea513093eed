"""Export of a model: what is traced, checked, and said of it. Shapes: B batch, C channels, H W image."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from analyze import image_files, inputs
from analyze.exporting import accuracy, blocks, files, graph, int8, onnx_file
from analyze.exporting.files import Difference, Runner
from analyze.impl.predict import class_names
from analyze.quick import take_quick_run
from ssm_train.common.decode import Decoder
from ssm_train.common.errors import UserError
from ssm_train.common.fileio import write_atomic

SUFFIXES = (".onnx", ".aoti.pt2", ".pt2")
BATCHES = (1, 3)  # of the check: one that frameworks like to treat as special, and one other than the traced
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1, "int8": 1.0}
_TIMED = 3  # runs, of which the fastest counts
_MOST = 64  # calibration images


class Task(NamedTuple):
    """What is exported and how it is compared."""

    name: str
    eager: nn.Module
    plain: Callable[[], nn.Module]
    """A new model for tracing, with the same weights."""
    size: tuple[int, int]
    decoder: Decoder
    photographs: Collection[Image.Image]
    tolerance: float

    def batches(self, any_size: bool) -> dict[str, Tensor]:
        """As `check_batches`; with `any_size` noise of two other sizes, too."""
        height, width = self.size
        sizes = [(height + 32, max(width // 2, 32)), (max(height // 2, 32), width + 48)] if any_size else []
        found = check_batches(self.size, self.name, self.photographs, self.decoder.channels)
        for other in sizes:
            noise = torch.Generator().manual_seed(0)
            found[f"noise, {other[0]}x{other[1]}"] = torch.randn(1, self.decoder.channels, *other, generator=noise)
        return found


def check_batches(
    size: tuple[int, int], name: str, photographs: Collection[Image.Image], channels: int = 3
) -> dict[str, Tensor]:
    """Noise in the first of `BATCHES`, photographs in the second."""
    one, several = BATCHES
    noise = torch.randn(one, channels, *size, generator=torch.Generator().manual_seed(0))
    pixels = torch.cat([image_files.to_tensor(image, name, size) for image in photographs])
    images = pixels[torch.arange(several) % len(pixels)]
    return {f"noise, batch {one}": noise, f"images, batch {several}": images}


def suffix_of(path: Path) -> str:
    """Raises UserError for a kind of file that is not written here."""
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return suffix
    raise UserError(f"--out {path} does not end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")


def report_of(path: Path) -> Path:
    """The JSON beside a file."""
    return path.with_name(f"{path.name}.json")


# ---- files ----------------------------------------------------------------------------------------------------------


class Written(NamedTuple):
    """A file, loaded again."""

    run: Runner
    differences: list[Difference]
    in_float32: Runner | None = None
    """The same without quantisation, where that was asked for."""


def write_onnx(
    task: Task,
    path: Path,
    scan: str,
    opset: int | None = None,
    weights: str = "float32",
    calibration: Sequence[np.ndarray] | None = None,
    in_float32: bool = False,
) -> Written:
    """An ONNX file of `task`, checked; int8 if images (1, C, H, W) are given to find the ranges from, and then with
    `in_float32` also a runner without that."""
    custom = scan == "custom"
    if custom:
        files.session_options(custom)  # before the work: is there a library?
    outline = blocks.trace(graph.with_operators(task.plain()), task.size, task.decoder.channels)
    converted = onnx_file.convert(outline, opset)
    load = partial(files.load_onnx, custom=custom)
    beside = None
    if in_float32:
        with tempfile.TemporaryDirectory() as folder:
            onnx.save_model(onnx_file.finish(copied(converted), scan), Path(folder, "float32.onnx"))
            beside = load(Path(folder, "float32.onnx"))
    quantise = None if calibration is None else partial(int8.quantise, images=calibration)
    write = partial(onnx.save_model, onnx_file.finish(converted, scan, weights, quantise))
    return Written(*files.write_checked(path, write, load, task.eager, task.batches(True), task.tolerance), beside)


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    same = onnx.ModelProto()
    same.CopyFrom(model)
    return same


def write_pt2(task: Task, path: Path) -> Written:
    """A torch.export file of PyTorch's own operators alone."""
    program = graph.trace(task.plain(), task.size, task.decoder.channels)
    write = partial(files.save_program, program)
    batches = task.batches(False)
    return Written(*files.write_checked(path, write, files.load_pt2, task.eager, batches, task.tolerance))


def write_compiled(task: Task, path: Path) -> Written:
    """A package of AOTInductor, for C++ programs on this kind of machine."""
    program = graph.trace(task.plain(), task.size, task.decoder.channels)
    write = partial(files.compile_package, program)
    batches = task.batches(False)
    return Written(*files.write_checked(path, write, files.load_compiled, task.eager, batches, task.tolerance))


def calibration_files(folder: Path, decoder: Decoder) -> image_files.Readable:
    """Up to `_MOST` images of a folder, evenly spread. Raises UserError where there are none."""
    paths = image_files.find_images([folder])
    count = min(len(paths), _MOST)
    return image_files.Readable([paths[number * len(paths) // count] for number in range(count)], decoder)


def calibration_images(files: image_files.Readable, name: str, size: tuple[int, int]) -> list[np.ndarray]:
    """As input (1, C, H, W) of the model `name`. Raises UserError where none can be read."""
    return [image_files.to_tensor(image, name, size).numpy() for _, image in files]


# ---- what is said of them -------------------------------------------------------------------------------------------


@torch.inference_mode()
def images_per_second(runners: dict[str, Runner], images: Tensor) -> dict[str, float]:
    """Of every runner on a batch of images, in turns."""
    fastest = dict.fromkeys(runners, float("inf"))
    for turn in range(_TIMED + 1):  # the first warms up
        for name, run in runners.items():
            start = time.perf_counter()
            run(images)
            if turn > 0:
                fastest[name] = min(fastest[name], time.perf_counter() - start)
    return {name: len(images) / seconds for name, seconds in fastest.items()}


def describe(
    task: Task, names: list[str] | None, checkpoint: Path | None, found: list[Difference], kind: dict[str, object]
) -> str:
    """What the JSON beside a file says."""
    mean, std = image_files.statistics(task.name, task.decoder.channels)
    cfg = inputs.run_config(checkpoint)
    of_timm = timm.get_pretrained_cfg(task.name)
    crop, interpolation = (
        (of_timm.crop_pct, of_timm.interpolation) if cfg is None else (cfg.DATA.CROP_RATIO, cfg.DATA.INTERPOLATION)
    )
    colours = "RGB" if task.decoder.channels == 3 else "grey"
    preprocessing = {"layout": f"NCHW, {colours}, from 0 to 1, then (x - mean) / std"}
    preprocessing |= {"size": task.size, "crop_ratio": crop, "interpolation": interpolation, "mean": mean, "std": std}
    content = {"model": task.name, "classes": task.eager.num_classes, "class_names": names}
    content |= {"preprocessing": preprocessing, **kind, "tolerance": task.tolerance}
    content["differences"] = [difference._asdict() for difference in found]
    content["versions"] = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    return json.dumps(content, indent=1) + "\n"


def names_of_classes(count: int, checkpoint: Path | None, file: Path | None) -> list[str] | None:
    """None where nobody knows them: they are of use, but not needed."""
    try:
        names = class_names(count, checkpoint, file)
    except UserError as error:
        if file is not None:
            raise
        print(f"no class names in the JSON: {error}", file=sys.stderr)
        return None
    return None if names[:1] == ["class 0"] else names


def command(args: argparse.Namespace) -> int:
    """Returns the exit status. Raises UserError."""
    take_quick_run(args, images=12)
    name = inputs.model_name(args.model, args.checkpoint)
    paths: Sequence[Path] = args.out or [Path(f"{name}.onnx")]
    kinds = [suffix_of(path) for path in paths]
    for path in paths:
        inputs.check_writable(path)
        inputs.check_writable(report_of(path))
        if paths.count(path) > 1:
            raise UserError(f"--out names {path} twice")
    form = "float32" if args.int8 is None else "int8"
    if args.weights != "float32":
        if form == "int8":
            raise UserError(f"--weights {args.weights} and --int8 exclude each other")
        form = args.weights
    if form != "float32" and set(kinds) != {".onnx"}:
        raise UserError(f"--weights and --int8 are for .onnx files, not for {paths[0]}")
    if (args.scan, args.opset) != ("portable", None) and ".onnx" not in kinds:
        raise UserError(f"--scan and --opset are for .onnx files, not for {paths[0]}")
    onnx_file.check_opset(args.opset)
    tolerance = TOLERANCES[form] if args.tolerance is None else args.tolerance
    inputs.at_least(0, tolerance=tolerance)

    load = partial(inputs.load_model, name, args.checkpoint, args.which, args.allow_nonfinite)
    eager = load()
    size = inputs.image_size(args.size, name, args.checkpoint)
    decoder = image_files.image_decoder(args.checkpoint, args.range)
    files_given = image_files.Readable(image_files.find_images(args.images or [])[:16], decoder)
    photographs = dict(files_given) or image_files.sample_images(decoder)
    inputs.check_image_size(eager, name, size, decoder.channels)
    names = names_of_classes(eager.num_classes, args.checkpoint, args.classes)
    files_to_calibrate = None if args.int8 is None else calibration_files(args.int8, decoder)
    calibration = None if files_to_calibrate is None else calibration_images(files_to_calibrate, name, size)
    plain = partial(graph.plain_model, load, eager.state_dict())
    task = Task(name, eager, plain, size, decoder, photographs.values(), tolerance)
    labelled = None
    if args.data_path is not None:
        if size[0] != size[1]:
            raise UserError(f"--data-path is evaluated on squares, not on --size {size[0]} {size[1]}")
        labelled = accuracy.labelled_images(args.data_path, args.checkpoint, eager.num_classes)
        transform = inputs.evaluation_transform(name, args.checkpoint, None if args.size is None else size[0])
    for path, kind in zip(paths, kinds, strict=True):
        inputs.make_folder(path.parent)
        started = time.monotonic()
        if kind == ".onnx":
            beside = args.int8 is not None and labelled is not None
            written = write_onnx(task, path, args.scan, args.opset, args.weights, calibration, beside)
        else:
            written = (write_pt2 if kind == ".pt2" else write_compiled)(task, path)
        taken = time.monotonic() - started
        of_file = {"scan": args.scan, "weights": form} if kind == ".onnx" else {}
        of_file["seconds"] = round(taken, 1)
        for difference in written.differences:
            print(f"{difference.what:<16} largest difference {difference.largest:.1e}")
        runners = {"the file": written.run, "eager": eager}
        if written.in_float32 is not None:
            runners["the file in float32"] = written.in_float32
        if labelled is None:
            speeds = images_per_second(runners, task.batches(False)["noise, batch 1"])
            print(", ".join(f"{who} {speed:.1f} images/s" for who, speed in speeds.items()))
        else:
            found = accuracy.accuracies(runners, labelled, transform)
            of_file["top1"] = {who: round(each.top1, 2) for who, each in found.items()}
            for who, each in found.items():
                print(f"{who:<20} top-1 {each.top1:.2f}% of {each.images} images, {each.per_second:.1f} images/s")
        report = report_of(path)
        write_atomic(report, describe(task, names, args.checkpoint, written.differences, of_file))
        print(f"exported in {taken:.0f} s", path, report, sep="\n")
    return max(files_given.status, 0 if files_to_calibrate is None else files_to_calibrate.status)
