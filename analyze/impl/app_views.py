"""What the page of analyze/app.py shows of a model and an image, without the page: numbers, figures, commands.

All work on models goes one after another: `attention` listens to the operators of a module while it runs.
"""

import argparse
import shlex
import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from analyze import image_files, inputs
from analyze.attention import MODES, Softmax
from analyze.impl import attnmap, cam, erf
from analyze.impl.predict import class_names
from analyze.impl.predictions import denormalise
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

    @property
    def options(self) -> list[str]:
        """Of a command line."""
        known = self.checkpoint is not None and inputs.knows_its_model(self.checkpoint)
        return [] if known else ["--model", self.name]

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
    size = args.size or min(inputs.image_size(None, name, checkpoint))
    return Shown(
        f"{name}, {'random weights' if checkpoint is None else checkpoint.name}",
        name,
        checkpoint,
        model,
        class_names(model.num_classes, checkpoint, None),
        inputs.evaluation_transform(name, checkpoint),
        image_files.image_decoder(checkpoint),
        size,
    )


def _batch(shown: Shown, pixels: Tensor) -> Tensor:
    return pixels.to(next(shown.model.parameters()).device)


@one_at_a_time
@torch.inference_mode()
def classes(shown: Shown, path: Path, top: int = 5) -> dict[str, float]:
    """The `top` most probable classes, as predict.py prints them."""
    pixels = shown.transform(image_files.read_image(path, shown.decoder))
    shares, places = shown.model(_batch(shown, pixels[None]))[0].float().softmax(-1).topk(min(top, len(shown.classes)))
    return {shown.classes[i].split(",")[0]: share for i, share in zip(places.tolist(), shares.tolist(), strict=True)}


class Look(NamedTuple):
    """Attention of one mode: the figure, and per route smallest, largest and the query's own weight."""

    figure: Figure
    rows: list[tuple[str, float, float, float]]
    command: str


@one_at_a_time
def attention(shown: Shown, path: Path, query: tuple[int, int], stage: int, block: int, mode: str) -> Look:
    """What attnmap.py shows of one mode, at a pixel of the image. Raises UserError."""
    image = image_files.read_image(path, shown.decoder)
    at = (query[0] + 0.5, query[1] + 0.5)
    if not (0 <= query[0] < image.width and 0 <= query[1] < image.height):
        raise UserError(f"{query[0]} {query[1]} is outside of the image, {image.width}x{image.height} pixels")
    size = attnmap.size_for(image, shown.model, shown.name, shown.size)
    tensor = _batch(shown, image_files.to_tensor(image, shown.name, size))
    shares = (at[0] / image.width, at[1] / image.height)
    found = attnmap.attention_maps(shown.model, tensor, shares, stage, block, [mode])
    h, w = next(iter(found.maps[mode].values())).shape
    title = f"{shown.label}\n{mode}, stage {stage}, block {block}: {h}x{w} tokens of {size[0]}x{size[1]} pixels"
    rows = [
        (f"{route}: {found.names[route]}", float(values.min()), float(values.max()), float(values[found.cell]))
        for route, values in found.maps[mode].items()
    ]
    place = ["--query", *query, "--stage", stage, "--block", block, "--mode", mode]
    place += ["--size", shown.size] if shown.size != min(inputs.image_size(None, shown.name, shown.checkpoint)) else []
    return Look(attnmap.draw(found, image, at, title), rows, command(shown, "attnmap", path, *place))


@one_at_a_time
def class_map(shown: Shown, path: Path) -> tuple[Figure, str]:
    """Grad-CAM of the predicted class, and its command. Raises UserError."""
    pixels = shown.transform(image_files.read_image(path, shown.decoder))
    batch = _batch(shown, pixels[None])
    with torch.no_grad():
        share, target = shown.model(batch)[0].softmax(-1).max(-1)
    layer = cam.find_layer(shown.model, None)
    found = cam.compute(shown.model, layer, batch, target.item(), "gradcam")
    picture = denormalise(pixels, *image_files.statistics(shown.name, len(pixels)))
    caption = f"{shown.classes[target].split(',')[0]}  {share:.0%}"
    figure = cam.draw([picture], [{"gradcam": found}], [caption], cam.default_layer(shown.model))
    return figure, command(shown, "cam", path, "--methods", "gradcam")


@one_at_a_time
def field(shown: Shown, path: Path) -> tuple[Figure, str]:
    """The effective receptive field on this image, and the command of the same. Raises UserError."""
    size = max(shown.size, _FIELD)
    image = image_files.to_tensor(image_files.read_image(path, shown.decoder), shown.name, (size, size))
    values = erf.receptive_field(erf.features_of(shown.model, shown.name, size), [_batch(shown, image)])
    weights = erf.RANDOM if shown.checkpoint is None else shown.checkpoint.name
    figure = erf.draw([erf.Field(shown.name, weights, values)], [shown.name], 1)
    place = ["--checkpoint", shown.checkpoint] if shown.checkpoint is not None else []
    words = ["python", "analyze/erf.py", "--model", shown.name, *place, "--images", path, "--size", size]
    return figure, shlex.join(map(str, words))


@one_at_a_time
def speed(shown: Shown) -> str:
    """Throughput of inference on this machine, in words, as tp.py measures it."""
    device = next(shown.model.parameters()).device
    variant = Variant(shown.name, shown.size, _BATCH)
    [result] = measure([variant], lambda _: shown.model.eval(), device, rounds=_ROUNDS, seconds=_SECONDS)
    if result.images_per_second is None:
        return result.status
    spread = f"{min(result.samples):.1f} to {max(result.samples):.1f}"
    where = f"batch {_BATCH} of {shown.size}x{shown.size} pixels, fp32, {inputs.device_name(device)}"
    return f"{result.images_per_second:.1f} images/s ({spread}), peak memory {result.peak_mib:.0f} MiB: {where}"


def command(shown: Shown, script: str, path: Path, *more: Any) -> str:
    """The command line of another command that shows the same."""
    weights = ["--checkpoint", shown.checkpoint] if shown.checkpoint is not None else []
    return shlex.join(map(str, ["python", f"analyze/{script}.py", *shown.options, *weights, "--images", path, *more]))


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
