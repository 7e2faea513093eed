"""Maps of what a mixer's output at one place is made of, and their picture.

Shapes: C channels, H W image, h w map of tokens, L = h*w tokens and class tokens.
"""

import argparse
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from analyze import image_files, inputs
from analyze.attention import sources
from analyze.figures import check_png, save_figure
from analyze.quick import take_quick_run
from ssm_models.layers.pos_embed import class_token_rows
from ssm_models.vim import VisionMamba
from ssm_models.vssd import VSSD
from ssm_models.vssm import VSSM
from ssm_train.common.errors import UserError

_EXAMPLE = "china.jpg"  # without --images
_MIXERS = ((VSSM, "op"), (VSSD, "attn"), (VisionMamba, "mixer"))  # attributes of their blocks
_COLOURS = {False: colormaps["viridis"], True: colormaps["PuOr_r"]}  # are there negative weights?


class Maps(NamedTuple):
    """Maps of one mixer for one query.

    maps: by mode and route, each (h, w). names: of the routes, in words. cell: row and column of the query.
    extent: what the maps cover, as shares of the width and height of the image: left, right, bottom, top.
    """

    maps: dict[str, dict[str, np.ndarray]]
    names: dict[str, str]
    cell: tuple[int, int]
    extent: tuple[float, float, float, float]


def find_mixer(model: nn.Module, stage: int, block: int | None) -> tuple[nn.Module, int, int]:
    """The mixer of a block, the last of its stage by default; the block's number; pixels between tokens there.

    Raises UserError for what the model does not have.
    """
    attribute = next((attribute for family, attribute in _MIXERS if isinstance(model, family)), None)
    if attribute is None:
        raise UserError(f"--model: {type(model).__name__} has no state space mixers; give a VMamba, Vim or VSSD")
    stages = [model.layers] if isinstance(model, VisionMamba) else [part.blocks for part in model.layers]
    if not 0 <= stage < len(stages):
        raise UserError(f"--stage {stage}: this model has stages 0..{len(stages) - 1}")
    last = len(stages[stage]) - 1
    block = last if block is None else block
    if not 0 <= block <= last:
        raise UserError(f"--block {block}: stage {stage} of this model has blocks 0..{last}")
    return getattr(stages[stage][block], attribute), block, model.feature_info[stage]["reduction"]


@torch.no_grad()
def attention_maps(
    model: nn.Module,
    image: Tensor,
    at: tuple[float, float],
    stage: int = 0,
    block: int | None = None,
    modes: list[str] | None = None,
    routes: list[str] | None = None,
) -> Maps:
    """What a mixer's output at one place is made of.

    Args:
        image: (1, C, H, W).
        at: the query, (x, y) as shares of the width and the height, from 0 to below 1.
        stage, block: as `find_mixer`.
        modes, routes: all by default. UserError for one that the mixer does not have.
    """
    mixer, block, stride = find_mixer(model, stage, block)
    x = _input_of(mixer, model, image)
    if isinstance(model, VisionMamba):
        size = model.patch_embed.grid(*image.shape[2:])
        grid, tokens = (1, x.shape[1]), patch_places(model, block, size).to(x.device)
    else:
        size = grid = tuple(x.shape[2:] if getattr(mixer, "channel_first", False) else x.shape[1:3])
        tokens = torch.arange(size[0] * size[1], device=x.device)
    (row, column), extent = _locate(at, image.shape[2:], size, stride)
    found = sources(mixer, x, grid, int(tokens[row * size[1] + column]))
    _check("--mode", modes, found[0].modes)
    names = {f"a{i}": source.name for i, source in enumerate(found)}
    if len(found) > 1:
        names |= {"all": "sum", "nall": "mean, normalised"}
    _check("--routes", routes, names)
    maps = {}
    for mode in modes or found[0].modes:
        rows = [source.row(mode, grid[0] * grid[1])[tokens].view(size).cpu().numpy() for source in found]
        of_mode = {f"a{i}": route for i, route in enumerate(rows)}
        of_mode |= {"all": sum(rows), "nall": sum(map(_stretch, rows)) / len(rows)}
        maps[mode] = {route: of_mode[route] for route in routes or names}
    return Maps(maps, names, (row, column), extent)


