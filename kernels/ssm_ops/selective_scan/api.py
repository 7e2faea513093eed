"""Selective scan (S6), the recurrence of Mamba: Gu & Dao 2023, "Mamba", algorithm 2 (https://arxiv.org/abs/2312.00752)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import Differentiable
from .._common import check_beside, check_floating, empty_gradient, state_dtype
from .._interface import CPU_CHUNK, CUDA_CHUNK, MAX_STATE
from .._library import SINGLE_AND_HALF, declare, register, resolve
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
    come in the dtype of their input. The same call gives the same bits.

    Can be differentiated any number of times, also by `torch.func` and in forward mode. The first gradient is computed
    by the chosen implementation, all others by the reference (see `_autograd.py`).

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, named.
        RuntimeError: `impl` cannot run on this device.
    """
    B, C = (x.unsqueeze(1) if x.dim() == 3 else x for x in (B, C))
    _check(u, delta, A, B, C, D, delta_bias, z)
    args = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype or u.dtype, False)
    if impl == "reference":
        out, last_state, _ = _SCAN.meaning(*args, impl)
    else:
        out, last_state, _ = _SCAN.forward(*args, resolve(SELECTIVE_SCAN, impl, u.device, u.dtype))
    return (out, last_state) if return_last_state else out


def _check(u, delta, A, B, C, D, delta_bias, z) -> None:
    check_floating("selective_scan", "u", u)
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
    own, wide = (u.dtype,), (state_dtype(u.dtype),)
    others = {
        "delta": (delta, [(batch, delta_dim, length)], own + wide),
        "B": (B, [(batch, groups, n_state, length)], own),
        "C": (C, [(batch, groups, n_state, length)], own),
        "z": (z, [(batch, dim, length)], own),
        "A": (A, [(dim, n_state)], wide),
        "D": (D, [(dim,)], wide),
        "delta_bias": (delta_bias, [(delta_dim,)], wide),
    }
    check_beside("selective_scan", "u", u, others)


# ---- registration ---------------------------------------------------------------------------------------------------

# `states` is what the backward needs besides the inputs: the fp32 (fp64 for fp64) state before every chunk of
# `STATE_CHUNK[impl]` tokens and after the last, (S + 1, B, G, N, D/G) with S = ceil(L / chunk). The states in between
# are recomputed. (With the last one a compiler need not tell one chunk from several, as size 1 is special to it.)
# Without `keep_states`, where no backward follows, it has no elements.

SELECTIVE_SCAN = declare(
    "selective_scan",
    __package__,
    SINGLE_AND_HALF,
    cuda=("cuda",),
    cpu=("cpu",),
    triton=("cuda",),
    reference=None,
)

STATE_CHUNK = {"cuda": CUDA_CHUNK, "cpu": CPU_CHUNK, "triton": 128, "reference": reference.STATE_CHUNK}
"""Tokens between two saved states, by implementation."""


def states_shape(u: Tensor, B: Tensor, impl: str) -> tuple[int, ...]:
    """Of `states`, where they are kept."""
    chunk = STATE_CHUNK[impl]
    (batch, dim, length), (groups, n_state) = u.shape, B.shape[1:3]
    return (length + chunk - 1) // chunk + 1, batch, groups, n_state, dim // groups


def _fake_fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype, keep_states, impl):
    out = u.new_empty(u.shape, dtype=out_dtype)
    last = u.new_empty((*u.shape[:2], B.shape[2]), dtype=state_dtype(u.dtype))
    shape = states_shape(u, B, impl) if keep_states else (0,)
    return out, last, u.new_empty(shape, dtype=state_dtype(u.dtype))


def _fake_bwd(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus, impl):
    return tuple(empty_gradient(t, u) for t in (u, delta, A, B, C, D, z, delta_bias))


selective_scan_fwd = register(
    SELECTIVE_SCAN,
    "selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, bool delta_softplus, ScalarType out_dtype, bool keep_states, str impl) "
    "-> (Tensor out, Tensor last_state, Tensor states)",
    _fake_fwd,
    "forward",
)

selective_scan_bwd = register(
    SELECTIVE_SCAN,
    "selective_scan_bwd(Tensor dout, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor states, bool delta_softplus, str impl) "
    "-> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddelta_bias)",
    _fake_bwd,
    "backward",
)

_SCAN = Differentiable(selective_scan_fwd, selective_scan_bwd, reference.forward)
