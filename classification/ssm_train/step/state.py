"""All that an update depends on, out of a training and back into it: weights, averages, optimizer, scaler, progress.

It leaves as whole tensors by name, gathered by torch.distributed.checkpoint, so that a checkpoint knows neither how the
training was distributed nor the order of the optimizer's groups.
"""

import logging
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from ssm_train.common.errors import UserError
from ssm_train.record.checkpoint import MODEL, MODEL_EMA, TRAIN_STATE, Checkpoint
from ssm_train.step.engine import Training
from ssm_train.step.parallel import like, load_whole

_log = logging.getLogger(__name__)

# what the optimizers of step/optimizer.py remember of a parameter: of its shape and dtype, but for the count of steps
_STATE = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.SGD: {"momentum_buffer"}}
_SCALER = {
    **{"scale": float, "growth_factor": float, "backoff_factor": float},
    **{"growth_interval": int, "_growth_tracker": int},
}

# on rank 0 alone, on the CPU
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def collect(run: Training) -> dict[str, Any]:
    """What a checkpoint holds; weights and optimizer are empty on ranks other than 0. All ranks must call it."""
    return {
        "model": _contiguous(get_model_state_dict(run.network, options=_WHOLE)),
        "ema": _contiguous(get_model_state_dict(run.ema.module, options=_WHOLE)) if run.ema is not None else None,
        "optimizer": optimizer_state(run.network, run.optimizer),
        "stateless": _stateless(run.network, run.optimizer),
        "scaler": run.scaler.state_dict(),
        "updates": run.updates,
    }


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """The optimizer's tensors by parameter name. All ranks must call it."""
    if not optimizer.state:
        # asked before the first update, PyTorch would make one, which counts
        return {}
    states = get_optimizer_state_dict(unwrap_model(network), optimizer, options=_WHOLE).get("state", {})
    # without momentum, SGD remembers nothing, parameter by parameter
    return {name: tensors for name, state in states.items() if (tensors := _contiguous(state))}


def _stateless(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Trained parameters of which the optimizer remembers nothing: those without a gradient so far."""
    named = unwrap_model(network).named_parameters()
    # a momentum that is not set counts as nothing
    remembered = {p for p, state in optimizer.state.items() if any(value is not None for value in state.values())}
    return [name for name, parameter in named if parameter.requires_grad and parameter not in remembered]


def first_nonfinite(state: dict[str, Any]) -> str:
    """Which of what `collect` gave is not finite, in words; "" if all is. On rank 0."""
    weights = {"weights": state["model"], "averaged weights": state["ema"] or {}}
    optimizer = {
        f"the optimizer's {key}": {name: tensors[key] for name, tensors in state["optimizer"].items() if key in tensors}
        for key in sorted({key for tensors in state["optimizer"].values() for key in tensors})
    }
    for what, tensors in {**weights, **optimizer}.items():
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                return f"{what} ({name})"
    return ""


def _contiguous(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Without what is not set (the momentum of SGD without one); files know no other layout."""
    return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}


def restore(run: Training, checkpoint: Checkpoint, per_update: int) -> None:
    """Bring a running training, of `per_update` images per update, back to `checkpoint`. All ranks must call it."""
    restore_weights(run, checkpoint)
    restore_progress(run, checkpoint, per_update)


def restore_weights(run: Training, checkpoint: Checkpoint) -> None:
    """Plain and averaged weights."""
    load_whole(run.network, checkpoint.weights(MODEL, run.network))
    if run.ema is not None and checkpoint.has_ema:
        load_whole(run.ema.module, checkpoint.weights(MODEL_EMA, run.ema.module))
    elif run.ema is not None:
        _log.warning("%s has no averaged weights; averaging starts from its plain weights", checkpoint.folder)
        run.ema.reset()


def restore_progress(run: Training, checkpoint: Checkpoint, per_update: int) -> None:
    """Optimizer, scaler, and the place in the schedule. UserError for the state of another training."""
    state = checkpoint.train_state()
    fault = optimizer_fault(run.network, run.optimizer, state) or _scaler_fault(state["scaler"])
    if fault:
        raise UserError(f"{checkpoint.folder / TRAIN_STATE}: {fault}; use another checkpoint")
    load_optimizer_state(run.network, run.optimizer, state["optimizer"])
    if run.scaler.is_enabled() and state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    # with another number of images per update, the schedule continues by epochs
    run.updates = round(state["updates"] * checkpoint.meta["images_per_update"] / per_update)
    run.schedule.set(run.updates)


def optimizer_fault(network: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> str:
    """What keeps the state in a checkpoint from being that of `optimizer`, by names, shapes, dtypes and values; "" if
    nothing does. Compiled updates trust them: a tensor of another shape would be read beyond its end."""
    trained = {name: p for name, p in unwrap_model(network).named_parameters() if p.requires_grad}
    states, stateless = saved["optimizer"], saved["stateless"]
    if not states and saved["updates"] == 0:
        return ""
    keys = _STATE[type(optimizer)]
    odd = [name for name in (*states, *stateless) if name not in trained]
    lacking = [name for name in trained if name not in states and name not in stateless]
    if odd or lacking:
        return f"it has a state for {odd[0]}, which is not trained" if odd else f"it has no state for {lacking[0]}"
    for name, tensors in states.items():
        if set(tensors) != keys:
            return f"the state of {name} is {', '.join(sorted(tensors)) or 'empty'}, not {', '.join(sorted(keys))}"
        for key, tensor in tensors.items():
            shape, dtype = ((), torch.float32) if key == "step" else (trained[name].shape, trained[name].dtype)
            if tensor.shape != shape or tensor.dtype != dtype:
                found, wanted = ((tensor.dtype, list(tensor.shape)), (dtype, list(shape)))
                return f"{key} of {name} is {found[0]} of shape {found[1]}, not {wanted[0]} of shape {wanted[1]}"
            if not tensor.isfinite().all():
                return f"{key} of {name} is not finite"
    return ""


def _scaler_fault(state: dict[str, Any]) -> str:
    if state and {name: type(value) for name, value in state.items()} != _SCALER:
        return f"its scaler has {', '.join(map(str, state))}"
    return ""


def load_optimizer_state(
    network: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, dict[str, torch.Tensor]]
) -> None:
    """Restore what `optimizer_state` gave, in the layouts of the parameters; rates and decay stay those of the current
    config."""
    names = {parameter: name for name, parameter in unwrap_model(network).named_parameters()}
    now = optimizer.state_dict()
    indices = (index for group in now["param_groups"] for index in group["params"])
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    # a parameter without a gradient so far has no state, and neither has one without momentum
    pairs = [(index, own) for index, own in zip(indices, parameters, strict=True) if names[own] in saved]
    state = {index: _as_own(saved[names[own]], own) for index, own in pairs}
    optimizer.load_state_dict({"state": state, "param_groups": now["param_groups"]})


def _as_own(state: dict[str, torch.Tensor], own: torch.Tensor) -> dict[str, torch.Tensor]:
    """What has the parameter's shape is distributed and laid out as the parameter; steps are single numbers."""
    return {key: like(value, own) if value.shape == own.shape else value for key, value in state.items()}
