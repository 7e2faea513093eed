"""Effective receptive fields of models, and their picture. Shapes: C channels, H W image, h w feature map."""

import argparse
import random
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
from analyze.quick import digits, quick_run, say
from analyze.tables import aligned, write_csv
from ssm_train.common.errors import UserError

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)
_MODELS = ["vmamba_nano", "vim_nano", "vssd_nano", "resnet18"]  # without --model; the first with the quick run
RANDOM = inputs.weights_in_words(None)
_NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


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
        raise UserError(f"--model {name}: this model of timm gives no feature maps (forward_intermediates)")
    model.requires_grad_(False)
    if hasattr(model, "set_input_size"):  # windows and position embeddings of transformers
        model.set_input_size(img_size=(size, size))

    def features(image: Tensor) -> Tensor:
        try:
            return model.forward_intermediates(image, indices=1, output_fmt="NCHW", intermediates_only=True)[-1]
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(f"--model {name} cannot take images of {size}x{size} pixels: {error}") from error

    return features


def make_neutral(model: nn.Module) -> None:
    """Set to one what timm starts at zero or nearly so that blocks do nothing at first: weights of norms (the last ones
    of residual branches) and factors per channel (layer scale). The field of a model that does nothing is its stem's.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            scale = name.startswith("gamma") and parameter.dim() == 1
            closed = isinstance(module, _NORMS) and name == "weight" and not parameter.any()
            if scale or closed:
                nn.init.ones_(parameter)


class Job(NamedTuple):
    """A model whose field is wanted; without a checkpoint random or, where `pretrained`, timm's weights."""

    model: str
    checkpoint: Path | None = None
    pretrained: bool = False

    @property
    def weights(self) -> str:
        """In words."""
        return "pretrained" if self.pretrained else inputs.weights_in_words(self.checkpoint)


def jobs_of(models: list[str], checkpoints: list[str] | None, pretrained: bool) -> list[Job]:
    """Every model with random weights, then those with others. UserError, also for weights that are not there."""
    given = checkpoints or ["-"] * len(models)
    if len(given) != len(models):
        raise UserError(f"--checkpoint names {len(given)} for {len(models)} models: one each, or - for none")
    twice = next((name for name in models if models.count(name) > 1), None)
    if twice:
        raise UserError(f"--model names {twice} twice")
    jobs = [Job(name) for name in models]
    for name, path in zip(models, given, strict=True):
        if path != "-" or pretrained:
            jobs.append(Job(name, pretrained=True) if path == "-" else Job(name, Path(path)))
    for job in jobs:
        inputs.check_weights(job.model, job.checkpoint)
    return jobs


def build(job: Job, which: str = "auto", allow_nonfinite: bool = False) -> nn.Module:
    """The model of a job; random weights are the same every time, and neutral. Raises UserError."""
    torch.manual_seed(0)
    if job.pretrained:
        return inputs.load_pretrained_timm(job.model)
    model = inputs.load_model(job.model, job.checkpoint, which, allow_nonfinite)
    if job.weights == RANDOM:
        make_neutral(model)
    return model


def field_of(
    job: Job, model: nn.Module, paths: Iterable[Path], size: int, asked_range: list[float] | None = None
) -> Field:
    """Of the model of a job, over images of size x size pixels. Raises UserError."""
    features, device = features_of(model, job.model, size), next(model.parameters()).device
    decoder = image_files.image_decoder(job.checkpoint, asked_range)
    pictures = (image_files.read_image(path, decoder) for path in paths)
    images = (image_files.to_tensor(picture, job.model, (size, size)).to(device) for picture in pictures)
    field = Field(job.model, job.weights, receptive_field(features, images))
    if not field.values.sum() > 0:
        raise UserError(f"{field.model} ({field.weights}): the middle of its features responds to no pixel")
    return field


def measure(jobs: list[Job], paths: list[Path], device: torch.device, args: argparse.Namespace) -> list[Field]:
    """The fields of models, read as the options in `args` say. Raises UserError."""
    fields = []
    for job in jobs:
        model = build(job, args.which, args.allow_nonfinite).to(device)
        files = inputs.progress(paths, f"{job.model}, {job.weights}")
        fields.append(field_of(job, model, files, args.size, args.range))
    return fields


def draw(fields: list[Field], names: list[str], count: int) -> Figure:
    """Above the fields, a column per model, those of checkpoints below; beneath, the shares that squares hold."""
    rows = [
        [next((f for f in fields if f.model == name and (f.weights == RANDOM) == fresh), None) for name in names]
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
        trained = field.weights != RANDOM
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
    below.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7.5)
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


def command(args: argparse.Namespace) -> int:
    """The command; returns the exit status. Raises UserError."""
    check_png(args.out)
    for option in ("size", "num"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option} is {getattr(args, option)}, but it must be at least 1")
    models, checkpoints, device = args.model or _MODELS, args.checkpoint, inputs.find_device(args.device)
    if args.model is None and checkpoints is None and not args.pretrained:
        checkpoints = [str(quick_run()), *["-"] * (len(models) - 1)]
        say(f"taking --model {' '.join(models)} --checkpoint {' '.join(checkpoints)}")
    jobs = jobs_of(models, checkpoints, args.pretrained)
    if args.images is None:
        args.images = [digits() / "val"]
        say(f"taking --images {args.images[0]}")
    paths = image_files.find_images(args.images)
    paths = random.Random(args.seed).sample(paths, min(args.num, len(paths)))
    files = image_files.Readable(paths, image_files.image_decoder(jobs[-1].checkpoint, args.range))
    paths = [Path(path) for path, _ in files]
    fields = measure(jobs, paths, device, args)
    print(table(fields), end="\n\n")
    save_figure(draw(fields, models, len(paths)), args.out)
    write_csv(args.out.with_suffix(".csv"), _COLUMNS, rows(fields))
    arrays = {field.model + ("" if field.weights == RANDOM else "_trained"): field.values for field in fields}
    np.savez(args.out.with_suffix(".npz"), **arrays)
    print(args.out, *(args.out.with_suffix(suffix) for suffix in (".csv", ".npz")), sep="\n")
    return files.status
