"""meta.json of a checkpoint: what it holds, checked before anything uses it, because people edit such files."""

import json
import math
from typing import Any, NamedTuple

from ssm_train.common.errors import UserError

FORMAT = 1


class _Map(NamedTuple):
    """A mapping of texts, of `names` alone where there are any, to values of one kind."""

    value: Any
    names: tuple[str, ...] = ()


# A kind is int (not negative), float (finite), str, a list of kinds, a dictionary of kinds by key, a _Map, or a tuple
# of alternatives: kinds, texts and None.
_LARGEST = 1 << 63
_RECORD = {"epoch": int, "top1": float, "top5": float, "loss": (float, None), "images": int}  # None: not finite
_SPLIT = {"images": int, "classes": int, "class_names": str, "image_names": str}
_FIELDS = {
    "format": int,
    "epoch": int,
    "update": int,
    "results": _Map(_RECORD, ("best", "best_ema", "last", "last_ema")),
    "weights": ("model", "model_ema"),  # which validated better
    "progress": {"train_images": float, "train_seconds": float, "seconds": float},
    "guard": {"skipped": int, "in_a_row": int, "rollbacks": int},
    "bad_images": _Map(str),  # path -> reason
    "updates": int,
    "processes": int,
    "asked_batch": [(int, None), (int, None)],
    "images_per_update": int,
    "data": ({"train": _SPLIT, "val": _SPLIT}, None),  # None: not recorded, as in format 0
    "classes": (_Map(int), None),  # name -> label; None: not recorded
    "config": str,
    "command": str,  # of the process that wrote it
    "pretrained": (
        {"name": str, "file": str, "entry": str, "sha256": str, "fresh_classifier": (True, False)},
        None,
    ),  # the weights the run started from
    "versions": _Map(str),
}


def parse_meta(text: bytes) -> dict[str, Any]:
    """The content of a meta.json. UserError says what is wrong with it; its reader adds where it is.

    Format 0, without the fields "format" and "data", is read as well.
    """
    try:
        meta = json.loads(text)
    except RecursionError as error:
        raise UserError("is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"is no JSON: {error}") from error
    if isinstance(meta, dict):
        if "format" not in meta:
            meta |= {"format": FORMAT, "data": None}
        # of runs that began before these were kept
        meta = {"command": "", "pretrained": None, "classes": None, **meta}
        if meta["format"] != FORMAT:
            raise UserError(f"has format {meta['format']!r}, but this version reads up to {FORMAT}: use a newer one")
    fault = _fault(meta, _FIELDS, "") or _contradiction(meta)
    if fault:
        raise UserError(f"is not as it was written: {fault}")
    return meta


def _contradiction(meta: dict[str, Any]) -> str:
    results = meta["results"]
    if not meta["processes"] or not meta["images_per_update"]:
        return "processes or images_per_update is 0"
    if bool(results) != bool(meta["epoch"]) or any(
        (f"last{kind}" in results) != (f"best{kind}" in results) for kind in ("", "_ema")
    ):
        return f"results has {', '.join(results) or 'nothing'} after epoch {meta['epoch']}"
    return ""


def _fault(value: Any, kind: Any, where: str) -> str:
    """What keeps `value`, at the place `where`, from being of the `kind`; "" if nothing does."""
    if isinstance(kind, tuple) and not isinstance(kind, _Map):
        faults = [_fault(value, each, where) for each in kind]
        return "" if "" in faults else faults[0]
    if kind is None or isinstance(kind, (str, bool)):
        return "" if value == kind and type(value) is type(kind) else f"{where} is {value!r:.40}"
    if kind is float:
        number = type(value) in (int, float) and math.isfinite(value) and abs(value) < _LARGEST
        return "" if number else f"{where} is {value!r:.40}, no number"
    if kind is int:
        return "" if type(value) is int and 0 <= value < _LARGEST else f"{where} is {value!r:.40}, no count"
    if kind is str:
        return "" if isinstance(value, str) else f"{where} is {value!r:.40}, no text"
    container = list if isinstance(kind, list) else dict
    if not isinstance(value, container):
        return f"{where or 'the whole'} is {value!r:.40}, no {container.__name__}"
    if isinstance(kind, list):
        if len(value) != len(kind):
            return f"{where} has {len(value)} entries, not {len(kind)}"
        parts = [(f"{where}[{i}]", part, each) for i, (part, each) in enumerate(zip(value, kind, strict=True))]
    elif isinstance(kind, _Map):
        odd = next((name for name in value if kind.names and name not in kind.names), None)
        if odd is not None:
            return f"{where} has {odd!r:.40}"
        parts = [(f"{where}.{name}", part, kind.value) for name, part in value.items()]
    else:
        lacking = next((name for name in kind if name not in value), None)
        if lacking is not None:
            return f"{where or 'it'} lacks {lacking}"
        parts = [(f"{where}.{name}".lstrip("."), value[name], each) for name, each in kind.items()]
    return next(filter(None, (_fault(part, each, place) for place, part, each in parts)), "")
