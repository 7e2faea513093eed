"""What a model says of images: the most probable classes, as a picture sheet and a table.

python analyze/predict.py --checkpoint runs/quickstart --images FILE_OR_FOLDER ... [--top 5] [--out predict.png]
python analyze/predict.py --model vmamba_tiny_s1l8 --checkpoint OFFICIAL.pth [--classes NAMES.txt]

Images are prepared as in the evaluation of the run or, for other weights, of the model's authors. Writes the sheet
(PNG) and, under the same name, all predictions as csv. Files that cannot be read are named, a line each on stderr, and
left out; the exit status is then 1, or 2 where none can be read.
"""

import argparse
import sys
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
from analyze.predictions import Tile, denormalise, draw_sheet
from analyze.tables import write_csv
from ssm_models.printable import printable
from ssm_train.common.command import run
from ssm_train.common.errors import UserError
from ssm_train.data.build import scan_split
from ssm_train.data.transforms import Transform

_BATCH = 32
_ON_SHEET = 48  # images
_IN_CAPTION = 3  # classes
_LONGEST = 20  # characters of a name in a caption


class Answer(NamedTuple):
    image: str  # file name
    pixels: Tensor  # (C, S, S), as the model saw it
    classes: list[int]  # the most probable first
    probabilities: list[float]


def class_names(count: int, checkpoint: Path | None, file: Path | None) -> list[str]:
    """The names of a model's `count` classes: the lines of `file`, else those of the data of the run that wrote
    `checkpoint`, else ImageNet's where there are 1000, else "class 0" and so on. Raises UserError."""
    if file is not None:
        try:
            names = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--classes {file} cannot be read: {error}") from error
        if len(names) != count:
            raise UserError(f"--classes {file} has {len(names)} lines, but the model has {count} classes")
        return names
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


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="analyze/predict.py", description=__doc__.partition("\n")[0])
    inputs.add_model_arguments(parser)
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="files or folders (two photographs)")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one per line")
    parser.add_argument("--top", type=int, default=5, help="classes to name (%(default)s)")
    parser.add_argument("--size", type=int, help="side of the images in pixels (the run's or the model's)")
    parser.add_argument("--out", type=Path, default=Path("predict.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--device", default="", help="cuda or cpu; cuda where there is one")
    image_files.add_range_argument(parser)
    args = parser.parse_args(argv)

    def command() -> int:
        if args.top < 1:
            raise UserError(f"--top is {args.top}, but it must be at least 1")
        check_png(args.out)
        device = inputs.find_device(args.device)
        name = inputs.model_name(args.model, args.checkpoint)
        model = inputs.load_model(name, args.checkpoint, args.which, args.allow_nonfinite).to(device)
        names = class_names(model.num_classes, args.checkpoint, args.classes)
        transform = inputs.evaluation_transform(name, args.checkpoint, args.size)
        decoder = image_files.image_decoder(args.checkpoint, args.range)
        if args.size is not None:
            inputs.check_image_size(model, name, (args.size, args.size), decoder.channels)
        paths = image_files.find_images(args.images)
        files = image_files.Readable(paths, decoder)
        images = iter(files) if paths else iter(image_files.sample_images(decoder).items())
        answers = []
        for answer in inputs.progress(
            predict(model, transform, images, min(args.top, len(names))), "images", len(paths)
        ):
            answers.append(answer if len(answers) < _ON_SHEET else answer._replace(pixels=answer.pixels.new_empty(0)))
        title = f"{name}{' with random weights' if args.checkpoint is None else ''}: most probable classes"
        save_figure(draw(answers[:_ON_SHEET], names, name, title), args.out)
        table = args.out.with_suffix(".csv")
        write_csv(table, _COLUMNS, rows(answers, names))
        best = answers[0]
        line = f"{best.image}: {names[best.classes[0]]} {best.probabilities[0]:.1%}"
        print(printable(line), args.out, table, sep="\n")
        return files.status

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
