"""Class activation maps, and their picture.

Shapes: B batch, C channels, H W image, h w map of the layer, L = h*w tokens and class tokens.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from pytorch_grad_cam import EigenCAM, GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from analyze import image_files, inputs
from analyze.figures import check_png, save_figure
from analyze.impl.predict import ON_SHEET, class_names
from analyze.quick import take_quick_run
from ssm_models import VisionMamba
from ssm_models.layers.pos_embed import class_token_rows, split_rows
from ssm_models.printable import printable
from ssm_train.common.errors import UserError
from ssm_train.record.sheet import denormalise


class OrientedEigenCAM(EigenCAM):
    """A principal component has no sign: of the two the one with the larger extreme above zero, for the rest is cut."""

    def get_cam_image(self, image, layer, targets, activations, gradients, eigen_smooth=False) -> np.ndarray:
        """(B, h, w)"""
        cam = super().get_cam_image(image, layer, targets, activations, gradients, eigen_smooth)
        flat = cam.reshape(len(cam), -1)
        return cam * np.where(-flat.min(1) > flat.max(1), -1, 1)[:, None, None]


METHODS = {"gradcam": ("Grad-CAM", GradCAM), "eigencam": ("EigenCAM", OrientedEigenCAM)}
_SIDE, _BAR = 1.5, 0.7  # inches of a picture, of the colour bar


class Cam(NamedTuple):
    """What one method says of one image."""

    raw: np.ndarray  # (h, w), before negative numbers are set to 0
    overlay: np.ndarray  # (H, W), of the package: enlarged, from 0 to 1
    weights: np.ndarray  # (C,), Grad-CAM's; EigenCAM has none: (0,)


def default_layer(model: nn.Module) -> str:
    """The name of the module whose output is the last map: the last block of the last stage.

    Of Vim the norm in front of the last mixer. Behind that, the class depends on the class token alone, so that the
    patches have no gradient.
    """
    last = model.feature_info[-1]["module"]
    return f"{last}.norm" if isinstance(model, VisionMamba) else last


def to_maps(model: nn.Module, layer: nn.Module, image: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """What brings the output of a layer to (B, C, h, w): it is a map in the model's layout, of convolutions in theirs,
    or tokens (B, L, C), of which class tokens are left out. `image` is (H, W)."""
    channel_last = getattr(model, "output_fmt", "NCHW") == "NHWC" and not isinstance(layer, nn.Conv2d)

    def convert(x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise UserError(f"the layer gives a {type(x).__name__}, which is no map: choose another --layer")
        if x.dim() == 4:
            return x.permute(0, 3, 1, 2) if channel_last else x
        if x.dim() != 3 or not hasattr(model, "patch_embed") or not hasattr(model.patch_embed, "grid"):
            raise UserError(f"the layer gives {tuple(x.shape)}, which is no map: choose another --layer")
        grid = model.patch_embed.grid(*image)
        mode = "middle" if model.cls_mode == "random" else model.cls_mode  # where it is outside of training
        patches, _ = split_rows(x, class_token_rows(mode, math.prod(grid)))
        return patches.transpose(1, 2).unflatten(2, grid)

    return convert


def find_layer(model: nn.Module, name: str | None) -> nn.Module:
    """The module called `name`. UserError names some where there is none."""
    try:
        return model.get_submodule(name or default_layer(model))
    except AttributeError as error:
        near = ", ".join(info["module"] for info in model.feature_info)
        raise UserError(f"--layer {name} is no module of the model; for example {near}") from error


def compute(model: nn.Module, layer: nn.Module, image: Tensor, target: int, method: str) -> Cam:
    """`method` of METHODS on the logit `target` of an image (1, C, H, W).

    Grad-CAM: relu of sum_c weight_c activation_c, where weight_c is the mean over the map of d logit / d activation_c.
    EigenCAM: the activations' first principal component over the places of the map, which knows no class.
    UserError where that is zero everywhere.
    """
    cam = METHODS[method][1](model, [layer], to_maps(model, layer, tuple(image.shape[2:])))
    targets = [ClassifierOutputTarget(target)]
    try:
        # gradients of the image, so that the layer's output has some even in a frozen model
        overlay = cam(image.clone().requires_grad_(), targets)[0]
        seen = cam.activations_and_grads
        activations = seen.activations[0].numpy()
        gradients = seen.gradients[0].numpy() if seen.gradients else None
        raw = cam.get_cam_image(image, layer, targets, activations, gradients)[0]
        weights = (
            np.zeros(0) if method == "eigencam" else cam.get_cam_weights(image, layer, targets, None, gradients)[0]
        )
    finally:
        cam.activations_and_grads.release()
    if not raw.any():
        raise UserError(f"{METHODS[method][0]} is 0 everywhere: the class depends on no place of this --layer")
    return Cam(raw, overlay, weights)


class Seen(NamedTuple):
    """An image (C, H, W) as it is shown, from 0 to 1, the class that is looked for, and where that is seen."""

    image: Tensor
    target: int
    shares: Tensor
    caption: str
    cams: dict[str, Cam]


def look(
    model: nn.Module, name: str, classes: list[str], pixels: Tensor, target: int | None, layer: str | None, methods
) -> Seen:
    """What `methods` say of an image (C, H, W), prepared for the model called `name`, and class `target`, or the most
    probable one if None. `shares` are the probabilities of `classes`. Raises UserError."""
    batch = pixels[None].to(next(model.parameters()).device)
    with torch.no_grad():
        shares = model(batch)[0].float().softmax(-1)
    target = shares.argmax().item() if target is None else target
    cams = {method: compute(model, find_layer(model, layer), batch, target, method) for method in methods}
    caption = printable(f"{classes[target].split(',')[0]}  {shares[target]:.0%}")
    return Seen(denormalise(pixels, *image_files.statistics(name, len(pixels))), target, shares, caption, cams)


def sheet(seen: list[Seen], model: nn.Module, name: str, layer: str | None) -> Figure:
    """The first ON_SHEET of what was seen."""
    images, _, _, captions, cams = map(list, zip(*seen[:ON_SHEET], strict=True))
    return draw(images, cams, captions, f"{name}, {layer or default_layer(model)}")


def draw(images: list[Tensor], cams: list[dict[str, Cam]], captions: list[str], title: str) -> Figure:
    """A grid of cells: an image (C, H, W) from 0 to 1, and beside it the map of every method over it."""
    parts = 1 + len(cams[0])
    columns = _columns(len(images), parts)
    rows = -(-len(images) // columns)
    gap = 0.15
    size = (max(_SIDE * (parts + gap) * columns + _BAR, 4), (_SIDE + 0.25) * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    widths = {"width_ratios": ([1] * parts + [gap]) * columns}
    grid = figure.subplots(rows, columns * (parts + 1), squeeze=False, gridspec_kw=widths)
    for axes in grid.flat:
        axes.set_axis_off()
    cells = grid.reshape(rows * columns, parts + 1)[:, :parts]  # from left to right, then down
    for panels, image, found, caption in zip(cells, images, cams, captions, strict=False):
        shown = image.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
        panels[0].imshow(shown, interpolation="nearest")
        panels[0].set_title(caption, fontsize=7, loc="left", parse_math=False)
        pale = 0.5 + shown.mean(2) / 2  # so that it does not darken the colours
        for panel, (method, cam) in zip(panels[1:], found.items(), strict=True):
            panel.imshow(pale, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            overlay = panel.imshow(cam.overlay, cmap="inferno", alpha=0.6, vmin=0, vmax=1)
            panel.set_title(METHODS[method][0], fontsize=7, loc="right")
    bar = figure.colorbar(overlay, ax=grid, shrink=min(1, 2 / size[1]), aspect=15, pad=0.02)
    bar.set_label("relevance, from the least\nto the largest of a map", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def _columns(images: int, parts: int) -> int:
    """Cells side by side, so that the sheet becomes about as wide as high."""
    return min(images, max(1, round((images / parts) ** 0.5)))


def save(path: Path, names: list[str], cams: list[dict[str, Cam]], targets: list[int]) -> None:
    """npz: `images` names and `classes` (n,); per image i and method `{i}_{method}_` with `raw` (h, w), `overlay`
    (H, W) and, for Grad-CAM, `weights` (C,)."""
    content: dict[str, np.ndarray] = {"images": np.array(names), "classes": np.array(targets)}
    for number, found in enumerate(cams):
        for method, cam in found.items():
            content |= {f"{number}_{method}_{part}": value for part, value in cam._asdict().items() if value.size}
    np.savez_compressed(path, **content)


def find_class(asked: str | None, names: list[str]) -> int | None:
    """The number of a class given by name or number; None if none was given. Raises UserError."""
    if asked is None:
        return None
    if asked in names:
        return names.index(asked)
    if asked.isdecimal() and int(asked) < len(names):
        return int(asked)
    raise UserError(f"--class {asked} is neither the name of a class nor a number from 0 to {len(names) - 1}")


def command(args: argparse.Namespace) -> int:
    """The command; returns the exit status. Raises UserError."""
    check_png(args.out)
    take_quick_run(args, images=12)
    device = inputs.find_device(args.device)
    name = inputs.model_name(args.model, args.checkpoint)
    torch.manual_seed(0)  # for models without a checkpoint
    model = inputs.load_model(name, args.checkpoint, args.which, args.allow_nonfinite).to(device)
    classes = class_names(model.num_classes, args.checkpoint, args.classes)
    asked = find_class(args.target, classes)
    find_layer(model, args.layer)
    transform = inputs.evaluation_transform(name, args.checkpoint, args.size)
    decoder = image_files.image_decoder(args.checkpoint, args.range)
    if args.size is not None:
        inputs.check_image_size(model, name, (args.size, args.size), decoder.channels)
    files, images = image_files.given_or_photographs(args.images, decoder)
    names, seen = [], []
    for path, image in inputs.progress(images, "images", len(files)):
        names.append(path)
        seen.append(look(model, name, classes, transform(image), asked, args.layer, args.methods))
    save_figure(sheet(seen, model, name, args.layer), args.out)
    data = args.out.with_suffix(".npz")
    save(data, names, [found.cams for found in seen], [found.target for found in seen])
    print(args.out, data, sep="\n")
    return files.status
