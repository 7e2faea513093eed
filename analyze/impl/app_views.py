"""What the page of analyze/app.py shows of a model and an image, without the page: numbers, figures, commands.

All work on models goes one after another: `attention` listens to the operators of a module while it runs.
"""

import argparse
import shlex
import threading
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from analyze import image_files, inputs
from analyze.attention import MODES, Softmax
from analyze.impl import attnmap, cam, erf
from analyze.impl.predict import class_names
from analyze.throughput import Variant, measure
from ssm_models.layers.attention import Attention
from ssm_train.common.decode import Decoder
from ssm_train.common.errors import UserError
from ssm_train.data.transforms import Transform

NANO = ("vmamba_nano", "vim_nano", "vssd_nano")
_BATCH, _ROUNDS, _SECONDS = 8, 3, 0.2  # of the measurement of throughput
_FIELD = 128  # pixels a side of the receptive field's image, at least

P, T = ParamSpec("P"), TypeVar("T")
_WORK = threading.Lock()


def one_at_a_time(work: Callable[P, T]) -> Callable[P, T]:
    @wraps(work)
    def locked(*args: P.args, **kwargs: P.kwargs) -> T:
        with _WORK:
            return work(*args, **kwargs)

    return locked


class Shown(NamedTuple):
    """A model that can be chosen, and how images are prepared for it."""

    label: str
    name: str
    checkpoint: Path | None
    model: nn.Module
    classes: list[str]
    transform: Transform
    decoder: Decoder
    size: int  # pixels of the shorter side of what attention is drawn of
    resized: bool  # `size` is not the model's own
    weights: tuple[str, ...]  # options of a command line that takes the same ones

    @property
    def stages(self) -> list[int]:
        """Number of blocks of every stage. UserError for a model without mixers."""
        attnmap.find_mixer(self.model, 0, None)
        if hasattr(self.model.layers[0], "blocks"):
            return [len(stage.blocks) for stage in self.model.layers]
        return [len(self.model.layers)]

    def modes(self, stage: int, block: int) -> tuple[str, ...]:
        """Of `attention`, that a block has."""
        mixer, _, _ = attnmap.find_mixer(self.model, stage, block)
        return Softmax.modes if isinstance(mixer, Attention) else MODES


def load(name: str | None, checkpoint: Path | None, device: torch.device, args: argparse.Namespace) -> Shown:
    """A model with the weights of a checkpoint, or random ones. Raises UserError."""
    name = inputs.model_name(name, checkpoint)
    torch.manual_seed(0)
    model = inputs.load_model(name, checkpoint, args.which, args.allow_nonfinite).to(device)
    own = min(inputs.image_size(None, name, checkpoint))
    return Shown(
        f"{name}, {inputs.weights_in_words(checkpoint)}",
        name,
        checkpoint,
        model,
        class_names(model.num_classes, checkpoint, None),
        inputs.evaluation_transform(name, checkpoint),
        image_files.image_decoder(checkpoint),
        args.size or own,
        args.size not in (None, own),
        weights_options(checkpoint, args),
    )


def weights_options(checkpoint: Path | None, args: argparse.Namespace) -> tuple[str, ...]:
    """What names the same weights to another command."""
    given = () if checkpoint is None else ("--checkpoint", str(checkpoint))
    given += ("--which", args.which) if args.which != "auto" else ()
    return given + (("--allow-nonfinite",) if args.allow_nonfinite else ())


class Look(NamedTuple):
    """Attention of one mode: the figure, per route smallest, largest and the query's own weight, and the command."""

    figure: Figure
    rows: list[tuple[str, float, float, float]]
    command: str


@one_at_a_time
def attention(shown: Shown, path: Path, query: tuple[int, int], stage: int, block: int, mode: str) -> Look:
    """What attnmap.py shows of one mode, at a pixel of the image: one pass through the model. Raises UserError."""
    image = image_files.read_image(path, shown.decoder)
    size = attnmap.size_for(image, shown.model, shown.name, shown.size)
    tensor = image_files.to_tensor(image, shown.name, size).to(_device(shown))
    found, figure = attnmap.show(shown.model, shown.label, image, tensor, query, stage, block, [mode])
    rows = [
        (f"{route}: {found.names[route]}", float(values.min()), float(values.max()), float(values[found.cell]))
        for route, values in found.maps[mode].items()
    ]
    place = ["--query", *query, "--stage", stage, "--block", block, "--mode", mode]
    place += ["--size", shown.size] if shown.resized else []
    return Look(figure, rows, command(shown, "attnmap", path, *place))


