"""The predictions of a run on its validation images, as a sheet."""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from yacs.config import CfgNode as CN

from analyze.figures import check_png, save_figure
from analyze.inputs import progress
from analyze.quick import quick_run, say
from ssm_train.common.errors import UserError
from ssm_train.config.load import parse_config
from ssm_train.data.build import scan_split
from ssm_train.data.dataset import BadImage, load_image
from ssm_train.data.transforms import STATISTICS, eval_transform
from ssm_train.record.checkpoint import read_checkpoint
from ssm_train.record.sheet import Tile, denormalise, draw_sheet
from ssm_train.step.model import build_model

_BATCH = 32


class Prediction(NamedTuple):
    image: torch.Tensor  # (C, S, S), as the model saw it
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
    read = progress(chosen, "images")
    loaded = [(load_image(source, index, transform), int(source.targets[index])) for index in read]
    samples = [(image, target) for image, target in loaded if not isinstance(image, BadImage)]
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
    tiles = []
    for prediction in predictions:
        wrong = prediction.predicted != prediction.true
        caption = f"{prediction.predicted}  {prediction.confidence:.0%}"
        caption += f"\nis {prediction.true}" if wrong else ""
        pixels = denormalise(prediction.image, *STATISTICS[len(prediction.image)])
        tiles.append(Tile(pixels, caption, wrong))
    wrong = sum(tile.wrong for tile in tiles)
    return draw_sheet(tiles, f"{len(tiles) - wrong} of {len(tiles)} validation images right")


def best_weights(run: Path) -> tuple[Path, str]:
    """The weights file that metrics.json of a finished run names, and the config text beside it. Raises UserError."""
    try:
        name = json.loads((run / "metrics.json").read_text())["checkpoint"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{run} holds no metrics.json of a finished training run; give its run folder") from error
    weights = run / name
    return weights, read_checkpoint(weights.parent).meta["config"]


def command(args: argparse.Namespace) -> None:
    """The command. Raises UserError."""
    if args.num < 1:
        raise UserError(f"--num is {args.num}, but it must be at least 1")
    if args.checkpoint is None:
        args.checkpoint = quick_run()
        say(f"taking --checkpoint {args.checkpoint}")
    out = args.out or args.checkpoint / "predictions.png"
    check_png(out)
    weights, text = best_weights(args.checkpoint)
    cfg = parse_config(text).clone()
    cfg.defrost()
    cfg.DATA.DATA_PATH = args.data_path or cfg.DATA.DATA_PATH
    save_figure(draw(predict(cfg, weights, args.num, torch.device(args.device))), out)
    print(out)
