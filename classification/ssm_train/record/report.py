"""The report of a run: report.md and curves.png, from what the run folder holds, finished or not.

python -m ssm_train.record.report RUN_FOLDER
"""

import argparse
import datetime
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssm_models.printable import printable
from ssm_train.common import command as command_line
from ssm_train.common.errors import UserError
from ssm_train.common.fileio import write_atomic
from ssm_train.config.defaults import default_config
from ssm_train.config.yaml_text import parse_yaml, read_yaml
from ssm_train.record.answers import TRAINED, read_counts
from ssm_train.record.curves import read_curves, save_curves
from ssm_train.record.results import Record, Results, better_weights
from ssm_train.record.series import Entry, read_entries, train_means
from ssm_train.step.evaluate import Accuracy

_LONGEST_LIST = 30  # lines of events, files or classes in report.md
_MOST_CONFUSIONS = 3  # other classes that are named beside one
_LARGEST_MATRIX = 20  # classes of a confusion matrix that is written out
# where the run lay, not what it was
_PLACES = ("DATA.DATA_PATH", "OUTPUT", "TAG")


def write_report(folder: Path) -> Path:
    """Write report.md and curves.png into the run folder; returns the path of the former.

    Reads config.yaml and log.jsonl, and where they exist metrics.json, bad_images.json and nonfinite/*.json. Raises
    UserError and FileNotFoundError without the first two, ValueError while the log has no entries.
    """
    config = read_yaml(folder / "config.yaml")
    entries = read_entries(folder / "log.jsonl")
    if not entries:
        raise ValueError(f"{folder / 'log.jsonl'} holds no entries yet")
    # a run that was finished before it was continued here has events alone
    measured = any(entry["kind"] != "event" for entry in entries)
    if measured:
        save_curves(read_curves(folder), folder / "curves.png")
    validated = {entry["epoch"]: entry for entry in entries if entry["kind"] == "val"}
    metrics = _read_json(folder / "metrics.json")
    if metrics.get("mode") != "train" or metrics["results"]["last"]["epoch"] < max(validated, default=0):
        # the numbers of an evaluation, or of a run that has gone on since, are not those of this run
        metrics = {}
    bad = _read_json(folder / "bad_images.json")
    text = [
        f"# {config['MODEL']['NAME']}: {folder.resolve().name}",
        _status(config, len(validated), entries[-1]["update"], metrics),
        "## Result",
        *_results(metrics["results"] if metrics else _records(validated)),
        *(_classes(folder) if metrics else []),
        "## Setup",
        *_table(("", ""), _setup(config, entries, metrics).items()),
        "## Recipe",
        "The keys of `config.yaml` that differ from the defaults, which are VMamba's published ImageNet recipe.",
        *_table(("key", "value", "default"), _differences(config)),
        "## Speed",
        *_table(("", ""), _speed(entries, metrics).items()),
        "## Events",
        *_table(("event", "times"), _counts(entries, metrics, bad).items()),
        *_listed([_event_line(entry) for entry in _events(entries)], "log.jsonl"),
        *_files(folder, bad),
        "## Curves",
        "![loss, accuracy, learning rate, gradient norm and throughput over epochs](curves.png)",
        "`summary.csv` has a line for every epoch, `log.jsonl` all that was recorded.",
    ]
    path = folder / "report.md"
    write_atomic(path, "\n\n".join(text) + "\n")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _records(validated: Mapping[int, Entry]) -> dict[str, Record]:
    """What metrics.json calls "results", from the log's entries of the kind "val" by epoch."""
    results = Results()
    for epoch, entry in sorted(validated.items()):
        accuracies = {
            weights: Accuracy(*(entry[f"{prefix}{key}"] for key in ("top1", "top5", "loss")), entry["images"])
            for weights, prefix in (("model", ""), ("model_ema", "ema_"))
            if f"{prefix}top1" in entry
        }
        results.add(epoch, accuracies)
    return results.records


def _status(config: Mapping[str, Any], validated: int, updates: int, metrics: Mapping[str, Any]) -> str:
    if metrics:
        return f"Finished: {metrics['epochs']} epochs, {updates} updates."
    return f"**Unfinished**: {validated} of {config['TRAIN']['EPOCHS']} epochs validated, {updates} updates made."


