"""Every published result, and the command that gives it: see analyze/modelcard.py."""

import argparse
import difflib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from analyze.modelcard import ACTIONS
from ssm_models.weights import find, table
from ssm_models.weights.table import METRICS, TASKS, Entry, backbone_of
from ssm_train.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "output"
# published without weights
_NUMBERS = {
    "cascade-mask-rcnn_vim-tiny_simplefpn_100e_coco": {"box_ap": 45.7, "mask_ap": 39.2},
    "upernet_vim-tiny_60k_ade20k-512x512": {"miou": 41.0},
    "dual-sam_25e_mas3k-512x512": {"miou": 78.9},
    "dual-sam_25e_rmas-512x512": {"miou": 73.5},
    "dual-sam_25e_ruwi-512x512": {"miou": 90.4},
    "dual-sam_25e_ufo120-512x512": {"miou": 81.0},
}
# what Dual-SAM starts from, in the folder of the repository
_SAM = "sam_vit_b_01ec64.pth"
# as the tools write them, and what makes percent of them
_MEASURED = {"box_ap": ("coco/bbox_mAP", 100), "mask_ap": ("coco/segm_mAP", 100)}
_MEASURED |= {"miou": ("mIoU", 1), "miou_tta": ("mIoU", 1)}


class Row(NamedTuple):
    """A published result."""

    name: str
    config: Path
    metrics: Mapping[str, float]
    entry: Entry | None

    @property
    def task(self) -> str:
        return self.config.relative_to(ROOT / "configs").parts[0]


def rows() -> dict[str, Row]:
    """By name, those of a config before others of the same config."""
    found = {}
    for entry in table.entries().values():
        if entry.recipe:
            name = entry.name if entry.recipe in found else entry.recipe
            found[name] = Row(name, _config(entry.recipe), entry.metrics, entry)
    for name, metrics in _NUMBERS.items():
        found[name] = Row(name, _config(name), metrics, None)
    return dict(sorted(found.items(), key=lambda item: TASKS.index(item[1].task)))


def _config(recipe: str) -> Path:
    [path] = ROOT.glob(f"configs/*/*/{recipe}.*")
    return path


def find_row(name: str) -> Row:
    """UserError with similar names for one that is not in the list."""
    known = rows()
    names = {row.entry.name: row for row in known.values() if row.entry} | known
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "bash modelcard.sh --list shows them"
        raise UserError(f"{name} is not in the list; {hint}")
    return names[name]


def listing() -> Iterator[str]:
    """A line per row."""
    for row in rows().values():
        numbers = ", ".join(f"{METRICS[metric]} {value}" for metric, value in row.metrics.items())
        weights = "no weights published" if row.entry is None else f"{row.entry.name}, {row.entry.filename}"
        yield f"{row.name:<52} {numbers:<28} {weights}"


def command_of(row: Row, action: str, args: argparse.Namespace, options: list[str]) -> list[str]:
    """What does `action`. UserError where there are no weights for it."""
    config, processes = str(row.config.relative_to(ROOT)), str(args.gpus)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    weights = _weights(row, action)
    if row.task == "classification":
        if action == "tta":
            raise UserError(f"{row.name} is a classifier: it has test and train")
        place = ["--cfg", config, "--data-path", str(args.data_path), "--output", str(OUTPUT)]
        what = ["--tag", f"{row.name}-test", "--eval"] if action == "test" else ["--tag", row.name, "--resume", "auto"]
        begin = ["--pretrained", weights] if weights else []
        return [*launcher, "classification/main.py", *place, *what, *begin, *options]
    tool = f"{row.task}/tools/{'train' if action == 'train' else 'test'}.py"
    command = [*launcher, tool, config, *([weights] if action != "train" else []), "--launcher", "pytorch"]
    command += ["--work-dir", str(OUTPUT / row.name) + ("" if action == "train" else f"-{action}")]
    if action == "train":
        # --cfg-options would take such names for lists, or leave them out
        if set(weights) & set("[]()'\", "):
            raise UserError(f"CKPT {weights!r} may hold no space, comma, bracket or quote here")
        # a second --cfg-options would replace this one
        mine = options.index("--cfg-options") + 1 if "--cfg-options" in options else 0
        begin = ["--cfg-options"] * (not mine) + [f"model.backbone.checkpoint={weights}"]
        options = [*options[:mine], *begin, *options[mine:]]
    return [*command, *["--tta"] * (action == "tta"), *options]


