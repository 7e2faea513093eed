"""The numbers of a run over time: entries of log.jsonl, and summary.csv made of them."""

import contextlib
import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ssm_train.common.fileio import to_json

# {"kind": "train", "val" or "event", "update": optimizer updates made, and what was recorded}
Entry = dict[str, Any]

_VAL = ("top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss", "seconds")
_COLUMNS = ("epoch", "update", "lr", "train_loss", *_VAL[:-1], "images_per_second", "data_wait", "seconds")


def as_line(entry: Entry) -> str:
    """As it stands in log.jsonl."""
    return to_json(entry) + "\n"


def read_entries(path: Path) -> list[Entry]:
    """The entries of a log.jsonl, in the order of writing; lines that killed processes left unfinished are left out."""
    entries = []
    for line in path.read_bytes().splitlines():
        # also UnicodeDecodeError: after a crash of the machine, a file may end in anything
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def entries_until(entries: list[Entry], update: int) -> list[Entry]:
    """`entries` without those at the end that were recorded after a checkpoint of `update` updates had been written.

    Only those at the end: a run that rolled back counts some updates twice, and both times belong to its history. But
    where the checkpoint is the one rolled back to, neither is part of it.
    """
    end = len(entries)
    while end and (
        entries[end - 1]["update"] > update
        or (entries[end - 1].get("what") == "rolled_back" and entries[end - 1]["update"] == update)
    ):
        end -= 1
    return entries[:end]


class Summary:
    """summary.csv: a row for every validated epoch, made of the entries of log.jsonl."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.rows: dict[int, Entry] = {}  # by epoch
        self._train: list[Entry] = []
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Take up an entry; one of the kind "val" completes the row of its epoch."""
        if entry["kind"] == "train":
            if self._train and entry["epoch"] != self._train[-1]["epoch"]:
                self._train = []
            self._train.append(entry)
        elif entry["kind"] == "val":
            lr = self._train[-1]["lr"] if self._train else None
            measured = {name: entry.get(name) for name in _VAL}
            means = train_means(self._train)
            self.rows[entry["epoch"]] = {
                "epoch": entry["epoch"],
                "update": entry["update"],
                "lr": lr,
                **means,
                **measured,
            }
            self._train = []

    def csv(self) -> str:
        """The file's text; what was not measured is left blank."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows[epoch] for epoch in sorted(self.rows))
        return text.getvalue()


def train_means(entries: Iterable[Entry]) -> dict[str, float | None]:
    """Means over entries of the kind "train", of one epoch or more: "train_loss" over iterations, "images_per_second"
    and "data_wait" (share) over time. None where there is nothing to average.

    Each entry stands for the iterations since the one before; where one was repeated, the last one counts.
    """
    by_place = {(entry["epoch"], entry["iteration"]): entry for entry in entries}
    before = (0, 0)
    losses, time, waited, steps = [], 0.0, 0.0, 0
    for (epoch, iteration), entry in sorted(by_place.items()):
        part = iteration - (before[1] if before[0] == epoch else 0)
        before = (epoch, iteration)
        if entry["loss"] is not None:
            losses.append((part, entry["loss"]))
        # in units of the time for one image per iteration
        time += part / entry["images_per_second"]
        waited += entry["data_wait"] * part / entry["images_per_second"]
        steps += part
    counted = sum(part for part, _ in losses)
    return {
        "train_loss": sum(part * loss for part, loss in losses) / counted if counted else None,
        "images_per_second": steps / time if time else None,
        "data_wait": waited / time if time else None,
    }