def _results(records: Mapping[str, Record]) -> list[str]:
    if not records:
        return ["No epoch has been validated."]
    rows = []
    for name in ("best", "best_ema", "last", "last_ema"):
        if name in records:
            epoch, top1, top5, loss, images = (
                records[name][key] for key in ("epoch", "top1", "top5", "loss", "images")
            )
            rows.append((name, epoch, f"{top1:.2f}", f"{top5:.2f}", f"{loss:.4f}", images))
    best = better_weights({name: records[name] for name in ("best", "best_ema") if name in records})
    return [
        f"**{records[best]['top1']:.2f} %** top-1, by `checkpoints/{best}` (epoch {records[best]['epoch']}).",
        *_table(("weights", "epoch", "top-1 (%)", "top-5 (%)", "loss (nats)", "images"), rows),
    ]


def _classes(folder: Path) -> list[str]:
    """How each class was recognised by the best weights, of a run that wrote it down."""
    path = folder / f"{TRAINED}_confusion.csv"
    if not path.is_file():
        return []
    counts = read_counts(path)
    shares = {name: of_it[name] / sum(of_it.values()) for name, of_it in counts.items() if any(of_it.values())}
    order = sorted(counts, key=lambda name: (shares.get(name, math.inf), name))
    rows = []
    for name in order[:_LONGEST_LIST]:
        others = [f"{_cell(other)} ({number})" for other, number in counts[name].items() if other != name]
        right = f"{100 * shares[name]:.1f}" if name in shares else ""
        rows.append((_cell(name), sum(counts[name].values()), right, ", ".join(others[:_MOST_CONFUSIONS])))
    more = f" {len(counts) - _LONGEST_LIST} others are in" if len(counts) > _LONGEST_LIST else " All counts:"
    text = [
        "## Classes",
        f"Of the best weights, the worst first.{more} `{path.name}`; every image: `{TRAINED}.csv`.",
        *_table(("class", "images", "right (%)", "taken for"), rows),
    ]
    if len(counts) <= _LARGEST_MATRIX:
        matrix = [(_cell(name), *(of_it.get(other, 0) for other in counts)) for name, of_it in counts.items()]
        text += ["Confusion matrix: rows are classes of the images, columns what they were taken for."]
        text += _table(("", *map(_cell, counts)), matrix)
    return [*text, f"![validation images with the highest loss]({TRAINED}_worst.png)"]


def _cell(name: str) -> str:
    """The name of a class as it stands, where Markdown and HTML would read marks into it."""
    return re.sub(r"([\\`*_{}\[\]<>#~&])", r"\\\1", printable(name))