def _locate(
    at: tuple[float, float], size: tuple[int, int], grid: tuple[int, int], stride: int
) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
    """The token nearest to a place in an image of `size`, (row, column), and the extent of the map: see `Maps`."""
    # where patches overlap, the outermost ones have their centres further in
    margins = [(pixels - cells * stride) / 2 for pixels, cells in zip(size, grid, strict=True)]
    cell = [
        min(max(int((share * pixels - margin) // stride), 0), cells - 1)
        for share, pixels, margin, cells in zip(reversed(at), size, margins, grid, strict=True)
    ]
    y, x = (margin / pixels for margin, pixels in zip(margins, size, strict=True))
    return (cell[0], cell[1]), (x, 1 - x, 1 - y, y)


def _input_of(mixer: nn.Module, model: nn.Module, image: Tensor) -> Tensor:
    """What `mixer` is given when the model sees the image."""
    seen: list[Tensor] = []
    handle = mixer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        model(image)
    finally:
        handle.remove()
    return seen[0]


def patch_places(model: VisionMamba, block: int, grid: tuple[int, int]) -> Tensor:
    """(h*w,): the places of the patches, row by row, in the sequence with class tokens that a block reads."""
    patches = grid[0] * grid[1]
    length = patches + len(model.class_tokens())
    rows = class_token_rows(model._resting_mode(), patches)
    places = torch.tensor([place for place in range(length) if place not in rows])
    # the second block of a pair reads the sequence from its end, and some models always do
    backwards = (model.if_bidirectional and block % 2 == 1) != (model.flip_ratio >= 1)
    return length - 1 - places if backwards else places


def _check(option: str, wanted: list[str] | None, legal) -> None:
    for name in wanted or ():
        if name not in legal:
            raise UserError(f"{option} {name}: this block has {','.join(legal)}")


def _stretch(route: np.ndarray) -> np.ndarray:
    """To 0..1; a constant map, which shows nothing, to 0."""
    low, high = route.min(), route.max()
    return (route - low) / (high - low) if high > low else np.zeros_like(route)


def draw(found: Maps, image: Image.Image, at: tuple[float, float], title: str) -> Figure:
    """The image with the query `at`, in pixels, and a panel per mode and route: its map over the image in grey.

    A row per mode, or of one route alone a panel per mode.
    """
    routes = list(next(iter(found.maps.values())))
    heads = [f"{route}: {found.names[route]}" for route in routes]
    rows = {mode: list(of_mode.values()) for mode, of_mode in found.maps.items()}
    if len(routes) == 1:
        heads, rows = list(rows), {heads[0]: [values for (values,) in rows.values()]}
    pixels = (0, image.width, image.height, 0)
    covered = [share * side for share, side in zip(found.extent, [image.width] * 2 + [image.height] * 2, strict=True)]
    width = 1.7 * min(max(image.width / image.height, 1) ** 0.5, 2)  # wide images get wider panels
    height = width * image.height / image.width + 0.35
    kinds = sorted({_is_signed(values) for maps in rows.values() for values in maps})
    size = (max(width * (len(heads) + 1) + 0.5, 5), height * len(rows) + 0.6 + 0.6 * len(kinds))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), len(heads) + 1, squeeze=False)
    picture = image.convert("RGB")
    picture.thumbnail((600, 600))  # finer than a panel, and drawn in all of them
    for panels, (label, maps) in zip(axes, rows.items(), strict=True):
        panels[0].imshow(picture, extent=pixels)
        panels[0].set_ylabel(label, fontsize=10, fontweight="bold")
        for panel, values in zip(panels[1:], maps, strict=True):
            panel.imshow(picture.convert("L"), cmap="gray", extent=pixels)
            _draw_map(panel, values, covered)
        for panel in panels:
            for colour, line in (("black", 2.6), ("white", 1)):
                panel.plot(*at, "o", markersize=6, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=line)
            panel.set(xticks=[], yticks=[], xlim=pixels[:2], ylim=pixels[2:])
    for panel, text in zip(axes[0], ["image and query", *heads], strict=True):
        panel.set_title(text, fontsize=8.5)
    figure.suptitle(title, fontsize=10)
    for signed in kinds:
        _draw_bar(figure, axes, signed)
    return figure


def _is_signed(values: np.ndarray) -> bool:
    return bool((values < 0).any())


def _draw_map(panel: Axes, values: np.ndarray, extent: list[float]) -> None:
    """Sequential colours from 0 on, or diverging ones around 0 where there are negative weights; by the square root of
    their size, for most mass is often in a few tokens."""
    signed, largest = _is_signed(values), float(abs(values).max()) or 1.0
    shown = np.sign(values) * abs(values / largest) ** 0.5
    limits = {"vmin": -1 if signed else 0, "vmax": 1}
    panel.imshow(shown, cmap=_COLOURS[signed], alpha=0.8, extent=extent, interpolation="nearest", **limits)
    panel.set_xlabel(f"{values.min():.2g} … {values.max():.2g}", fontsize=7, labelpad=2)


def _draw_bar(figure: Figure, axes: np.ndarray, signed: bool) -> None:
    colours = ScalarMappable(Normalize(-1 if signed else 0, 1), _COLOURS[signed])
    inches = figure.get_size_inches()[0]
    bar = figure.colorbar(colours, ax=axes, location="bottom", shrink=min(4 / inches, 0.9), aspect=30, pad=0.02)
    shares = np.array([0, 0.01, 0.1, 0.3, 1])
    shares = np.concatenate([-shares[:0:-1], shares]) if signed else shares
    bar.set_ticks(np.sign(shares) * abs(shares) ** 0.5, labels=[f"{share:g}" for share in shares], fontsize=7)
    which = "with" if signed else "without"
    bar.set_label(f"weight / largest |weight|, by square root; panels {which} negative weights", fontsize=7.5)


def size_for(image: Image.Image, model: nn.Module, name: str, shorter: int) -> tuple[int, int]:
    """(H, W) for the model: the shorter side as given, the other in proportion, both multiples of the largest stride,
    so that the tokens of every stage lie on a grid of whole pixels."""
    stride = max(info["reduction"] for info in model.feature_info)
    if shorter < stride:
        raise UserError(f"--size {shorter} is smaller than {stride} pixels, the largest stride of {name}")
    scale = shorter / min(image.size)
    height, width = (max(round(side * scale / stride), 1) * stride for side in (image.height, image.width))
    return height, width


def show(
    model: nn.Module,
    title: str,
    image: Image.Image,
    tensor: Tensor,
    query: tuple[int, int],
    stage: int = 0,
    block: int | None = None,
    modes: list[str] | None = None,
    routes: list[str] | None = None,
) -> tuple[Maps, Figure]:
    """The maps for the pixel `query`, (x, y), of `image`, which the model sees as `tensor` (1, C, H, W), and their
    picture. Raises UserError, also for a pixel outside of the image."""
    x, y = query
    if not (0 <= x < image.width and 0 <= y < image.height):
        raise UserError(f"--query {x} {y} is outside of the image, which has {image.width}x{image.height} pixels")
    at = (x + 0.5, y + 0.5)  # the middle of the pixel
    block = find_mixer(model, stage, block)[1]
    shares = (at[0] / image.width, at[1] / image.height)
    found = attention_maps(model, tensor, shares, stage, block, modes, routes)
    h, w = next(iter(next(iter(found.maps.values())).values())).shape
    where = f"stage {stage}, block {block}: {h}x{w} tokens of {tensor.shape[2]}x{tensor.shape[3]} pixels"
    return found, draw(found, image, at, f"{title}\n{where}")


def command(args: argparse.Namespace) -> None:
    """The command. Raises UserError."""
    check_png(args.out)
    device = inputs.find_device(args.device)
    take_quick_run(args, images=1)
    decoder = image_files.image_decoder(args.checkpoint, args.range)
    image = (
        image_files.sample_images(decoder)[_EXAMPLE]
        if args.images is None
        else image_files.read_image(*args.images, decoder)
    )
    query = tuple(args.query or (image.width // 2, image.height // 2))
    name = inputs.model_name(args.model, args.checkpoint)
    torch.manual_seed(0)  # for models without a checkpoint
    model = inputs.load_model(name, args.checkpoint, args.which, args.allow_nonfinite).to(device)
    find_mixer(model, args.stage, args.block)
    shorter = min(inputs.image_size(None, name, args.checkpoint)) if args.size is None else args.size
    tensor = image_files.to_tensor(image, name, size_for(image, model, name, shorter)).to(device)
    title = f"{name}, {inputs.weights_in_words(args.checkpoint)}"
    found, figure = show(model, title, image, tensor, query, args.stage, args.block, args.mode, args.routes)
    maps = {f"{mode}_{route}": values for mode, of_mode in found.maps.items() for route, values in of_mode.items()}
    save_figure(figure, args.out)
    np.savez(args.out.with_suffix(".npz"), **maps, query=query, cell=found.cell)
    print(args.out, args.out.with_suffix(".npz"), sep="\n")
