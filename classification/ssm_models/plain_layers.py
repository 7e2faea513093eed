"""A model for tools that know layers by their exact class."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch.nn as nn

from .layers.conv2d import Conv2d
from .layers.linear import Linear, Linear2d

Model = TypeVar("Model", bound=nn.Module)
_PLAIN = {Linear: nn.Linear, Linear2d: nn.Linear, Conv2d: nn.Conv2d}


def plain_layers(model: Model) -> Model:
    """A copy of a model whose linear layers and convolutions are PyTorch's own `nn.Linear` and `nn.Conv2d`.

    Those of this library are faster subclasses with the same parameters and results. Tools that take layers of an exact
    class, such as `torch.ao.quantization.quantize_dynamic` and thop, pass them over without a word; others, such as
    PEFT and torchao, need no copy.
    """
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
    return copied
