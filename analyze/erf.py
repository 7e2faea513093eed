"""Effective receptive fields: which pixels of an image the last feature map's middle responds to, models side by side.

python analyze/erf.py [--models vmamba_nano vim_nano vssd_nano] [--checkpoints RUN|FILE|- ...] [--images PATH ...]
                      [--size 128] [--num 50] [--seed 0] [--out FILE.png]

As in RepLKNet and VMamba: images are resized to size x size, the features of the middle token, before the final norm,
are rectified and summed over channels, and the gradient of that sum by the image is rectified, summed over colours, and
averaged over images (published pictures: 50 of ImageNet's validation images at 1024). Models come with random weights,
and below with those of their checkpoint where --checkpoints gives one for each ("-" for none). Any model of timm works
that gives feature maps; none is downloaded.

Prints, and writes to FILE.csv, the side of the smallest square in the middle that holds 20, 30, 50 and 99 % of the sum,
and its share of the image's area; FILE.npz holds the fields.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from analyze import image_files, inputs
from analyze.figures import check_png, colors_of, save_figure
from analyze.tables import aligned, write_csv
from ssm_train.common.command import run
from ssm_train.common.errors import UserError
from ssm_train.data.digits import write_digits

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)
_DIGITS = Path("runs/data/digits")  # where quickstart.sh has them, too
_NANO = ["vmamba_nano", "vim_nano", "vssd_nano"]
_RANDOM = "random weights"


class Field(NamedTuple):
    """The effective receptive field of a model, (H, W), with what its weights are."""

    model: str
    weights: str
    values: np.ndarray


class Square(NamedTuple):
    """The smallest centred square that holds `share` of a field: its side in pixels, its area as a share of all."""

    share: float
    side: int
    area: float


def receptive_field(features: Callable[[Tensor], Tensor], images: Iterable[Tensor]) -> np.ndarray:
    """The mean over images of the positive gradients of the middle of a feature map, (H, W) in float64.

    Ding et al. 2022, "Scaling Up Your Kernels to 31x31" (RepLKNet), appendix (https://arxiv.org/abs/2203.06717), after
    Luo et al. 2016 (https://arxiv.org/abs/1701.04128).

    Args:
        features: image (1, C, H, W) -> map (1, C, h, w), whose element (h // 2, w // 2) is the middle.
        images: of one size. Those whose gradient is not finite are left out, as published.

    Raises:
        UserError: no image has a finite gradient.
    """
    total, count = 0.0, 0
    for image in images:
        image = image.detach().requires_grad_()
        found = features(image)
        middle = found[..., found.shape[2] // 2, found.shape[3] // 2]
        gradient = torch.autograd.grad(middle.relu().sum(), image)[0].relu().sum((0, 1)).double()
        if gradient.isfinite().all():
            total, count = total + gradient.cpu().numpy(), count + 1
    if not count:
        raise UserError("no image gives finite gradients: the weights are not of use")
    return total / count


def shares_of_squares(field: np.ndarray) -> np.ndarray:
    """The shares of a field's sum in centred squares of side 1, 3, 5, ..., up to the whole image."""
    rows, columns = np.indices(field.shape)
    distance = np.maximum(abs(rows - field.shape[0] // 2), abs(columns - field.shape[1] // 2))
    return np.bincount(distance.ravel(), field.ravel()).cumsum() / field.sum()


def squares(field: np.ndarray, thresholds: Iterable[float] = THRESHOLDS) -> list[Square]:
    """For every threshold the smallest square around (H // 2, W // 2) that holds this share of the sum, as RepLKNet's
    table, but of the field itself and not of log10(field + 1). Squares end where the image ends."""
    shares = shares_of_squares(field)
    found = []
    for threshold in thresholds:
        side = 2 * int(np.argmax(shares >= min(threshold, shares[-1]))) + 1
        height, width = (min(side, length) for length in field.shape)
        found.append(Square(threshold, max(height, width), height * width / field.size))
    return found


def features_of(model: nn.Module, name: str, size: int) -> Callable[[Tensor], Tensor]:
    """The last feature map of a model before its final norm, for images of size x size. Raises UserError."""
    if not hasattr(model, "forward_intermediates"):
        raise UserError(f"--models {name}: this model of timm gives no feature maps (forward_intermediates)")
    model.requires_grad_(False)
    if hasattr(model, "set_input_size"):  # windows and position embeddings of transformers
        model.set_input_size(img_size=(size, size))

    def features(image: Tensor) -> Tensor:
        try:
            return model.forward_intermediates(image, indices=1, output_fmt="NCHW", intermediates_only=True)[-1]
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(f"--models {name} cannot take images of {size}x{size} pixels: {error}") from error

    return features


def measure(
    jobs: list[tuple[str, Path | None]],
    paths: list[Path],
    size: int,
    device: torch.device,
    args: argparse.Namespace,
) -> list[Field]:
    """The fields of models, each with a checkpoint or with random weights, read as the options in `args` say. Raises
    UserError."""
    fields = []
    for name, checkpoint in jobs:
        weights = _RANDOM if checkpoint is None else checkpoint.name
        torch.manual_seed(0)
        model = inputs.load_model(name, checkpoint, args.which, args.allow_nonfinite).to(device)
        features = features_of(model, name, size)
        files = inputs.progress(paths, f"{name}, {weights}")
        decoder = image_files.image_decoder(checkpoint, args.range)
        pictures = (image_files.read_image(path, decoder) for path in files)
        images = (image_files.to_tensor(picture, name, (size, size)).to(device) for picture in pictures)
        fields.append(Field(name, weights, receptive_field(features, images)))
        _check(fields[-1])
    return fields


def _check(field: Field) -> None:
    if not field.values.sum() > 0:
        raise UserError(f"{field.model} ({field.weights}): the middle of its features responds to no pixel")


def draw(fields: list[Field], names: list[str], count: int) -> Figure:
    """Above the fields, a column per model, those of checkpoints below; beneath, the shares that squares hold."""
    rows = [
        [next((f for f in fields if f.model == name and (f.weights == _RANDOM) == fresh), None) for name in names]
        for fresh in (True, False)
    ]
    rows = [row for row in rows if any(row)]
    size = len(fields[0].values)
    figure = Figure(figsize=(max(2.3 * len(names) + 0.9, 5), 2.6 * len(rows) + 3), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2.6 * len(rows), 3))
    axes = above.subplots(len(rows), len(names), squeeze=False)
    for panels, row in zip(axes, rows, strict=True):
        for panel, field in zip(panels, row, strict=True):
            panel.set(xticks=[], yticks=[])
            if field is None:
                panel.set_axis_off()
                continue
            shown = panel.imshow(field.values / field.values.max(), cmap="viridis", norm=PowerNorm(0.2, 0, 1))
            panel.set_title(f"{field.model}\n{field.weights}", fontsize=8.5)
            half, ninety_nine = squares(field.values, (0.5, 0.99))
            panel.set_xlabel(f"50 % in {half.side} px, 99 % in {ninety_nine.side} px", fontsize=7.5)
    bar = above.colorbar(shown, ax=axes, shrink=0.8, aspect=30, ticks=[0, 0.001, 0.01, 0.1, 0.5, 1], format="%g")
    bar.set_label("contribution / largest (power 0.2)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    curves, colors = below.subplots(), colors_of(names)
    for field in fields:
        shares = shares_of_squares(field.values)
        trained = field.weights != _RANDOM
        curves.plot(
            np.minimum(2 * np.arange(len(shares)) + 1, size),
            100 * shares,
            color=colors[field.model],
            linestyle="-" if trained else "--",
            label=f"{field.model}, {field.weights}",
        )
    for share in THRESHOLDS:
        curves.axhline(100 * share, color="silver", linewidth=0.8, zorder=0)
    curves.set(xlim=(1, size), ylim=(0, 101), yticks=[0, *(100 * share for share in THRESHOLDS)])
    curves.set_xlabel("side of a centred square [pixels]")
    curves.set_ylabel("contribution inside [%]")
    curves.legend(fontsize=7.5, loc="lower right")
    figure.suptitle(f"Effective receptive fields, {count} images of {size}x{size} pixels", fontsize=10)
    return figure


def table(fields: list[Field]) -> str:
    """Side and area of the squares, a line per field."""
    heads = ["model", "weights", *(f"{100 * share:g} %" for share in THRESHOLDS)]
    lines = [heads]
    for field in fields:
        cells = [f"{square.side} px ({100 * square.area:.1f} %)" for square in squares(field.values)]
        lines.append([field.model, field.weights, *cells])
    return "\n".join(aligned(lines, left=len(heads)))


_COLUMNS = ("model", "weights", "share", "side_px", "area_share")


def rows(fields: list[Field]) -> Iterable[tuple[object, ...]]:
    """The cells of _COLUMNS, a line per field and threshold."""
    for field in fields:
        for square in squares(field.values):
            yield field.model, field.weights, *square


def _jobs(models: list[str], checkpoints: list[str] | None) -> list[tuple[str, Path | None]]:
    """Every model with random weights, then with those of its checkpoint. Raises UserError."""
    given = checkpoints or ["-"] * len(models)
    if len(given) != len(models):
        raise UserError(f"--checkpoints names {len(given)} for {len(models)} models: one each, or - for none")
    twice = next((name for name in models if models.count(name) > 1), None)
    if twice:
        raise UserError(f"--models names {twice} twice")
    trained = [(name, Path(path)) for name, path in zip(models, given, strict=True) if path != "-"]
    return [*((name, None) for name in models), *trained]


def erf(args: argparse.Namespace) -> int:
    """The command; returns the exit status. Raises UserError."""
    check_png(args.out)
    for option in ("size", "num"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option} is {getattr(args, option)}, but it must be at least 1")
    jobs, device = _jobs(args.models, args.checkpoints), inputs.find_device(args.device)
    if args.images is None:
        write_digits(_DIGITS)
    paths = image_files.find_images(args.images or [_DIGITS / "val"])
    paths = random.Random(args.seed).sample(paths, min(args.num, len(paths)))
    files = image_files.Readable(paths, image_files.image_decoder(jobs[-1][1], args.range))
    paths = [Path(path) for path, _ in files]
    fields = measure(jobs, paths, args.size, device, args)
    print(table(fields), end="\n\n")
    save_figure(draw(fields, args.models, len(paths)), args.out)
    write_csv(args.out.with_suffix(".csv"), _COLUMNS, rows(fields))
    arrays = {field.model + ("" if field.weights == _RANDOM else "_trained"): field.values for field in fields}
    np.savez(args.out.with_suffix(".npz"), **arrays)
    print(args.out, *(args.out.with_suffix(suffix) for suffix in (".csv", ".npz")), sep="\n")
    return files.status


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="analyze/erf.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", metavar="NAME", default=_NANO, help=f"({' '.join(_NANO)})")
    parser.add_argument("--checkpoints", nargs="+", metavar="PATH", help="one for each model, - for none (none)")
    inputs.add_weights_arguments(parser)
    parser.add_argument("--images", type=Path, nargs="+", metavar="PATH", help="images or folders (embedded digits)")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels (%(default)s)")
    parser.add_argument("--num", type=int, default=50, help="images drawn at random (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("erf.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--device", default="", help="cuda or cpu; cuda where there is one")
    image_files.add_range_argument(parser)
    args = parser.parse_args(argv)
    return run(lambda: erf(args))


if __name__ == "__main__":
    sys.exit(main())
