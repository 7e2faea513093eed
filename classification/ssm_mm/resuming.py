"""What a training goes on from beside weights, compared with what it has itself before mmengine takes any of it.

mmengine gives optimizers and schedulers whatever a file holds: a moment of another shape is read beyond its end by
compiled updates, and a scheduler gets every attribute that the file names. What a file calls the best checkpoint so far
it deletes, with all that is below, when there is a better one.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor

# what PyTorch's optimizers remember of a parameter, in its shape but for the count of steps
_MOMENTS = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.SGD: {"momentum_buffer"}}

_LARGEST = 1 << 63
_SEEDS = 1 << 32
_BEST = re.compile(r"best_[\w.-]+\.pth")


def own_records(content: dict[str, Any], work_dir: str | Path) -> None:
    """Leave of a checkpoint's records, in place, what a training in `work_dir` can have written: the curves, the best
    scores, which checkpoints are kept and which is best, by numbers and by files of that folder. The rest is recorded
    anew."""
    meta, hub = content["meta"], content["message_hub"]
    seed = meta.get("seed")
    if not (type(seed) is int and 0 <= seed < _SEEDS):
        meta.pop("seed", None)
    hub["log_scalars"] = {n: curve for n, curve in hub["log_scalars"].items() if isinstance(curve, HistoryBuffer)}
    hub["runtime_info"] = {n: v for n, v in hub["runtime_info"].items() if _is_own(n, v, Path(work_dir).resolve())}
    names = {*hub["log_scalars"], *hub["runtime_info"]}
    hub["resumed_keys"] = {n: value for n, value in hub["resumed_keys"].items() if n in names and type(value) is bool}


def _is_own(name: Any, value: Any, work_dir: Path) -> bool:
    if not isinstance(name, str):
        return False
    if name.startswith("best_score"):
        return _is_number(value)
    if name == "keep_ckpt_ids":
        return isinstance(value, list) and all(type(step) is int and 0 <= step < _LARGEST for step in value)
    if name.startswith("best_ckpt") and isinstance(value, str) and "\0" not in value:
        path = Path(value)
        return bool(_BEST.fullmatch(path.name)) and path.parent.resolve() == work_dir
    return False


def resume_fault(content: Mapping[str, Any], wrapper: OptimWrapper, schedulers: Any) -> str:
    """What keeps the optimizer and the schedulers in a checkpoint from being those of this training; "" if nothing
    does. Schedulers: a list, or lists by the names of several optimizers, or None."""
    # mmengine asks for the names alone
    if "optimizer" in content:
        optimizer = content["optimizer"]
        if isinstance(wrapper, OptimWrapperDict):
            named = optimizer if isinstance(optimizer, Mapping) else {}
            parts = (_optimizer_fault(named.get(name), each) for name, each in wrapper.items())
            fault = next(filter(None, parts), "")
        else:
            fault = _optimizer_fault(optimizer, wrapper)
        if fault:
            return f"its optimizer has {fault}"
    if "param_schedulers" not in content or schedulers is None:
        return ""
    saved = content["param_schedulers"]
    own = {"": schedulers} if isinstance(schedulers, list) else schedulers
    saved = {"": saved} if isinstance(schedulers, list) else saved
    alike = _alike(saved, {name: [each.state_dict() for each in own[name]] for name in own})
    return "" if alike else "its schedulers are not those of the config"


def _optimizer_fault(saved: Any, wrapper: OptimWrapper) -> str:
    own = wrapper.state_dict()
    if not isinstance(saved, Mapping) or not isinstance(saved.get("state"), Mapping):
        return "no state"
    if not _alike(saved.get("param_groups"), own["param_groups"]):
        return "other groups of parameters, or other settings of these"
    rest = {name: value for name, value in own.items() if name not in ("state", "param_groups")}
    if not _alike({name: saved[name] for name in rest if name in saved}, rest, some=True):
        return "another loss scale"
    parameters = [parameter for group in wrapper.optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in own["param_groups"] for index in group["params"]]
    shapes = {index: parameter.shape for index, parameter in zip(indices, parameters, strict=True)}
    # of other optimizers we do not know which moments have a parameter's shape
    needed = _MOMENTS.get(type(wrapper.optimizer))
    for index, state in saved["state"].items():
        if index not in shapes:
            return f"a state for parameter {index!r:.40}, of {len(shapes)}"
        if not isinstance(state, Mapping) or (state and not (needed or set()) <= set(state)):
            return f"no {' or '.join(sorted(needed or ())) or 'state'} for parameter {index}"
        for key, value in state.items():
            if not _is_state(key, value, None if needed is None else shapes[index]):
                return f"for parameter {index} a {key!r:.40} that is not finite or not of its kind or shape"
    return ""


def _is_state(key: Any, value: Any, shape: torch.Size | None) -> bool:
    """Whether `value` can be the moment `key` of a parameter of this shape, or of an unknown one."""
    if isinstance(value, Tensor):
        fits = value.dim() == 0 if key == "step" else shape is None or value.shape == shape
        return fits and value.dtype.is_floating_point and bool(value.isfinite().all())
    if key == "step" or shape is None:
        return _is_number(value)
    return value is None and key == "momentum_buffer"  # SGD without momentum


def _is_number(value: Any) -> bool:
    # float() of a larger one fails
    return isinstance(value, (int, float)) and -_LARGEST < value < _LARGEST


def _alike(saved: Any, own: Any, some: bool = False) -> bool:
    """Whether `saved` is of the kinds of `own`, in all its parts (or in `some` of a mapping's)."""
    if isinstance(own, Mapping):
        if not isinstance(saved, Mapping) or (set(saved) != set(own) and not some):
            return False
        return all(_alike(saved[name], own[name]) for name in saved)
    if isinstance(own, (list, tuple)):
        lists = isinstance(saved, (list, tuple)) and len(saved) == len(own)
        return lists and all(map(_alike, saved, own))
    if isinstance(own, Tensor):
        return isinstance(saved, Tensor) and saved.shape == own.shape and bool(saved.isfinite().all())
    if own is None or isinstance(own, bool):
        return isinstance(saved, type(own)) or (own is None and _is_number(saved))
    return _is_number(saved) if _is_number(own) else type(saved) is type(own) and saved == own
