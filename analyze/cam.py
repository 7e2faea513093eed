"""Where a model looks for a class: Grad-CAM and EigenCAM over images.

python analyze/cam.py --checkpoint runs/quickstart --images FILE_OR_FOLDER ... [--class 3] [--layer layers.1.blocks]
    [--methods gradcam eigencam] [--out cam.png]

Grad-CAM: Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391; EigenCAM: Muhammad & Yeasin 2020,
https://arxiv.org/abs/2008.00299; both as in the package pytorch-grad-cam. Writes overlays (PNG) and, under the same
name, the maps and Grad-CAM's channel weights (npz; its keys are in `save`).

Shapes: B batch, C channels, H W image, h w map of the layer, L = h*w tokens and class tokens.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from pytorch_grad_cam import EigenCAM, GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from analyze import image_files, inputs
from analyze.figures import check_png, save_figure
from analyze.predict import class_names
from ssm_models import VisionMamba
from ssm_models.layers.pos_embed import class_token_rows, split_rows
from ssm_train.common.command import run
from ssm_train.common.errors import UserError


class OrientedEigenCAM(EigenCAM):
    """A principal component has no sign: of the two the one with the larger extreme above zero, for the rest is cut."""

    def get_cam_image(self, image, layer, targets, activations, gradients, eigen_smooth=False) -> np.ndarray:
        """(B, h, w)"""
        cam = super().get_cam_image(image, layer, targets, activations, gradients, eigen_smooth)
        flat = cam.reshape(len(cam), -1)
        return cam * np.where(-flat.min(1) > flat.max(1), -1, 1)[:, None, None]


METHODS = {"gradcam": ("Grad-CAM", GradCAM), "eigencam": ("EigenCAM", OrientedEigenCAM)}
_MOST = 16  # images of a sheet


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


def draw(images: list[Image.Image], cams: list[dict[str, Cam]], captions: list[str], title: str) -> Figure:
    """A row per image: itself, then the map of every method over it."""
    rows, columns = len(images), 1 + len(cams[0])
    shapes = [image.height / image.width for image in images]
    figure = Figure(figsize=(2.2 * columns + 0.7, 2.05 * sum(shapes) + 0.28 * rows + 0.35), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"height_ratios": shapes})
    for axes_of_row, image, found, caption in zip(grid, images, cams, captions, strict=True):
        for axes in axes_of_row:
            pale = image.convert("L").point(lambda value: 128 + value // 2)  # so that it does not darken the colours
            axes.imshow(
                image if axes is axes_of_row[0] else pale, cmap="gray", vmin=0, vmax=255, interpolation="nearest"
            )
            axes.set(xticks=[], yticks=[])
        axes_of_row[0].set_title(caption, fontsize=8)
        for axes, (method, cam) in zip(axes_of_row[1:], found.items(), strict=True):
            axes.set_title(METHODS[method][0], fontsize=8)
            extent = (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
            shown = axes.imshow(cam.overlay, cmap="inferno", alpha=0.6, extent=extent, vmin=0, vmax=1)
    bar = figure.colorbar(shown, ax=grid, shrink=min(1, 2 / sum(shapes)), aspect=15, pad=0.02)
    bar.set_label("relevance, from the least to the largest of a map", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    return figure


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


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="analyze/cam.py", description=__doc__.partition("\n")[0])
    inputs.add_model_arguments(parser)
    parser.add_argument(
        "--images", type=Path, nargs="+", default=[], help=f"files or folders, the first {_MOST} (two photographs)"
    )
    parser.add_argument("--class", dest="target", metavar="CLASS", help="its name or number (the predicted one)")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one per line")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--layer", metavar="NAME", help="whose output to look at (the last block of the last stage)")
    parser.add_argument("--size", type=int, nargs="+", metavar="H [W]", help="for the model (the run's or the model's)")
    parser.add_argument("--out", type=Path, default=Path("cam.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--device", default="", help="cuda or cpu; cuda where there is one")
    image_files.add_range_argument(parser)
    args = parser.parse_args(argv)

    def command() -> int:
        check_png(args.out)
        device = inputs.find_device(args.device)
        name = inputs.model_name(args.model, args.checkpoint)
        model = inputs.load_model(name, args.checkpoint, args.which, args.allow_nonfinite).to(device)
        classes = class_names(model.num_classes, args.checkpoint, args.classes)
        asked = find_class(args.target, classes)
        layer = find_layer(model, args.layer)
        size = inputs.image_size(args.size, name, args.checkpoint)
        decoder = image_files.image_decoder(args.checkpoint, args.range)
        inputs.check_image_size(model, name, size, decoder.channels)
        files = image_files.Readable(image_files.find_images(args.images)[:_MOST], decoder)
        images = dict(files) or image_files.sample_images(decoder)
        cams, targets, captions = [], [], []
        for path, image in inputs.progress(images.items(), "images", len(images)):
            pixels = image_files.to_tensor(image, name, size).to(device)
            with torch.no_grad():
                shares = model(pixels)[0].softmax(-1)
            target = shares.argmax().item() if asked is None else asked
            targets.append(target)
            captions.append(f"{Path(path).name}: {classes[target].split(',')[0]}  {shares[target]:.0%}")
            cams.append({method: compute(model, layer, pixels, target, method) for method in args.methods})
        figure = draw(list(images.values()), cams, captions, f"{name}, {args.layer or default_layer(model)}")
        save_figure(figure, args.out)
        data = args.out.with_suffix(".npz")
        save(data, list(images), cams, targets)
        print(args.out, data, sep="\n")
        return files.status

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
