"""Accuracy, throughput and memory of trained models against the resolution of the images."""

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from matplotlib.figure import Figure
from torch import nn
from torchvision.transforms import CenterCrop
from yacs.config import CfgNode as CN

from analyze import logs
from analyze.figures import check_png, colors_of, log_y_axis, save_figure, size_axis
from analyze.inputs import (
    at_least,
    device_name,
    find_device,
    load_model,
    progress_bar,
    run_config,
)
from analyze.quick import digits, quick_run, say
from analyze.tables import write_csv
from analyze.throughput import Result, Variant, failure, measure
from ssm_train.common.distributed import World
from ssm_train.common.errors import UserError
from ssm_train.common.preemption import StopRequest
from ssm_train.config.defaults import default_config
from ssm_train.data.build import close_workers, eval_loader, scan_split
from ssm_train.data.dataset import BadImages
from ssm_train.data.transforms import eval_transform
from ssm_train.record.curves import Series
from ssm_train.step.evaluate import Accuracy, validate

COLUMNS = (
    "model",
    "source",
    "trained_size",
    "size",
    "images",
    "top1",
    "top5",
    "loss",
    "images_per_second",
    "slowest",
    "fastest",
    "peak_mib",
    "batch",
    "precision",
    "device",
    "status",
)
Row = dict[str, Any]


class Trained(NamedTuple):
    """A model with its weights, what the plot calls it, and the config of its validation."""

    label: str
    source: str
    model: nn.Module
    cfg: CN


# ---- what to evaluate ------------------------------------------------------------------------------------------------


def load(name: str | None, checkpoint: Path, args: argparse.Namespace) -> Trained:
    """The model called `name`, or the one that a checkpoint of ours names. Raises UserError."""
    cfg = run_config(checkpoint)
    if cfg is None and name is None:
        raise UserError(f"--checkpoint {checkpoint} is no run of ours: give --model, a name for every checkpoint")
    name = name or cfg.MODEL.NAME
    model = load_model(name, checkpoint, args.which, args.allow_nonfinite)
    cfg = _authors_config(name) if cfg is None else cfg.clone()
    cfg.defrost()
    if not any(isinstance(step, CenterCrop) for step in eval_transform(cfg).transforms):
        cfg.DATA.CROP_RATIO = 1.0  # at the other sizes, too
    cfg.DATA.DATA_PATH, cfg.DATA.DATASET = args.data_path or "", args.dataset
    cfg.DATA.BATCH_SIZE, cfg.DATA.NUM_WORKERS, cfg.DATA.CACHE_MODE = args.batch, args.workers, "no"
    cfg.MODEL.NUM_CLASSES = model.num_classes
    return Trained(name, str(checkpoint), model, cfg)


def _authors_config(name: str) -> CN:
    """The validation that timm's registry tells of a model."""
    cfg, settings = default_config(), timm.get_pretrained_cfg(name)
    cfg.DATA.IMG_SIZE, cfg.DATA.CROP_RATIO = settings.input_size[-1], float(settings.crop_pct)
    cfg.DATA.INTERPOLATION = settings.interpolation
    return cfg


def accuracy(trained: Trained, size: int, precision: str, device: torch.device) -> Accuracy:
    """Of the model on all validation images at size x size pixels. Raises UserError for data that is not there."""
    cfg = trained.cfg.clone()
    cfg.DATA.IMG_SIZE = size
    world = World(rank=0, size=1, device=device)
    source = scan_split(cfg, "val")
    loader = eval_loader(cfg, source, world)
    amp = "off" if precision == "fp32" else precision
    try:
        bad = BadImages(world, len(source), None)
        return validate({"model": trained.model}, loader, amp, world, bad, StopRequest())["model"]
    finally:
        close_workers(loader)


