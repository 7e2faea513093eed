"""A model prepared for inference on the CPU: weights packed, constants folded, BatchNorm in the convolutions."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn as nn
from timm.utils import reparameterize_model

from .layers import onednn

Model = TypeVar("Model", bound=nn.Module)
DTYPES = (torch.float32, torch.bfloat16)


def for_inference(model: Model, dtype: torch.dtype = torch.float32) -> Model:
    """A copy of a model of this library (or of any model with its layers) that is faster on the CPU.

    The weights of linear maps and convolutions are brought into oneDNN's order once instead of by every call, what the
    scans need of their parameters is computed once, and BatchNorm is folded into the convolutions. The copy keeps the
    class, its methods and its results; it has no gradients, no state dict, and is neither compiled nor exported:
    those are for the model it was made from. Layers of other libraries stay as they are, and so do layers that have
    hooks, which the copy keeps.

    Args:
        model: in eval mode, float32 weights on the CPU. A model that was prepared already is returned as it is.
        dtype: of the products: torch.float32, or torch.bfloat16 for what autocast gives (norms and scans compute in
            float32). The copy keeps to it whatever autocast says around it.

    Raises:
        ValueError: the model is in training mode, not on the CPU, not in float32, or prepared for another dtype.
        RuntimeError: this PyTorch or processor cannot do it.
    """
    if isinstance(model, Prepared):
        if model.inference_dtype != dtype:
            raise ValueError(f"this model is prepared for {model.inference_dtype}; prepare the original for {dtype}")
        return model
    _check(model, dtype)
    prepared = _replaced(reparameterize_model(model).requires_grad_(False), dtype)
    prepared.__class__ = _prepared_class(type(model))
    prepared.inference_dtype = dtype
    return prepared


def _check(model: nn.Module, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not one of {', '.join(map(str, DTYPES))}")
    if any(module.training for module in model.modules()):
        raise ValueError("for_inference takes a model in eval mode; call model.eval() first")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            raise ValueError(
                f"for_inference takes float32 weights on the CPU; {name} is {parameter.dtype} on {parameter.device}"
            )
    problem = onednn.problem(dtype)
    if problem is not None:
        raise RuntimeError(f"for_inference: {problem}")


def _replaced(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What stands for `module`: what its own `for_inference` says, unless a hook waits for it, else itself with its
    children replaced."""
    if hasattr(module, "for_inference") and onednn.unwatched(module):
        return module.for_inference(dtype)
    for name, child in module.named_children():
        setattr(module, name, _replaced(child, dtype))
    if hasattr(module, "fold_constants"):
        module.fold_constants(dtype)
    return module


class Prepared:
    """What `for_inference` adds to a model's class."""

    inference_dtype: torch.dtype

    def _precision(self) -> torch.autocast:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            raise RuntimeError("a prepared model cannot be compiled or exported; take the one it was made from")
        return torch.autocast("cpu", torch.bfloat16, enabled=self.inference_dtype == torch.bfloat16)

    def train(self, mode: bool = True):
        if mode:
            raise RuntimeError("a model that was prepared for inference cannot train; take the one it was made from")
        return super().train(mode)

    def state_dict(self, *_, **__) -> Mapping:
        raise RuntimeError("the weights of a prepared model are packed; save the one it was made from")

    def __reduce_ex__(self, protocol):
        raise TypeError("a prepared model cannot be copied or pickled; prepare the original again")


ENTRIES = ("forward", "forward_features", "forward_head", "forward_intermediates")


@functools.cache
def _prepared_class(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls`, every entry of which runs in the precision that it was prepared for."""

    def entry(name: str):
        original = getattr(cls, name)

        @functools.wraps(original)
        def run(self, *args, **options):
            with self._precision():
                return original(self, *args, **options)

        return run

    entries = {name: entry(name) for name in ENTRIES if hasattr(cls, name)}
    return type(cls.__name__, (Prepared, cls), entries | {"__module__": cls.__module__})
