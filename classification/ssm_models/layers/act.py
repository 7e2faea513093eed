"""Activations by name."""

import torch.nn as nn

_ACTS = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "sigmoid": nn.Sigmoid}


def get_act(name: str) -> nn.Module:
    """A new activation module: "silu", "gelu" (exact), "relu" or "sigmoid", in any case."""
    if name.lower() not in _ACTS:
        raise ValueError(f"activation {name!r} is not one of {', '.join(_ACTS)}")
    return _ACTS[name.lower()]()
