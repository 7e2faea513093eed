"""The table of published weights, table.json: one entry per file, as its authors state it.

name      MODEL.TAG of a classifier, in timm's style; the name of the config of a detector or segmentor (and .TAG)
model     what it is loaded into: a registered model, or a config of detection or segmentation; "" where the authors do
          not say all of how it was built (`from_upstream` builds it from what they say)
recipe    the config of this repository that trains and evaluates it; "" for none
url       where the authors offer it; mirrors: other addresses that were published for it
sha256, bytes     of the file, where they are published
entry     the set of weights to read, "model" or "ema": the one that has the published metrics
ema       whether the authors say that the published metrics are of averaged weights
metrics   as published, in percent: top1, top5; box_ap, mask_ap; miou, miou_tta
licence, source   of the weights (none stated: null), and of the code that made them
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType

from ..unpickle import CheckpointError

TASKS = ("classification", "detection", "segmentation")
METRICS = {
    **{"top1": "top-1", "top5": "top-5", "box_ap": "box AP", "mask_ap": "mask AP"},
    **{"miou": "mIoU", "miou_tta": "mIoU tta"},
}
"""What people call them."""


@dataclass(frozen=True)
class Entry:
    """A published file, see above."""

    name: str
    model: str
    task: str
    recipe: str
    url: str
    mirrors: tuple[str, ...]
    sha256: str | None
    bytes: int | None
    entry: str
    ema: bool | None
    metrics: Mapping[str, float]
    licence: str | None
    source: str

    @property
    def tag(self) -> str:
        return self.name.removeprefix(self.model).lstrip(".") if self.model else self.name.rpartition(".")[2]

    @property
    def backbone(self) -> str:
        """The registered model itself, or that of a detector's or segmentor's backbone."""
        return self.model if self.task == "classification" else backbone_of(self.model)

    @property
    def filename(self) -> str:
        return self.url.rpartition("/")[2]


def backbone_of(config: str) -> str:
    """The registered model of a detector's or segmentor's backbone, as the config's name says it:
    upernet_vmamba-tiny-s1l8_160k_ade20k-512x512 has vmamba_tiny_s1l8."""
    return config.split("_")[1].replace("-", "_")


@functools.cache
def entries() -> Mapping[str, Entry]:
    """All entries by name, in the order of the table: the first one of a model is its default."""
    rows = json.loads(files(__package__).joinpath("table.json").read_text())
    found = {}
    for row in rows:
        found[row["name"]] = Entry(**row | {"mirrors": tuple(row["mirrors"])})
    return MappingProxyType(found)


def of_model(model: str) -> dict[str, Entry]:
    """The entries of a model or config by tag, the default first; empty where nothing is published."""
    return {entry.tag: entry for entry in entries().values() if entry.model == model}


def of_address(url: str) -> Entry | None:
    """The entry of a file's address."""
    return next((entry for entry in entries().values() if entry.url == url), None)


def of_file(name: str) -> Entry | None:
    """The entry of a published file, by the file's name with or without its ending."""
    return next((entry for entry in entries().values() if name in (entry.filename, entry.filename[:-4])), None)


def find(name: str) -> Entry:
    """The entry called `name` (MODEL.TAG), or the default one of the model or config `name`.

    Raises:
        CheckpointError: nothing of that name is published.
    """
    if name in entries():
        return entries()[name]
    own = list(of_model(name).values())
    if own:
        return own[0]
    near = difflib.get_close_matches(name, [*entries(), *(entry.model for entry in entries().values())], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`python -m ssm_models` lists what is"
    raise CheckpointError(f"{name} is neither a file nor the name of published weights; {hint}")
