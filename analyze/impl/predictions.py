"""Sheets of pictures with captions, and the predictions of a run on its validation images."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from yacs.config import CfgNode as CN

from analyze.figures import check_png, save_figure
from analyze.inputs import progress
from analyze.quick import quick_run, say
from ssm_models.printable import printable
from ssm_train.common.errors import UserError
from ssm_train.config.load import parse_config
from ssm_train.data.build import scan_split
from ssm_train.data.dataset import BadImage, load_image
from ssm_train.data.transforms import STATISTICS, eval_transform
from ssm_train.record.checkpoint import read_checkpoint
from ssm_train.step.model import build_model

_COLUMNS = 8
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


class Tile(NamedTuple):
    """A picture of a sheet."""

    image: torch.Tensor  # (3, H, W), or (1, H, W) in grey, from 0 to 1
    caption: str
    wrong: bool = False  # framed and written in red
    note: str = ""  # below the picture


def draw_sheet(tiles: list[Tile], title: str, columns: int = _COLUMNS) -> Figure:
    """The pictures in rows of `columns`, captions above them."""
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    lines = max(tile.caption.count("\n") + 1 for tile in tiles)
    height = 1.35 + 0.13 * lines + (0.15 if any(tile.note for tile in tiles) else 0)
    figure = Figure(figsize=(1.35 * max(columns, 3), height * rows + 0.5), layout="constrained")
    for number, tile in enumerate(tiles):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.imshow(tile.image.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        # names of folders and files are shown as they are, not as formulas
        caption = "\n".join(map(printable, tile.caption.split("\n")))
        axes.set_title(caption, fontsize=8, color="red" if tile.wrong else "black", parse_math=False)
        axes.set_xlabel(printable(tile.note), fontsize=7, color="dimgray", labelpad=2, parse_math=False)
        for spine in axes.spines.values():
            spine.set(color="red" if tile.wrong else "silver", linewidth=3 if tile.wrong else 1)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def denormalise(image: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(C, H, W) as a model sees it -> from 0 to 1."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return image * std + mean


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
