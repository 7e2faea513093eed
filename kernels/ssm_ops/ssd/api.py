"""State space duality (SSD), the scan of Mamba-2: one decay per head, so that a chunk of tokens is a matrix product.

Dao & Gu 2024, "Transformers are SSMs", sections 3 and 6 (https://arxiv.org/abs/2405.21060).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._interface import MAX_STATE
from .._library import no_autocast, resolve
from ..selective_scan.ops import state_dtype
from . import ops
from .impl import reference


def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 64,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    return_final_states: bool = False,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """For every sample and head j, with group g = j // (H/G) and h_{-1} = `initial_states` or 0, over t = 0..L-1:

        s_t = dt_t + dt_bias                            (softplus of it with dt_softplus; identity above 20)
        h_t = exp(s_t A) h_{t-1} + s_t x_t B_t^T        (P x N numbers)
        y_t = h_t C_t + D x_t

    Shapes: B batch, L length, H heads, P channels of a head, N state (at most 256), G groups.

    Args:
        x: (B, L, H, P), float32, float16, bfloat16 or float64; any strides.
        dt: (B, L, H), in the dtype of x or in float32 (float64 where x is).
        A: (H,), as D and dt_bias in float32 (float64 where x is).
        B, C: (B, L, G, N). G divides H: neighbouring heads share a group. Dtype of x.
        chunk_size: tokens of a chunk. It changes time and memory, not the result; any length works with any chunk.
        D: (H,) or (H, P), the skip connection.
        dt_bias: (H,).
        initial_states: (B, H, P, N) in float32 (float64).
        return_final_states: also return h_{L-1}, (B, H, P, N) in float32 (float64). Gradients flow through it.
        out_dtype: of the result; None is that of x.
        impl: "auto", "triton" (CUDA; not float64) or "reference", which is plain PyTorch without a custom operator,
            also under ``torch.export``.

    Returns:
        (B, L, H, P), contiguous; with `return_final_states` a pair.

    States, exponentials and sums are kept in float32 (float64 for float64 inputs), whatever autocast says. Gradients
    come in the dtype of their input. The same call gives the same bits. First derivatives only.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, named.
        RuntimeError: `impl` cannot run on this device.
    """
    check("ssd_chunk_scan", x, dt, A, B, C, D, dt_bias, initial_states)
    if B.shape[3] > MAX_STATE:
        raise ValueError(
            f"ssd_chunk_scan: the state size N is {B.shape[3]} (B is {tuple(B.shape)}); legal: 1 to {MAX_STATE}"
        )
    if not isinstance(chunk_size, (int, torch.SymInt)):
        raise TypeError(f"ssd_chunk_scan: chunk_size must be an int, got {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"ssd_chunk_scan: chunk_size is {chunk_size}; legal: 1 or more")
    chosen = None if impl == "reference" else resolve(ops.SSD_CHUNK_SCAN, impl, x.device, x.dtype)
    out, final_states = _SSDChunkScan.apply(
        x, dt, A, B, C, D, dt_bias, initial_states, dt_softplus, chunk_size, out_dtype or x.dtype, chosen
    )
    return (out, final_states) if return_final_states else out


class _SSDChunkScan(torch.autograd.Function):
    """Autograd around the registered operators (`impl` names one) or around plain PyTorch (`impl` is None)."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, dt_bias, initial_states, dt_softplus, chunk_size, out_dtype, impl):
        inputs = (x, dt, A, B, C, D, dt_bias)
        args = (*inputs, initial_states, dt_softplus, chunk_size, out_dtype)
        if impl is None:
            with no_autocast(x.device.type):
                out, final_states, states = reference.forward(*args)
        else:
            out, final_states, states = ops.ssd_chunk_scan_fwd(*args, impl)
        ctx.save_for_backward(*inputs, states)
        ctx.flags, ctx.impl, ctx.starts_from_zero = (dt_softplus, chunk_size), impl, initial_states is None
        return out, final_states

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dfinal_states):
        *inputs, states = ctx.saved_tensors
        args = (dout, dfinal_states, *inputs, states, *ctx.flags)
        if ctx.impl is None:
            with no_autocast(dout.device.type):
                *grads, d_initial = reference.backward(*args)
        else:
            *grads, d_initial = ops.ssd_chunk_scan_bwd(*args, ctx.impl)
        grads = (None if t is None else g for t, g in zip(inputs, grads, strict=True))
        return *grads, None if ctx.starts_from_zero else d_initial, None, None, None, None


def check(op: str, x, dt, A, B, C, D, dt_bias, initial_states=None) -> None:
    """Shapes, dtypes and devices of the arguments that all SSD operators share; `op` is named in the errors."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"{op}: x is {x.dtype}; use float32, float16, bfloat16 or float64")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must be (B, L, H, P) with L, H, P > 0, got {tuple(x.shape)}")
    if B.dim() != 4:
        raise ValueError(f"{op}: B must be (B, L, G, N), got {tuple(B.shape)}")
    (batch, length, heads, head_dim), (groups, n_state) = x.shape, B.shape[2:]
    if groups == 0 or heads % groups:
        raise ValueError(f"{op}: G, the groups of B, is {groups}, which does not divide the {heads} heads of x")
    if n_state == 0:
        raise ValueError(f"{op}: the state size N is 0 (B is {tuple(B.shape)}); legal: 1 or more")

    own, wide = x.dtype, state_dtype(x.dtype)
    expected = {
        "dt": (dt, [(batch, length, heads)], (own, wide)),
        "A": (A, [(heads,)], (wide,)),
        "B": (B, [(batch, length, groups, n_state)], (own,)),
        "C": (C, [(batch, length, groups, n_state)], (own,)),
        "D": (D, [(heads,), (heads, head_dim)], (wide,)),
        "dt_bias": (dt_bias, [(heads,)], (wide,)),
        "initial_states": (initial_states, [(batch, heads, head_dim, n_state)], (wide,)),
    }
    for name, (t, shapes, dtypes) in expected.items():
        if t is None:
            continue
        if t.shape not in shapes:
            legal = " or ".join(str(tuple(shape)) for shape in shapes)
            raise ValueError(f"{op}: {name} must be {legal} for x {tuple(x.shape)}, got {tuple(t.shape)}")
        if t.dtype not in dtypes:
            legal = " or ".join(map(str, dict.fromkeys(dtypes)))
            raise TypeError(f"{op}: {name} must be {legal} beside x in {x.dtype}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device}, x is on {x.device}")
