"""Features of a data set's images, in files that a killed run continues. Shapes: B batch, C channels, n images."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode as CN

from analyze import inputs
from analyze.quick import digits, quick_run, say
from ssm_train.common.errors import UserError
from ssm_train.common.fileio import folder_lock, sync_folder, write_atomic, write_synced
from ssm_train.common.preemption import leave_signals_to_trainer
from ssm_train.config.defaults import check_config, default_config
from ssm_train.data.build import closed_at_exit, scan_split
from ssm_train.data.dataset import Batch, EvalImages, collate
from ssm_train.data.samplers import Key
from ssm_train.data.sources import ImageSource
from ssm_train.data.transforms import Transform

MANIFEST = "features.json"


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    """(B, 3 or 1, H, W) -> (B, C) fp32, pooled, before the classifier. UserError where the model does not pool."""
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    if features.dim() != 2:
        raise UserError(
            f"the model gives {tuple(features.shape)} before its classifier, but one row per image is wanted"
        )
    return features.float()


def shards_of(count: int, size: int) -> list[range]:
    """The images of each file."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def shard_path(folder: Path, split: str, number: int, total: int) -> Path:
    return folder / f"{split}-{number:05d}-of-{total:05d}.safetensors"


@torch.inference_mode()
def extract(
    model: nn.Module,
    source: ImageSource,
    transform: Transform,
    folder: Path,
    split: str,
    shard: int,
    batch: int,
    workers: int,
) -> Iterator[Path]:
    """Write the files of a split that are missing in `folder`; yields each when it is on the disk. `model` stands in
    evaluation mode on any device. Unreadable images are named on stderr and left out.

    A batch never crosses the end of a file, so its images, and with them every bit, do not depend on where a run began.
    """
    shards = shards_of(len(source), shard)
    missing = [number for number in range(len(shards)) if not shard_path(folder, split, number, len(shards)).exists()]
    batches = [
        [Key(0, index) for index in shards[number][start : start + batch]]
        for number in missing
        for start in range(0, len(shards[number]), batch)
    ]
    loader = DataLoader(
        EvalImages(source, transform),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=leave_signals_to_trainer,
        persistent_workers=workers > 0,
    )
    loaded = iter(closed_at_exit(loader))
    for number in missing:
        rows = [_rows(model, next(loaded)) for _ in range(0, len(shards[number]), batch)]
        tensors = {key: torch.cat([row[key] for row in rows]) for key in ("features", "targets", "indices")}
        path = shard_path(folder, split, number, len(shards))
        _write(path, save(tensors))
        yield path


def _rows(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    for bad in batch.bad:
        print(f"unreadable image, left out: {bad.path}: {bad.reason}", file=sys.stderr)
    device = next(model.parameters()).device
    readable = len(batch.targets) > 0
    features = features_of(model, batch.images.to(device)).cpu() if readable else torch.empty(0, model.num_features)
    return {"features": features, "targets": batch.targets, "indices": torch.tensor([key.index for key in batch.keys])}


def _write(path: Path, data: bytes) -> None:
    aside = path.with_name(f".tmp-{path.name}")
    write_synced(aside, data)
    os.replace(aside, path)
    sync_folder(path.parent)


def check_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest of a folder. One that is there may tell of another split too, but where it speaks of the same
    as `content` it must say the same, else UserError."""
    there = read_manifest(folder) if (folder / MANIFEST).exists() else {}
    for key, value in content.items():
        if there.get(key, value) != value:
            raise UserError(f"{folder} was made with another {key}, {there[key]}, now {value}: choose another --out")
    write_atomic(folder / MANIFEST, json.dumps(there | content, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What OUT/features.json says. UserError where there is none."""
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no readable {MANIFEST}: make it with analyze/features.py ({error})") from error


def read_features(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Features (n, C) and targets (n,) of a split. UserError where files are missing."""
    manifest = read_manifest(folder)
    if split not in manifest:
        raise UserError(f"{folder} holds no features of {split!r}: run analyze/features.py with --splits {split}")
    total = len(shards_of(manifest[split]["images"], manifest["images per file"]))
    paths = [shard_path(folder, split, number, total) for number in range(total)]
    absent = [path.name for path in paths if not path.exists()]
    if absent:
        raise UserError(f"{folder} lacks {absent[0]} and {len(absent) - 1} more: run its analyze/features.py again")
    parts = [load_file(path) for path in paths]
    return torch.cat([part["features"] for part in parts]), torch.cat([part["targets"] for part in parts])


def _data_config(
    checkpoint: Path | None, data_path: str | None, dataset: str | None, asked_range: list[float] | None
) -> CN:
    """Where the images are: of the run that wrote `checkpoint`, or as the user says, who may mean other classes."""
    cfg = (inputs.run_config(checkpoint) or default_config()).clone()
    cfg.defrost()
    cfg.DATA.DATASET = dataset or cfg.DATA.DATASET
    if data_path is not None:
        cfg.DATA.DATA_PATH, cfg.MODEL.NUM_CLASSES = data_path, None
    if asked_range is not None:
        cfg.DATA.RANGE = asked_range
    check_config(cfg)
    return cfg


def _digest(source: ImageSource) -> dict[str, Any]:
    """Tells one list of images from another."""
    names = hashlib.sha256()
    for index in range(len(source)):
        names.update(f"{Path(source.name(index)).name} {source.targets[index]}\n".encode())
    return {"images": len(source), "sha256 of names and labels": names.hexdigest()}


def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def command(args: argparse.Namespace) -> None:
    """The command. Raises UserError."""
    for option, least in (("batch_size", 1), ("shard", 1), ("workers", 0)):
        if getattr(args, option) < least:
            raise UserError(f"--{option.replace('_', '-')} is {getattr(args, option)}, but at least {least} is needed")
    if args.model is None and args.checkpoint is None:
        args.checkpoint, args.data_path = quick_run(), args.data_path or str(digits())
        say(f"taking --checkpoint {args.checkpoint} --data-path {args.data_path}")
    device = inputs.find_device(args.device)
    name = inputs.model_name(args.model, args.checkpoint)
    model = inputs.load_model(name, args.checkpoint, args.which, args.allow_nonfinite).to(device)
    transform = inputs.evaluation_transform(name, args.checkpoint, args.size)
    cfg = _data_config(args.checkpoint, args.data_path, args.dataset, args.range)
    sources = {}
    for split in args.splits:
        sources[split] = scan_split(cfg, split)
        cfg.MODEL.NUM_CLASSES = len(sources[split].classes)
    inputs.make_folder(args.out)
    with folder_lock(args.out):
        content = {
            "model": name,
            "sha256 of weights": _weights_digest(model),
            "transform": str(transform),
            "range": list(cfg.DATA.RANGE),
            "images per file": args.shard,
            "batch": args.batch_size,
            "classes": next(iter(sources.values())).classes,
            "device": device.type,
        }
        content |= {split: _digest(source) for split, source in sources.items()}
        check_manifest(args.out, content)
        for split, source in sources.items():
            files = extract(model, source, transform, args.out, split, args.shard, args.batch_size, args.workers)
            total = len(shards_of(len(source), args.shard))
            for path in inputs.progress(files, f"{split}: files", total):
                print(path)
    print(args.out / MANIFEST)
