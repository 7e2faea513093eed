"""What a run has reached: the best and the last validation results, and metrics.json made of them."""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode as CN

from ssm_models.printable import printable
from ssm_train.common.distributed import World
from ssm_train.common.errors import UserError
from ssm_train.common.fileio import to_json, write_atomic
from ssm_train.common.machine import versions
from ssm_train.step.evaluate import Accuracy
from ssm_train.step.model import count_parameters

Record = dict[str, float | int]  # epoch (from 1), top1, top5, loss, images

# weights -> names of their records; "best" and "best_ema" are the names of checkpoint links, too
_BEST = {"model": "best", "model_ema": "best_ema"}
_LAST = {"model": "last", "model_ema": "last_ema"}


class Results:
    """The records best, best_ema, last and last_ema of a run."""

    def __init__(self, records: dict[str, Record] | None = None) -> None:
        # a loss that was not finite is null in meta.json
        self.records: dict[str, Record] = {
            name: {key: math.nan if value is None else value for key, value in record.items()}
            for name, record in (records or {}).items()
        }

    def add(self, epoch: int, validated: dict[str, Accuracy]) -> None:
        """Enter the results of an epoch (from 1)."""
        for weights, accuracy in validated.items():
            record = {"epoch": epoch, **asdict(accuracy)}
            self.records[_LAST[weights]] = record
            best = self.records.get(_BEST[weights])
            if best is None or _rank(record) > _rank(best):
                self.records[_BEST[weights]] = record

    def forget_missing(self, epochs: Collection[int]) -> None:
        """Where the best checkpoint is not among `epochs` (but in the folder of another run), the last one is best."""
        for weights, record in self.latest().items():
            if self.records[_BEST[weights]]["epoch"] not in epochs:
                self.records[_BEST[weights]] = record

    def best_epochs(self) -> dict[str, int]:
        """The epochs of the links to the best checkpoints."""
        return {name: int(self.records[name]["epoch"]) for name in _BEST.values() if name in self.records}

    def latest(self) -> dict[str, Record]:
        """The records of the last epoch, of each kind of weights that it had."""
        records = {weights: self.records[name] for weights, name in _LAST.items() if name in self.records}
        newest = max((record["epoch"] for record in records.values()), default=0)
        return {weights: record for weights, record in records.items() if record["epoch"] == newest}

    def bests(self) -> dict[str, Record]:
        """The best record of each kind of weights."""
        return {weights: self.records[name] for weights, name in _BEST.items() if name in self.records}


def _rank(record: Mapping[str, float]) -> tuple[float, float]:
    """Higher top-1 is better; on small validation sets it often ties, then the lower loss decides; nan is no loss."""
    return record["top1"], -math.inf if math.isnan(record["loss"]) else -record["loss"]


def better_weights(records: Mapping[str, Record]) -> str:
    """Which of "model" and "model_ema" has the better record."""
    return max(records, key=lambda weights: _rank(records[weights]))


def summary(records: Mapping[str, Record]) -> str:
    """Validation results in words."""
    return ", ".join(
        f"{weights} top-1 {record['top1']:.2f}% top-5 {record['top5']:.2f}% loss {record['loss']:.4f}"
        for weights, record in records.items()
    )


def description(cfg: CN, world: World, network: nn.Module, amp: str) -> dict[str, Any]:
    """What was run, on what: the part of metrics.json that training and evaluation share."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
    return {
        "model": cfg.MODEL.NAME,
        "parameters": count_parameters(network),
        "device": device,
        "processes": world.size,
        "amp": amp,
        "versions": versions(),
    }


def origin(command: str, pretrained: Mapping[str, Any] | None) -> dict[str, Any]:
    """Where results come from: the command line, and the record of the weights it began with (`Loaded.record`)."""
    return {"command": command, "pretrained": pretrained}


def with_origin(text: str, command: str, pretrained: Mapping[str, Any] | None) -> str:
    """A config as text, with its origin before it: comments, so that the file remains one for --cfg."""
    lines = [f"command: {command}", f"weights: {'random' if pretrained is None else to_json(pretrained)}"]
    # a name may hold any character, also ones that end a line
    return "".join(f"# {printable(line)}\n" for line in lines) + text


def training_metrics(results: Results, common: dict[str, Any]) -> dict[str, Any]:
    """The content of metrics.json after training.

    top1 (percent), top5, loss and images are those of the best epoch of the plain or of the averaged weights, whichever
    reached the higher validation top-1: "weights" says which, "checkpoint" where. "results" holds all four records.
    """
    bests = results.bests()
    weights = better_weights(bests)
    return {
        "mode": "train",
        "weights": weights,
        "checkpoint": f"checkpoints/{_BEST[weights]}/{weights}.safetensors",
        **bests[weights],
        "results": results.records,
        **common,
    }


def evaluation_metrics(records: Mapping[str, Record], source: str, common: dict[str, Any]) -> dict[str, Any]:
    """The content of metrics.json after --eval of the file or folder `source`; the better of the weights gives top1."""
    weights = better_weights(records)
    return {"mode": "eval", "weights": weights, "checkpoint": source, **records[weights], "results": records, **common}


def write_metrics(folder: Path, metrics: dict[str, Any]) -> Path:
    """Write metrics.json in one step and return its path.

    An evaluation in the folder of a training run is entered there as "eval" and leaves the run's own numbers alone.
    """
    path = folder / "metrics.json"
    if metrics["mode"] == "eval":
        earlier = _read_metrics(path) if path.exists() else {}
        trained = earlier if earlier.get("mode") == "train" else metrics
        metrics = {**trained, "eval": metrics}
    write_atomic(path, to_json(metrics, indent=2) + "\n")
    return path


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        metrics = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}): move it away, or choose another --output") from error
    if not isinstance(metrics, dict):
        raise UserError(f"{path} holds a {type(metrics).__name__}: move it away, or choose another --output")
    return metrics
