"""Selective scan (S6), the recurrence of Mamba: Gu & Dao 2023, "Mamba", algorithm 2 (https://arxiv.org/abs/2312.00752)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._interface import MAX_STATE
from .._library import no_autocast, resolve
from . import ops
from .impl import reference


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_softplus: bool = False,
    out_dtype: torch.dtype | None = None,
    return_last_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """For every sample and channel d, with group g = d // (D/G) and h_{-1} = 0, over t = 0..L-1:

        dt_t = delta_t + delta_bias                 (softplus of it with delta_softplus; identity above 20)
        h_t  = exp(dt_t A) h_{t-1} + dt_t B_t u_t   (N numbers)
        y_t  = sum_n C_t h_t + D u_t                (times silu(z_t) with z)

    Shapes: B batch, D channels, L length, N state (at most 256), G groups, Dd channels of delta.

    Args:
        u: (B, D, L), float32, float16, bfloat16 or float64; any strides.
        delta: (B, Dd, L), Dd divides D: channel d takes delta of channel d // (D/Dd). Dtype of u, or float32 beside
            half precision: step sizes that were formed in float32 need not be rounded.
        A: (D, N), as D and delta_bias in float32 (float64 where u is).
        B, C: (B, G, N, L) or, for one group, (B, N, L). G divides D. Dtype of u.
        D: (D,), the skip connection.
        delta_bias: (Dd,).
        z: (B, D, L), the gate. Dtype of u.
        out_dtype: of the result; None is that of u. float32 keeps the precision of the sum for a following norm.
        return_last_state: also return h_{L-1}, (B, D, N) in float32 (float64). No gradient flows through it.
        impl: "auto", "reference", "cpu", "triton" or "cuda". "auto" takes the fastest that is available for the device;
            "reference" is plain PyTorch without a custom operator, also under ``torch.export``.

    Returns:
        (B, D, L), contiguous; with `return_last_state` a pair.

    States, exponentials and sums are kept in float32 (float64 for float64 inputs), whatever autocast says. Gradients
    come in the dtype of their input. The same call gives the same bits. First derivatives only.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, named.
        RuntimeError: `impl` cannot run on this device.
    """
    B, C = (x.unsqueeze(1) if x.dim() == 3 else x for x in (B, C))
    _check(u, delta, A, B, C, D, delta_bias, z)
    chosen = None if impl == "reference" else resolve(ops.SELECTIVE_SCAN, impl, u.device, u.dtype)
    out, last_state = _SelectiveScan.apply(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype or u.dtype, chosen
    )
    return (out, last_state) if return_last_state else out


class _SelectiveScan(torch.autograd.Function):
    """Autograd around the registered operators (`impl` names one) or around plain PyTorch (`impl` is None)."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype, impl):
        args = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype)
        if impl is None:
            with no_autocast(u.device.type):
                out, last_state, states = reference.forward(*args)
        else:
            out, last_state, states = ops.selective_scan_fwd(*args, impl)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, states)
        ctx.delta_softplus, ctx.impl = delta_softplus, impl
        ctx.mark_non_differentiable(last_state)
        return out, last_state

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        inputs = ctx.saved_tensors
        args = (dout, *inputs, ctx.delta_softplus)
        if ctx.impl is None:
            with no_autocast(dout.device.type):
                grads = reference.backward(*args)
        else:
            grads = ops.selective_scan_bwd(*args, ctx.impl)
        *inputs, _states = inputs
        grads = (None if x is None else g for x, g in zip(inputs, grads, strict=True))
        return *grads, None, None, None


def _check(u, delta, A, B, C, D, delta_bias, z) -> None:
    if u.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"selective_scan: u is {u.dtype}; use float32, float16, bfloat16 or float64")
    if u.dim() != 3 or u.shape[2] == 0:
        raise ValueError(f"selective_scan: u must be (B, D, L) with L > 0, got {tuple(u.shape)}")
    if A.dim() != 2:
        raise ValueError(f"selective_scan: A must be (D, N), got {tuple(A.shape)}")
    if B.dim() != 4:
        raise ValueError(f"selective_scan: B must be (B, G, N, L) or (B, N, L), got {tuple(B.shape)}")
    if delta.dim() != 3:
        raise ValueError(f"selective_scan: delta must be (B, Dd, L), got {tuple(delta.shape)}")
    (batch, dim, length), n_state, groups, delta_dim = u.shape, A.shape[1], B.shape[1], delta.shape[1]
    if not 1 <= n_state <= MAX_STATE:
        raise ValueError(
            f"selective_scan: the state size N is {n_state} (A is {tuple(A.shape)}); legal: 1 to {MAX_STATE}"
        )
    for name, part in (("G, the groups of B", groups), ("Dd, the channels of delta", delta_dim)):
        if part == 0 or dim % part:
            raise ValueError(f"selective_scan: {name}, is {part}, which does not divide the {dim} channels of u")
    maps = {
        "B": (B, (batch, groups, n_state, length)),
        "C": (C, (batch, groups, n_state, length)),
        "z": (z, (batch, dim, length)),
    }
    parameters = {"A": (A, (dim, n_state)), "D": (D, (dim,)), "delta_bias": (delta_bias, (delta_dim,))}
    own, wide = u.dtype, ops.state_dtype(u.dtype)
    either = dict.fromkeys((own, wide))
    step_sizes = {"delta": (delta, (batch, delta_dim, length))}
    for legal, tensors in ((either, step_sizes), ((own,), maps), ((wide,), parameters)):
        for name, (x, shape) in tensors.items():
            if x is None:
                continue
            if x.shape != shape:
                raise ValueError(
                    f"selective_scan: {name} must be {tuple(shape)} for u {tuple(u.shape)}, got {tuple(x.shape)}"
                )
            if x.dtype not in legal:
                expected = " or ".join(map(str, legal))
                raise TypeError(f"selective_scan: {name} must be {expected} beside u in {u.dtype}, got {x.dtype}")
            if x.device != u.device:
                raise ValueError(f"selective_scan: {name} is on {x.device}, u is on {u.device}")