def _setup(config: Mapping[str, Any], entries: Sequence[Entry], metrics: Mapping[str, Any]) -> dict[str, str]:
    """What was trained, on what; what only a finished run knows is left out before."""
    data, model, train = config["DATA"], config["MODEL"], config["TRAIN"]
    rates = [entry["lr"] for entry in entries if entry["kind"] == "train"]
    known = {"model": f"`{model['NAME']}`"}
    if metrics:
        known["parameters"] = f"{metrics['parameters']:,}"
    known["data"] = (
        f"`{data['DATA_PATH']}` ({data['DATASET']}), {model['NUM_CLASSES']} classes, "
        f"{data['IMG_SIZE']}x{data['IMG_SIZE']} pixels"
    )
    batch = f"{data['BATCH_SIZE']} per process and micro-step x {train['ACCUMULATION_STEPS']} micro-steps"
    if metrics:
        images = data["BATCH_SIZE"] * train["ACCUMULATION_STEPS"] * metrics["processes"]
        batch += f" x {metrics['processes']} processes = {images}"
    known["images per update"] = batch
    known["optimizer"] = f"{train['OPTIMIZER']}, weight decay {train['WEIGHT_DECAY']:g}"
    if rates:
        known["highest learning rate"] = f"{max(rates):.4g}"
    known["seed"] = str(config["SEED"])
    if metrics:
        versions = dict(metrics["versions"])
        commit = versions.pop("commit", None)
        known["precision"] = metrics["amp"]
        known["device"] = f"{metrics['processes']} x {metrics['device']}"
        known["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
        if commit:
            known["commit"] = f"`{commit}`"
    return known


def _differences(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    values, defaults = dict(_flat(config)), dict(_flat(parse_yaml(default_config().dump(), "defaults")))
    differing = [key for key in values if key not in _PLACES and values[key] != defaults.get(key)]
    return [(f"`{key}`", f"`{values[key]!r}`", f"`{defaults[key]!r}`" if key in defaults else "") for key in differing]


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _speed(entries: Sequence[Entry], metrics: Mapping[str, Any]) -> dict[str, str]:
    train = [entry for entry in entries if entry["kind"] == "train"]
    timed = [entry["seconds"] for entry in entries if "seconds" in entry]
    means = train_means(train)
    found = {}
    if metrics or timed:
        seconds = metrics["seconds"] if metrics else timed[-1]
        found["training, validation and saving"] = f"{datetime.timedelta(seconds=round(seconds))} ({seconds:.1f} s)"
    if train:
        speed = metrics["images_per_second"] if metrics else means["images_per_second"]
        found["training throughput"] = f"{speed:.1f} images/s"
        found["waiting for data"] = f"{100 * means['data_wait']:.1f} % of training time"
        found["peak memory"] = f"{max(entry['memory_mb'] for entry in train):.0f} MB per process"
    return found


def _events(entries: Iterable[Entry]) -> list[Entry]:
    """The events in order. An update that was skipped again after a resume is one."""
    found: dict[Any, Entry] = {}
    for number, entry in enumerate(entries):
        if entry["kind"] == "event":
            repeatable = entry["what"] in ("skipped", "rolled_back")
            found[(entry["what"], entry["epoch"], entry["slot"]) if repeatable else number] = entry
    return list(found.values())


def _counts(entries: Sequence[Entry], metrics: Mapping[str, Any], bad: Mapping[str, str]) -> dict[str, int]:
    times = Counter(entry["what"] for entry in _events(entries))
    excluded = [entry["excluded"] for entry in entries if entry["kind"] == "val"]
    return {
        "resumed": times["resumed"],
        "updates skipped (loss or gradient not finite)": metrics.get("skipped_updates", times["skipped"]),
        "rolled back": metrics.get("rollbacks", times["rolled_back"]),
        "preempted": times["preempted"],
        "unreadable training images": metrics.get("bad_images", len(bad)),
        "unreadable validation images": excluded[-1] if excluded else 0,
    }


def _event_line(entry: Entry) -> str:
    details = ", ".join(f"{name} {value}" for name, value in entry.items() if name not in ("kind", "what", "update"))
    return f"- after {entry['update']} updates: {entry['what'].replace('_', ' ')} ({details})"


def _files(folder: Path, bad: Mapping[str, str]) -> list[str]:
    """Where to read on about updates that were skipped and images that were replaced."""
    dumps = [f"- `nonfinite/{path.name}`" for path in sorted((folder / "nonfinite").glob("*.json"))]
    images = [f"- `{path}`: {reason}" for path, reason in sorted(bad.items())]
    text = ["Batches of the skipped updates:", *_listed(dumps, "nonfinite/")] if dumps else []
    return text + (["Training images that could not be read:", *_listed(images, "bad_images.json")] if images else [])


def _listed(lines: Sequence[str], where: str) -> list[str]:
    """A list, the beginning of a long one."""
    more = [f"- and {len(lines) - _LONGEST_LIST} more, see `{where}`"] if len(lines) > _LONGEST_LIST else []
    return ["\n".join([*lines[:_LONGEST_LIST], *more])] if lines else []


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in [header, ["---"] * len(header), *rows]]
    return ["\n".join("| " + " | ".join(row) + " |" for row in cells)]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ssm_train.record.report", description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="run folder, with config.yaml and log.jsonl")
    args = parser.parse_args(argv)

    def command() -> None:
        try:
            print(write_report(args.run))
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} does not exist; give the folder of a training run") from error
        except ValueError as error:
            raise UserError(str(error)) from error

    return command_line.run(command)


if __name__ == "__main__":
    sys.exit(main())
