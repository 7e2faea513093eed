"""The hub's folder of a run or of published weights: see analyze/hub.py."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from timm.data import resolve_data_config
from timm.models import save_for_hf
from torch import nn
from yacs.config import CfgNode as CN

from analyze import inputs
from analyze.impl.hub_card import Card, Result, card_text
from analyze.impl.predict import class_names
from analyze.quick import quick_run, say
from ssm_models.model_card import model_card, registered_models
from ssm_models.printable import printable
from ssm_models.weights import Entry, is_path
from ssm_train.common.errors import UserError
from ssm_train.common.fileio import write_synced
from ssm_train.common.new_folder import MadeMeanwhile, new_folder
from ssm_train.config.defaults import channels
from ssm_train.data.transforms import STATISTICS, eval_transform
from ssm_train.record.checkpoint import META, MODEL_EMA, Checkpoint, best_or_itself, read_checkpoint
from ssm_train.step.pretrained import published

_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def preprocessing(cfg: CN) -> dict[str, Any]:
    """timm's description of `eval_transform` (cfg): what `create_transform` makes the same transform of."""
    size, (mean, std) = cfg.DATA.IMG_SIZE, STATISTICS[channels(cfg)]
    whole = not isinstance(eval_transform(cfg).transforms[0].size, int)  # both sides are given
    return {
        "input_size": (channels(cfg), size, size),
        "interpolation": cfg.DATA.INTERPOLATION,
        "mean": mean,
        "std": std,
        "crop_pct": 1.0 if whole else cfg.DATA.CROP_RATIO,
        "crop_mode": "squash" if whole else "center",
    }


def result_of_run(checkpoint: Checkpoint, which: str, cfg: CN) -> Result | None:
    """The validation of the weights `which` of a checkpoint; None where it lies between two validations."""
    kind = "_ema" if checkpoint.file_of(which).name == MODEL_EMA else ""
    epoch, update = checkpoint.position
    records = (checkpoint.meta["results"].get(f"{name}{kind}") for name in ("best", "last"))
    record = next((record for record in records if record and record["epoch"] == epoch and not update), None)
    if record is None:
        return None
    data = printable(Path(cfg.DATA.DATA_PATH).name).replace("|", "-") or cfg.DATA.DATASET
    form = "imagefolder" if cfg.DATA.DATASET == "folder" else cfg.DATA.DATASET
    metrics = {"top1": record["top1"], "top5": record["top5"]}
    return Result(data, form, metrics, f"{record['images']} validation images, measured in training")


def result_of_entry(entry: Entry) -> Result:
    """What the authors state."""
    return Result(
        "ImageNet-1k", "imagenet-1k", entry.metrics, "published by the authors, not measured here", entry.source
    )


def describe(args: argparse.Namespace, name: str) -> tuple[Card, dict[str, Any]]:
    """What the card says beside the model itself, and how images are prepared: `preprocessing`."""
    title = args.repo.rpartition("/")[2] if args.repo else args.out.resolve().name
    card = Card(title, name, args.repo or "", licence=args.license or "")
    if not is_path(args.checkpoint):
        entry = published(args.checkpoint, "--checkpoint")
        if args.license:
            raise UserError(f"--license {args.license}: the weights {entry.name} have that of their authors")
        made = f"`{entry.name}`, the file [{entry.filename}]({entry.url}) of the authors"
        result = result_of_entry(entry) if args.which in ("auto", entry.entry) else None
        return card._replace(result=result, licence=(entry.licence or "").lower(), made=made), {}
    folder = best_or_itself(args.checkpoint)
    if not (folder / META).is_file():
        return card._replace(made=f"read from `{printable(args.checkpoint.name)}`"), {}
    checkpoint, cfg = read_checkpoint(folder), inputs.run_config(args.checkpoint)
    averaged = " (averaged weights)" * (checkpoint.file_of(args.which).name == MODEL_EMA)
    began = checkpoint.meta["pretrained"]
    made = f"trained with this library, {checkpoint.position}{averaged}"
    made += f", from `{printable(Path(began['name']).name)}`" if began else ", from random weights"
    return card._replace(result=result_of_run(checkpoint, args.which, cfg), made=made), preprocessing(cfg)


def save_model(model: nn.Module, folder: Path, labels: list[str], data_config: dict[str, Any]) -> None:
    """config.json and model.safetensors, as timm and transformers read them."""
    save_for_hf(model, folder, {"label_names": labels}, safe_serialization=True, data_config=data_config)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    # timm writes the number of classes also among the arguments of the model: transformers would give it twice
    del config["model_args"]["num_classes"]
    path.write_text(json.dumps(config, indent=2) + "\n")


def command(args: argparse.Namespace) -> None:
    """The command. Raises UserError."""
    if args.model is None and args.checkpoint is None:
        args.checkpoint = quick_run()
        say(f"taking --checkpoint {args.checkpoint}")
    if args.checkpoint is None:
        raise UserError(f"--model {args.model} alone has random weights: give --checkpoint as well")
    if args.repo and not _REPO.fullmatch(args.repo):
        raise UserError(f"--repo {args.repo} is not of the form USER/NAME")
    _check_new(args.out)
    name = inputs.model_name(args.model, args.checkpoint)
    if name not in registered_models():
        raise UserError(f"{name} is no model of this repository; timm.models.push_to_hf_hub publishes timm's own")
    card, data_config = describe(args, name)
    model = inputs.load_model(name, args.checkpoint, args.which, args.allow_nonfinite)
    labels = class_names(model.num_classes, args.checkpoint, args.classes)
    settings = resolve_data_config(data_config, pretrained_cfg=model.pretrained_cfg)
    cost = model_card(model, tuple(settings["input_size"]))
    text = card_text(card, type(model), cost, settings, len(labels))
    try:
        with new_folder(args.out) as folder:
            save_model(model, folder, labels, data_config)
            write_synced(folder / "README.md", text.encode())
    except MadeMeanwhile as error:
        raise UserError(f"--out {args.out} was made by another process meanwhile: choose another folder") from error
    print(args.out)


def _check_new(out: Path) -> None:
    """UserError for what is not a new or empty folder in a place that can be written."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise UserError(f"--out {out} exists and is not an empty folder: choose another one")
    inputs.check_writable(out)
