"""Products and convolutions by oneDNN where no derivative is wanted: with an activation in the same pass, and by
weights that were packed before.

PyTorch links oneDNN and has it as operators for its compiler, `torch.ops.mkldnn`. Eager inference takes them here:
an activation that is computed while a result is still in a register costs nothing, and weights that lie in oneDNN's
own order (`pack_linear`, `pack_conv`) need not be brought into it by every call.

Shapes: B batch, C channels in, O channels out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules import module as nn_module

from ssm_ops import runs_eagerly

_AVAILABLE = torch.backends.mkldnn.is_available()
_BFLOAT16 = _AVAILABLE and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_ACTS = {nn.GELU: "gelu", nn.SiLU: "swish", nn.ReLU: "relu", nn.Identity: "none"}


def problem(dtype: torch.dtype) -> str | None:
    """Why products in `dtype` cannot be oneDNN's, or None."""
    if not _AVAILABLE:
        return "this build of PyTorch has no oneDNN"
    if dtype == torch.bfloat16 and not _BFLOAT16:
        return "this processor has no instructions for bfloat16; take dtype=torch.float32"
    return None


def dtype_of_product(x: Tensor) -> torch.dtype:
    """In which `x` is multiplied: autocast's, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN's operators may stand for PyTorch's: on the CPU, in float32 or bfloat16, where nobody wants a
    derivative of anything and nobody looks at the operators, as compilers, tracers and counters do."""
    if x.device.type != "cpu" or not _AVAILABLE or not torch.backends.mkldnn.enabled:
        return False
    dtype = dtype_of_product(x)
    if not (dtype == torch.float32 or (dtype == torch.bfloat16 and _BFLOAT16)):
        return False
    if dtype == x.dtype and weight.dtype != dtype and not torch.is_autocast_enabled("cpu"):
        return False  # PyTorch has the right error for this
    return runs_eagerly(x, weight, bias)


def unwatched(*modules: nn.Module) -> bool:
    """Whether no hook waits for a call of `modules`, so that their results need not exist."""
    return not nn_module._has_any_global_hook() and not any(map(_has_hooks, modules))


def _has_hooks(module: nn.Module) -> bool:
    """Of anybody who looks at values. fvcore's only note in which module its tracer is."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(kinds) and any(not _is_fvcores(hook) for hooks in kinds for hook in hooks.values())


def _is_fvcores(hook: Callable) -> bool:
    return type(hook).__module__ == "fvcore.nn.jit_analysis"


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the weight of `layer` is all there is to it, so that a fused operator may read that instead of calling
    the layer. It is not in adapters around a layer, in parametrised, pruned or quantised ones, nor where hooks wait for
    this layer. Hooks of all modules at once are for those that are called: counters have them, and shall see the
    operator."""
    return type(layer) is kind and not is_wrapper(layer.weight) and not _has_hooks(layer)


def is_wrapper(weight: Tensor) -> bool:
    """Whether `weight` is made of other tensors, as a quantised one is, and can do no more than what it is made for."""
    return type(weight) is not nn.Parameter and hasattr(weight, "__tensor_flatten__")


def known_act(act: nn.Module) -> bool:
    """Whether `act` can be computed behind a product."""
    return type(act) in _ACTS


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: nn.Module | None = None) -> Tensor:
    """act(x weight^T + bias), (..., C) -> (..., O), in the dtype of products; `weight` (O, C) or packed."""
    dtype = dtype_of_product(x)
    bias = None if bias is None else bias.to(dtype)
    return torch.ops.mkldnn._linear_pointwise(x.to(dtype), _brought(weight, dtype), bias, *_attribute(act))


Places = tuple[Sequence[int], Sequence[int], Sequence[int], int]
"""Padding, stride, dilation and groups of a convolution, in oneDNN's order."""


def places(conv: nn.Conv2d) -> Places:
    return conv.padding, conv.stride, conv.dilation, conv.groups


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, places: Places, act: nn.Module | None = None) -> Tensor:
    """act of the convolution, (B, C, H, W) -> (B, O, h, w) channels-last, in the dtype of products; `weight`
    (O, C / groups, k, k) or packed."""
    dtype = dtype_of_product(x)
    bias = None if bias is None else bias.to(dtype)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._convolution_pointwise(x, _brought(weight, dtype), bias, *places, *_attribute(act))


ROWS = 256
"""Tokens that weights are packed for. Other numbers run as well: in measurements the time did not depend on it."""


def pack_linear(weight: Tensor) -> Tensor:
    """(O, C) in oneDNN's order; a tensor that only `linear` can read."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


def pack_conv(weight: Tensor, places: Places, size: Sequence[int]) -> Tensor:
    """(O, C / groups, k, k) in oneDNN's order for maps of `size` (B, C, H, W); a tensor that only `conv2d` can read."""
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *places, list(size))


def refuse_derivatives(x: Tensor) -> None:
    """Raises RuntimeError where x wants its gradient, which packed weights cannot give."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("a model that was prepared for inference has no gradients; take the one it was made from")


def _brought(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight if weight.dtype == dtype else weight.to(dtype)


def _attribute(act: nn.Module | None) -> tuple[str, list, str]:
    """The activation as oneDNN's operators name it: name, numbers, algorithm."""
    if act is None:
        return "none", [], ""
    return _ACTS[type(act)], [], act.approximate if isinstance(act, nn.GELU) else ""