def _weights(row: Row, action: str) -> str:
    """A file of the user's, or a name; "" for random ones."""
    given = os.environ.get("CKPT", "")
    if given:
        if not Path(given).exists():
            raise UserError(f"CKPT {given} does not exist")
        return str(Path(given).absolute())
    if action == "train" and row.task != "classification":
        return _classifier(row.name)
    if action == "train":
        # the models of overlapping patches were fine-tuned from those of 16 x 16
        return find(row.name.replace("_stride8", "")).name if "_stride8" in row.name else ""
    if row.entry is None:
        raise UserError(f"the weights of {row.name} were not published: give the file of yours as CKPT=FILE")
    return row.entry.name


def _classifier(name: str) -> str:
    """The weights that a detector or segmentor starts from, e.g. of upernet_vmamba-tiny-s1l8_160k_ade20k-512x512."""
    if name.startswith("dual-sam_"):
        return _SAM
    backbone = backbone_of(name)
    return find(
        backbone if backbone in {entry.model for entry in table.entries().values()} else f"{backbone}_patch16_224"
    ).name


def compare(row: Row, measured: Mapping[str, float], tolerance: float) -> tuple[list[str], bool]:
    """Lines with published and measured numbers, and whether all lie within `tolerance` (percent) of each other."""
    lines, good = [f"{'':12} {'published':>9} {'measured':>9} {'difference':>10}"], True
    for metric, value in measured.items():
        difference = value - row.metrics[metric]
        # 83.6 - 83.4 is a little more than 0.2 to a computer
        close = abs(difference) <= tolerance + 1e-9
        good &= close
        beyond = "" if close else f"   beyond the tolerance of {tolerance:g}"
        lines.append(f"{METRICS[metric]:12} {row.metrics[metric]:9.2f} {value:9.2f} {difference:+10.2f}{beyond}")
    return lines, good


def measured(row: Row, action: str) -> dict[str, float]:
    """The results of the evaluation that has just ended, in percent, of the metrics that were published."""
    folder = OUTPUT / f"{row.name}-{action}"
    if row.task == "classification":
        results = json.loads((folder / "metrics.json").read_text())["eval"]["results"]
        which = "model_ema" if row.entry and row.entry.entry == "ema" else "model"
        record = results.get(which) or next(iter(results.values()))
        return {metric: record[metric] for metric in row.metrics}
    newest = max(folder.glob("*/*.json"), key=lambda path: path.stat().st_mtime)
    found = json.loads(newest.read_text())
    asked = [metric for metric in row.metrics if metric.endswith("_tta") == (action == "tta")]
    # mmsegmentation's mIoU is in percent, that of marine animals from 0 to 1
    percent = 100 if row.name.startswith("dual-sam_") else 1
    named = [(metric, *_MEASURED[metric]) for metric in asked]
    return {metric: found[name] * factor * percent for metric, name, factor in named if name in found}


def modelcard(args: argparse.Namespace, options: list[str]) -> int:
    """The command; returns the exit status. Raises UserError."""
    if args.list:
        print(*listing(), sep="\n")
        return 0
    if args.name is None:
        if not args.dry_run:
            raise UserError("no name given: bash modelcard.sh --list shows them")
        for row in rows().values():
            for action in ACTIONS[:: 2 if row.task == "classification" else 1]:
                if row.entry or action == "train":
                    print(shlex.join(command_of(row, action, args, options)))
        return 0
    row = find_row(args.name)
    moved = [option for option in options if option.split("=")[0] in ("--output", "--tag", "--work-dir")]
    if moved:
        raise UserError(f"{moved[0]}: results go to {OUTPUT}/{row.name}-{args.action}, where they are compared")
    command = command_of(row, args.action, args, options)
    if args.dry_run:
        print(shlex.join(command))
        return 0
    status = subprocess.run(command, cwd=ROOT).returncode
    if status or args.action == "train":
        return status
    found = measured(row, args.action)
    if not found:
        print(f"\n{row.name}: no result of {args.action} was published")
        return 0
    lines, good = compare(row, found, args.tolerance)
    print(f"\n{row.name}", *lines, sep="\n")
    return int(not good)


def _processes() -> int:
    """UserError for GPUS that is no number of processes."""
    given = os.environ.get("GPUS", "")
    if given and not (given.isdecimal() and int(given) > 0):
        raise UserError(f"GPUS is {given!r}, but it must be a number of processes, 1 or more")
    return int(given) if given else max(torch.cuda.device_count(), 1)


def command(args: argparse.Namespace) -> int:
    """The command; returns the exit status. Raises UserError."""
    args.gpus = _processes()
    args.data_path = (args.data_path or Path(os.environ.get("DATA_PATH", ROOT / "data/imagenet"))).absolute()
    return modelcard(args, args.options)
