"""A sheet of validation images with the predicted and the true class; wrong predictions are framed in red.

python analyze/predictions.py --run runs/quickstart [--data-path FOLDER] [--count 48] [--out predictions.png]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from yacs.config import CfgNode as CN

from classification.checkpoint import read_checkpoint
from classification.config import parse_config
from classification.data.build import scan_split
from classification.data.dataset import BadImage, load_image
from classification.data.transforms import eval_transform
from classification.errors import UserError
from classification.model import build_model

_COLUMNS = 8
_BATCH = 32


class Prediction(NamedTuple):
    image: torch.Tensor  # (3, S, S), as the model saw it
    predicted: str
    true: str
    confidence: float  # probability of the predicted class


@torch.inference_mode()
def predict(cfg: CN, weights: Path, count: int, device: torch.device) -> list[Prediction]:
    """Classify `count` readable validation images, evenly spread over the classes. Raises UserError."""
    source = scan_split(cfg, "val")
    count = min(count, len(source))
    transform = eval_transform(cfg)
    chosen = [number * len(source) // count for number in range(count)]
    loaded = [(load_image(source, index), int(source.targets[index])) for index in chosen]
    samples = [(transform(image), target) for image, target in loaded if not isinstance(image, BadImage)]
    if not samples:
        raise UserError(f"none of the {count} chosen images in {source.root} is readable")
    model = build_model(cfg)
    model.load_state_dict(load_file(weights))
    model.to(device).eval()
    images = torch.stack([image for image, _ in samples])
    logits = torch.cat([model(part.to(device)).float().cpu() for part in images.split(_BATCH)])
    confidences, classes = logits.softmax(-1).max(-1)
    names = source.classes
    return [
        Prediction(image, names[predicted], names[target], confidence)
        for (image, target), predicted, confidence in zip(samples, classes.tolist(), confidences.tolist(), strict=True)
    ]


def draw(predictions: list[Prediction]) -> Figure:
    """The sheet: one tile per image, "predicted confidence" above it and the truth too where it differs."""
    rows = -(-len(predictions) // _COLUMNS)
    figure = Figure(figsize=(1.35 * _COLUMNS, 1.6 * rows + 0.5), layout="constrained")
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    for number, prediction in enumerate(predictions):
        axes = figure.add_subplot(rows, _COLUMNS, number + 1)
        axes.imshow((prediction.image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        right = prediction.predicted == prediction.true
        title = f"{prediction.predicted}  {prediction.confidence:.0%}"
        axes.set_title(
            title if right else f"{title}\nis {prediction.true}", fontsize=8, color="black" if right else "red"
        )
        for spine in axes.spines.values():
            spine.set(color="silver" if right else "red", linewidth=1 if right else 3)
    wrong = sum(prediction.predicted != prediction.true for prediction in predictions)
    figure.suptitle(f"{len(predictions) - wrong} of {len(predictions)} validation images right", fontsize=10)
    return figure


def best_weights(run: Path) -> tuple[Path, str]:
    """The weights file that metrics.json of a finished run names, and the config text beside it. Raises UserError."""
    try:
        name = json.loads((run / "metrics.json").read_text())["checkpoint"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{run} holds no metrics.json of a finished training run; give its run folder") from error
    weights = run / name
    return weights, read_checkpoint(weights.parent).meta["config"]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="analyze/predictions.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="a finished training run; its best weights are used")
    parser.add_argument("--data-path", help="holds val/<class>/*; by default what the run was trained on")
    parser.add_argument("--count", type=int, default=48, help="number of images")
    parser.add_argument("--out", type=Path, help="PNG to write (predictions.png in the run folder)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    try:
        if args.count < 1:
            raise UserError(f"--count is {args.count}, but it must be at least 1")
        weights, text = best_weights(args.run)
        cfg = parse_config(text).clone()
        cfg.defrost()
        cfg.DATA.DATA_PATH = args.data_path or cfg.DATA.DATA_PATH
        figure = draw(predict(cfg, weights, args.count, torch.device(args.device)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = args.out or args.run / "predictions.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
