"""The gate by the compiled CPU library (csrc/cpu/gate.cpp), all dtypes as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._interface import Buffer, GateArguments, dtype_code
from ..._native import call


def _run(direction: str, y: Tensor, z: Tensor, scale: float, **tensors: Tensor) -> None:
    dim = y.shape[2]
    z = z.reshape(-1, dim)  # without a copy where rows follow each other evenly, as in half of a wider tensor
    if z.stride(0) < dim or (dim > 1 and z.stride(1) != 1):
        z = z.contiguous()
    a = GateArguments(y=Buffer.of(y), z=z.data_ptr(), z_dtype=dtype_code(z), z_row=z.stride(0))
    for name, tensor in tensors.items():
        setattr(a, name, Buffer.of(tensor))
    a.rows, a.dim, a.scale, a.threads = z.shape[0], dim, scale, torch.get_num_threads()
    call("cpu", f"silu_gate_{direction}", a)


def forward(y: Tensor, z: Tensor, scale: float) -> Tensor:
    """As `reference.forward`."""
    y, out = y.contiguous(), y.new_empty(y.shape, dtype=y.dtype)
    if y.numel():
        _run("forward", y, z, scale, out=out)
    return out


def backward(dout: Tensor, y: Tensor, z: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `reference.backward`."""
    y, dy, dz = y.contiguous(), y.new_empty(y.shape, dtype=y.dtype), y.new_empty(y.shape, dtype=y.dtype)
    if y.numel():
        _run("backward", y, z, scale, dout=dout.contiguous(), dy=dy, dz=dz)
    return dy, dz