def evaluate(
    models: Sequence[Trained],
    sizes: Sequence[int],
    precision: str,
    device: torch.device,
    speeds: Sequence[Result],
    advance: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Rows of every model at every size; `speeds` are the results of `variants` of the same."""
    rows = []
    for (trained, size), speed in zip(itertools.product(models, sizes), speeds, strict=True):
        row = _row(trained.label, trained.source, size) | {"trained_size": trained.cfg.DATA.IMG_SIZE}
        row |= {"batch": speed.variant.batch, "precision": precision, "device": device_name(device)}

        def enter(trained: Trained = trained, size: int = size, row: Row = row) -> None:
            found = accuracy(trained, size, precision, device)
            row.update(images=found.images, top1=found.top1, top5=found.top5, loss=found.loss)

        row["status"] = failure(enter, device) or speed.status
        if speed.images_per_second is not None:
            row["images_per_second"], row["peak_mib"] = speed.images_per_second, speed.peak_mib
            row["slowest"], row["fastest"] = min(speed.samples), max(speed.samples)
        rows.append(row)
        advance()
    return rows


def variants(models: Sequence[Trained], sizes: Sequence[int], batch: int, precision: str) -> list[Variant]:
    """What is to be measured; a model is called by its number, as several may have one name."""
    return [
        Variant(str(number), size, batch, precision=precision)
        for number, size in itertools.product(range(len(models)), sizes)
    ]


def _row(model: str, source: str, size: int) -> Row:
    return dict.fromkeys(COLUMNS) | {"model": model, "source": source, "size": size}


def read_logs(entry: str) -> list[Row]:
    """The rows of a --logs argument: SIZE=FOLDER; SIZE=FILE, an evaluation in another trainer's text; or FILE, what
    VMamba's analyze/scaleup.py printed."""
    size, _, place = entry.rpartition("=")
    if not Path(place).is_file():
        return [read_log(entry)]
    log = logs.read_log(Path(place))
    wanted = "evaluation" if size else "pixel"
    if log.unit != wanted or (size and not size.isdecimal()):
        raise UserError(f"--logs {entry} must be SIZE=FOLDER, SIZE=FILE of an evaluation, or FILE of several sizes")
    top1, top5 = (log.series.get(f"val/{key}", Series([], [])) for key in ("top1", "top5"))
    known = dict(zip(top5.x, top5.y, strict=True))
    points = list(zip(top1.x, top1.y, strict=True))
    return [
        _row(log.name, place, int(size or x)) | {"top1": y, "top5": known.get(x), "status": "ok"}
        for x, y in (points[-1:] if size else points)
    ]


def read_log(entry: str) -> Row:
    """The row of SIZE=FOLDER, from the folder's metrics.json: its evaluation, or else its training's best."""
    text, _, folder = entry.partition("=")
    if not text.isdecimal() or int(text) < 1 or not folder:
        raise UserError(f"--logs {entry} must be SIZE=FOLDER, e.g. 384=runs/eval384")
    path = Path(folder) / "metrics.json"
    try:
        metrics = json.loads(path.read_text())
        metrics = metrics.get("eval", metrics)
        numbers = {key: metrics[key] for key in ("images", "top1", "top5", "loss")}
        return _row(metrics["model"], folder, int(text)) | numbers | {"status": "ok"}
    except OSError as error:
        raise UserError(f"--logs {entry}: cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"--logs {entry}: {path} holds no accuracies of classification/main.py ({error!r})") from error


# ---- picture ---------------------------------------------------------------------------------------------------------

_PANELS = {"top1": "top-1 accuracy (%)", "images_per_second": "inference (images/s)", "peak_mib": "peak memory (MiB)"}


def draw(rows: Sequence[Row]) -> Figure:
    """A panel for each of accuracy, throughput and memory that there is, over the size; a colour per model, a ring
    around the size of its training."""
    panels = [key for key in _PANELS if any(row[key] is not None for row in rows)] or ["top1"]
    figure = Figure(figsize=(0.5 + 4.2 * len(panels), 4.4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    sources: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        # an evaluation of the past stands alone in its folder: those of one model are its curve
        sources.setdefault((row["model"], row["source"] if row["device"] else "logs"), []).append(row)
    names = [model for model, _ in sources]
    for axes, key in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for (model, source), color in colors_of(sources).items():
            shown = sorted((row for row in sources[model, source] if row[key] is not None), key=lambda row: row["size"])
            label = model if names.count(model) == 1 else f"{model}, {source}"
            x, y = [row["size"] for row in shown], [row[key] for row in shown]
            spread = None
            if key == "images_per_second":
                low = [row[key] - row["slowest"] for row in shown]
                spread = (low, [row["fastest"] - row[key] for row in shown])
            axes.errorbar(x, y, yerr=spread, marker="o", markersize=4, capsize=2, color=color, label=label)
            ring = [(row["size"], row[key]) for row in shown if row["size"] == row["trained_size"]]
            axes.plot(*zip(*ring, strict=True) if ring else ([], []), "o", markersize=11, mfc="none", color=color)
        size_axis(axes, sorted({row["size"] for row in rows}))
        axes.set_ylabel(_PANELS[key])
        if key != "top1":
            log_y_axis(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    ringed = " (ring: size of the training)" if any(row["trained_size"] for row in rows) else ""
    title = f"{rows[0]['device']}, batch {rows[0]['batch']}, {rows[0]['precision']}" if rows[0]["device"] else None
    figure.suptitle(title, fontsize="medium")
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small", title=f"model{ringed}")
    return figure


# ---- command ---------------------------------------------------------------------------------------------------------


def _measured(args: argparse.Namespace, device: torch.device) -> list[Row]:
    names = args.model or [None] * len(args.checkpoint)
    if len(names) != len(args.checkpoint):
        raise UserError(f"--model: {len(names)} for {len(args.checkpoint)} --checkpoint, but each needs its own")
    models = [load(name, path, args) for name, path in zip(names, args.checkpoint, strict=True)]
    for trained in models:
        scan_split(trained.cfg, "val")  # data that is not there is no matter of the size
        trained.model.to(device)
    asked = variants(models, args.size, args.batch, args.precision)
    with progress_bar() as progress:
        timing = progress.add_task("throughput", total=len(asked) * (1 + args.rounds))
        speeds = measure(
            asked,
            lambda variant: models[int(variant.model)].model,
            device,
            rounds=args.rounds,
            seconds=args.seconds,
            changed=lambda results: progress.update(
                timing, completed=sum(result.turns_over(args.rounds) for result in results)
            ),
        )
        rating = progress.add_task("accuracy", total=len(asked))
        return evaluate(models, args.size, args.precision, device, speeds, lambda: progress.advance(rating))


def _print(rows: Sequence[Row]) -> None:
    for row in rows:
        cells = [f"{row['model']:24} {row['size']:5} px"]
        if row["top1"] is not None:
            cells.append(f"top-1 {row['top1']:6.2f} %" + (f" of {row['images']}" if row["images"] else ""))
        if row["images_per_second"] is not None:
            cells.append(f"{row['images_per_second']:9.1f} images/s  {row['peak_mib']:.0f} MiB")
        print("  ".join(cells + [row["status"]] * (row["status"] != "ok")))


def command(args: argparse.Namespace) -> None:
    """The command. Raises UserError."""
    at_least(1, size=args.size, batch=args.batch, rounds=args.rounds)
    at_least(0, seconds=args.seconds, workers=args.workers)
    check_png(args.out)
    if not args.checkpoint and not args.logs:
        args.checkpoint, args.data_path = [quick_run()], args.data_path or str(digits())
        say(f"taking --checkpoint {args.checkpoint[0]} --data-path {args.data_path}")
    rows = [row for entry in args.logs for row in read_logs(entry)]
    if args.checkpoint:
        rows = _measured(args, find_device(args.device)) + rows
    path = args.out.with_suffix(".csv")
    write_csv(path, COLUMNS, map(dict.values, rows))
    save_figure(draw(rows), args.out)
    _print(rows)
    print(args.out, path, sep="\n")
