"""AdamW with weight decay where it belongs."""

import torch
from timm.optim import param_groups_weight_decay
from timm.utils import unwrap_model
from torch import nn
from yacs.config import CfgNode as CN


def build_optimizer(model: nn.Module, train_cfg: CN, base_lr: float) -> torch.optim.AdamW:
    """AdamW in two groups. Not decayed: 1-D parameters, biases and what `model.no_weight_decay()` lists by full name
    (in state-space models A_logs, Ds, dt biases, position embeddings: decaying them pulls time scales to a constant).

    `base_lr` is the resolved peak learning rate. Wrappers (DDP, compile) are removed first: they change the names.
    """
    model = unwrap_model(model)
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_weight_decay(model, train_cfg.WEIGHT_DECAY, no_weight_decay_list=listed)
    return torch.optim.AdamW(groups, lr=base_lr, betas=tuple(train_cfg.BETAS), eps=train_cfg.EPS, fused=True)


def decay_counts(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Numbers of parameter tensors with and without weight decay."""
    counts = [0, 0]
    for group in optimizer.param_groups:
        counts[group["weight_decay"] == 0] += len(group["params"])
    return counts[0], counts[1]


def state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """The optimizer's tensors keyed by parameter name, so that a checkpoint does not depend on the order of groups."""
    names = {parameter: name for name, parameter in unwrap_model(model).named_parameters()}
    return {names[parameter]: dict(state) for parameter, state in optimizer.state.items()}


def load_state_by_name(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, dict[str, torch.Tensor]]
) -> None:
    """Restore what `state_by_name` gave; rates and decay stay those of the current config."""
    names = {parameter: name for name, parameter in unwrap_model(model).named_parameters()}
    own = optimizer.state_dict()
    indices = (index for group in own["param_groups"] for index in group["params"])
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    named = ((index, names[parameter]) for index, parameter in zip(indices, parameters, strict=True))
    # a parameter without a gradient so far has no state
    state = {index: saved[name] for index, name in named if name in saved}
    optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})
