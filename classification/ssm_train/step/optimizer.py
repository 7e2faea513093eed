"""AdamW or SGD, with weight decay where it belongs and learning rates that may fall from the head to the stem."""

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import unwrap_model
from torch import nn
from yacs.config import CfgNode as CN

# the last parts of parameter names: rates of decay, skips and time steps of the state-space mixers
_SSM = {"A_logs", "A_log", "A_b_log", "Ds", "D", "D_b", "dt_projs_bias", "dt_bias"}


def build_optimizer(model: nn.Module, train_cfg: CN, base_lr: float) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum, over the parameters that train. `base_lr` is the resolved peak rate.

    Not decayed: 1-D parameters, biases and what `model.no_weight_decay()` lists by full name (in state-space models
    A_logs, Ds, dt biases, position embeddings: decaying them pulls time scales to a constant). With TRAIN.DECAY_SSM
    those of the mixers are decayed unless they are 1-D, as the original trainers of VMamba and Vim do.

    With TRAIN.LAYER_DECAY d < 1 the rate of a layer that lies n layers below the head is d^n of it: groups by
    `model.group_matcher()`, the stem and every block a layer (BEiT, https://arxiv.org/abs/2106.08254, appendix).

    Wrappers (DDP, compile) are removed first: they change the names.
    """
    model = unwrap_model(model)
    listed = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    if train_cfg.DECAY_SSM:
        listed = {name for name in listed if name.rpartition(".")[2] not in _SSM}
    if train_cfg.LAYER_DECAY < 1:
        groups = param_groups_layer_decay(
            model, train_cfg.WEIGHT_DECAY, no_weight_decay_list=listed, layer_decay=train_cfg.LAYER_DECAY
        )
    else:
        groups = param_groups_weight_decay(model, train_cfg.WEIGHT_DECAY, no_weight_decay_list=listed)
    if train_cfg.OPTIMIZER == "sgd":
        momentum = train_cfg.MOMENTUM
        return torch.optim.SGD(groups, lr=base_lr, momentum=momentum, nesterov=momentum > 0, fused=True)
    return torch.optim.AdamW(groups, lr=base_lr, betas=tuple(train_cfg.BETAS), eps=train_cfg.EPS, fused=True)


def decay_counts(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Numbers of parameter tensors with and without weight decay."""
    counts = [0, 0]
    for group in optimizer.param_groups:
        counts[group["weight_decay"] == 0] += len(group["params"])
    return counts[0], counts[1]