class Answer(NamedTuple):
    """The most probable classes, where the first of them is seen, and the command that draws the same."""

    shares: dict[str, float]
    figure: Figure
    command: str


@one_at_a_time
def answer(shown: Shown, path: Path, top: int = 5) -> Answer:
    """What predict.py and cam.py say of an image: one pass through the model for the classes, and one with its
    gradient. Raises UserError."""
    pixels = shown.transform(image_files.read_image(path, shown.decoder))
    seen = cam.look(shown.model, shown.name, shown.classes, pixels, None, None, ["gradcam"])
    shares, places = seen.shares.topk(min(top, len(shown.classes)))
    first = {shown.classes[i].split(",")[0]: share for i, share in zip(places.tolist(), shares.tolist(), strict=True)}
    figure = cam.sheet([seen], shown.model, shown.name, None)
    return Answer(first, figure, command(shown, "cam", path, "--methods", "gradcam"))


@one_at_a_time
def field(shown: Shown, path: Path) -> tuple[Figure, str]:
    """The effective receptive field on this image, with random weights and with those of the checkpoint, and the
    command of the same. Raises UserError."""
    size, device = max(shown.size, _FIELD), _device(shown)
    jobs = [(erf.Job(shown.name), _with_random_weights(shown.name, device))]
    if shown.checkpoint is not None:
        jobs.append((erf.Job(shown.name, shown.checkpoint), shown.model))
    fields = [erf.field_of(job, model, [path], size) for job, model in jobs]
    words = ["python", "analyze/erf.py", "--model", shown.name, *shown.weights, "--images", path, "--size", size]
    return erf.draw(fields, [shown.name], 1), shlex.join(map(str, words))


@cache
def _with_random_weights(name: str, device: torch.device) -> nn.Module:
    """Built when it is first asked for, and kept."""
    return erf.build(erf.Job(name)).to(device)


def _device(shown: Shown) -> torch.device:
    return next(shown.model.parameters()).device


@one_at_a_time
def speed(shown: Shown) -> str:
    """Throughput of inference on this machine, in words, as tp.py measures it."""
    device = _device(shown)
    variant = Variant(shown.name, shown.size, _BATCH)
    [result] = measure([variant], lambda _: shown.model.eval(), device, rounds=_ROUNDS, seconds=_SECONDS)
    if result.images_per_second is None:
        return result.status
    spread = f"{min(result.samples):.1f} to {max(result.samples):.1f}"
    where = f"batch {_BATCH} of {shown.size}x{shown.size} pixels, fp32, {inputs.device_name(device)}"
    return f"{result.images_per_second:.1f} images/s ({spread}), peak memory {result.peak_mib:.0f} MiB: {where}"


def command(shown: Shown, script: str, path: Path, *more: Any) -> str:
    """The command line of another command that shows the same."""
    known = shown.checkpoint is not None and inputs.knows_its_model(shown.checkpoint)
    model = [] if known else ["--model", shown.name]
    return shlex.join(map(str, ["python", f"analyze/{script}.py", *model, *shown.weights, "--images", path, *more]))


def picture(path: Path, longest: int = 640) -> tuple[Image.Image, tuple[int, int]]:
    """The image in RGB, small enough to be shown, and its own width and height. UserError for what is no image, or too
    large a one, which its header tells before anything is decoded."""
    try:
        image = image_files.read_image(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), path.name)) from error  # an upload lies where nobody put it
    size = image.size
    if max(size) < longest / 4:  # the digits
        image = image.resize((size[0] * 8, size[1] * 8), Image.Resampling.NEAREST)
    image.thumbnail((longest, longest))
    return image, size


def pixel_of(path: Path, shown: tuple[int, int]) -> tuple[int, int]:
    """The pixel of the image below one of its `picture`."""
    small, size = picture(path)
    return tuple(int((place + 0.5) * side / seen) for place, side, seen in zip(shown, size, small.size, strict=True))
