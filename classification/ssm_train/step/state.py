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

from ssm_train.record.checkpoint import MODEL, MODEL_EMA, Checkpoint
from ssm_train.step.engine import Training
from ssm_train.step.parallel import like, load_whole

_log = logging.getLogger(__name__)

# on rank 0 alone, on the CPU
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def collect(run: Training) -> dict[str, Any]:
    """What a checkpoint holds; weights and optimizer are empty on ranks other than 0. All ranks must call it."""
    return {
        "model": _contiguous(get_model_state_dict(run.network, options=_WHOLE)),
        "ema": _contiguous(get_model_state_dict(run.ema.module, options=_WHOLE)) if run.ema is not None else None,
        "optimizer": optimizer_state(run.network, run.optimizer),
        "scaler": run.scaler.state_dict(),
        "updates": run.updates,
    }


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """The optimizer's tensors by parameter name. All ranks must call it."""
    if not optimizer.state:
        # asked before the first update, PyTorch would make one, which counts
        return {}
    states = get_optimizer_state_dict(unwrap_model(network), optimizer, options=_WHOLE).get("state", {})
    return {name: _contiguous(state) for name, state in states.items()}


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
    """Optimizer, scaler, and the place in the schedule."""
    state = checkpoint.train_state()
    load_optimizer_state(run.network, run.optimizer, state["optimizer"])
    if run.scaler.is_enabled() and state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    # with another number of images per update, the schedule continues by epochs
    run.updates = round(state["updates"] * checkpoint.meta["images_per_update"] / per_update)
    run.schedule.set(run.updates)


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
