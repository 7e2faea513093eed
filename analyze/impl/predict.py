"""The most probable classes of images, and their sheet. Shapes: C channels, S x S pixels."""

import argparse
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor, nn

from analyze import image_files, inputs
from analyze.figures import check_png, save_figure
from analyze.quick import take_quick_run
from analyze.tables import write_csv
from ssm_models.printable import printable
from ssm_train.common.errors import UserError
from ssm_train.data.build import scan_split
from ssm_train.data.transforms import Transform
from ssm_train.record.checkpoint import META, best_or_itself, read_checkpoint
from ssm_train.record.sheet import Tile, denormalise, draw_sheet

_BATCH = 32
ON_SHEET = 48  # images
_IN_CAPTION = 3  # classes
_LONGEST = 20  # characters of a name in a caption


class Answer(NamedTuple):
    image: str  # file name
    pixels: Tensor  # (C, S, S), as the model saw it
    classes: list[int]  # the most probable first
    probabilities: list[float]


def class_names(count: int, checkpoint: Path | None, file: Path | None) -> list[str]:
    """The names of a model's `count` classes: the lines of `file`, else those that the run that wrote `checkpoint`
    recorded or that its data have, else ImageNet's where there are 1000, else "class 0" and so on. Raises UserError."""
    if file is not None:
        try:
            names = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--classes {file} cannot be read: {error}") from error
        if len(names) != count:
            raise UserError(f"--classes {file} has {len(names)} lines, but the model has {count} classes")
        return names
    recorded = recorded_names(checkpoint)
    if recorded is not None:
        return recorded
    cfg = inputs.run_config(checkpoint)
    if cfg is not None:
        try:
            return scan_split(cfg, "val").classes
        except UserError as error:
            raise UserError(f"the class names of {checkpoint}: {error}; or give them as --classes FILE") from error
    if count == 1000:
        imagenet = ImageNetInfo()
        return [imagenet.index_to_description(index) for index in range(count)]
    return [f"class {index}" for index in range(count)]


def recorded_names(checkpoint: Path | None) -> list[str] | None:
    """The classes that a checkpoint of ours names, in the order of their labels; None for any other."""
    folder = None if checkpoint is None else best_or_itself(checkpoint)
    if folder is None or not (folder / META).is_file():
        return None
    labels = read_checkpoint(folder).meta["classes"]
    return None if labels is None else sorted(labels, key=labels.__getitem__)


@torch.inference_mode()
def predict(
    model: nn.Module, transform: Transform, images: Iterator[tuple[str, Image.Image]], top: int
) -> Iterator[Answer]:
    """The `top` most probable classes of every (name, image). `model` stands in evaluation mode on any device."""
    device = next(model.parameters()).device
    while batch := list(islice(images, _BATCH)):
        pixels = torch.stack([transform(image) for _, image in batch])
        probabilities, classes = model(pixels.to(device)).float().softmax(-1).topk(top)
        for (name, _), *answer in zip(batch, pixels, classes.tolist(), probabilities.tolist(), strict=True):
            yield Answer(name, *answer)


def draw(answers: list[Answer], names: list[str], model: str, title: str) -> Figure:
    """The sheet: above every image its most probable classes, below it the name of its file."""
    tiles = []
    for answer in answers:
        best = list(zip(answer.classes, answer.probabilities, strict=True))[:_IN_CAPTION]
        caption = "\n".join(
            f"{_short(names[index])}  {share:{'.0%' if share >= 0.1 else '.1%'}}" for index, share in best
        )
        pixels = denormalise(answer.pixels, *image_files.statistics(model, len(answer.pixels)))
        tiles.append(Tile(pixels, caption, note=_short(Path(answer.image).name)))
    return draw_sheet(tiles, title)


def _short(name: str) -> str:
    """The first of several synonyms, cut to what fits above a picture."""
    name = name.split(",")[0]
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


_COLUMNS = ("image", "rank", "index", "class", "probability")


def rows(answers: list[Answer], names: list[str]) -> Iterable[tuple[object, ...]]:
    """The cells of _COLUMNS, a line per image and rank."""
    for answer in answers:
        for rank, (index, share) in enumerate(zip(answer.classes, answer.probabilities, strict=True), 1):
            yield answer.image, rank, index, names[index], f"{share:.6f}"


def command(args: argparse.Namespace) -> int:
    """The command; returns the exit status. Raises UserError."""
    if args.top < 1:
        raise UserError(f"--top is {args.top}, but it must be at least 1")
    check_png(args.out)
    take_quick_run(args, images=24)
    device = inputs.find_device(args.device)
    name = inputs.model_name(args.model, args.checkpoint)
    model = inputs.load_model(name, args.checkpoint, args.which, args.allow_nonfinite).to(device)
    names = class_names(model.num_classes, args.checkpoint, args.classes)
    transform = inputs.evaluation_transform(name, args.checkpoint, args.size)
    decoder = image_files.image_decoder(args.checkpoint, args.range)
    if args.size is not None:
        inputs.check_image_size(model, name, (args.size, args.size), decoder.channels)
    files, images = image_files.given_or_photographs(args.images, decoder)
    answers = []
    for answer in inputs.progress(predict(model, transform, images, min(args.top, len(names))), "images", len(files)):
        answers.append(answer if len(answers) < ON_SHEET else answer._replace(pixels=answer.pixels.new_empty(0)))
    title = f"{name}{' with random weights' if args.checkpoint is None else ''}: most probable classes"
    save_figure(draw(answers[:ON_SHEET], names, name, title), args.out)
    table = args.out.with_suffix(".csv")
    write_csv(table, _COLUMNS, rows(answers, names))
    best = answers[0]
    line = f"{best.image}: {names[best.classes[0]]} {best.probabilities[0]:.1%}"
    print(printable(line), args.out, table, sep="\n")
    return files.status
