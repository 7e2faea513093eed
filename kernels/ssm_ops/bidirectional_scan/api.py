"""The scans of a bidirectional mixer in one operator: a sequence forwards, another one backwards, and their sum.

Zhu et al. 2024, "Vision Mamba", algorithm 1 (https://arxiv.org/abs/2401.09417), without convolutions and gate. A fused
implementation forms the step sizes from their R numbers, reads the second sequence from its end instead of a reversed
copy, and writes the sum once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import Differentiable
from .._common import MAX_RANK, TRITON_CHUNK, check_beside, check_floating, empty_gradient, state_dtype
from .._interface import CPU_CHUNK, MAX_STATE
from .._library import DEFAULT_IMPL, SINGLE_AND_HALF, declare, register, resolve
from .impl import reference


def bidirectional_scan(
    x_forward: Tensor,
    x_backward: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """With proj split into (dt_s, B_s, C_s) for both directions s, and rev reversing time,

        selective_scan(x_forward, dt_weight_0 dt_0, A_0, B_0, C_0, D_0, dt_bias_0, softplus)
        + rev(selective_scan(rev x_backward, rev(dt_weight_1 dt_1), A_1, rev B_1, rev C_1, D_1, dt_bias_1, softplus))

    Shapes: B batch, L length, D channels, S = 2 directions, N state, R rank of the step sizes.

    Args:
        x_forward, x_backward: (B, L, D), float32, float16, bfloat16 or float64; any strides, contiguous is the fastest.
        proj: (B, L, S * (R + 2N)): per token and direction R numbers for the step size, N of B, N of C, in the order of
            the tokens for both directions. Dtype of x_forward, as x_backward.
        dt_weight: (S, D, R), as A (S*D, N), D (S*D,) and dt_bias (S*D,) in float32 (float64 where x_forward is).
        out_dtype: of the result; None is that of x_forward.
        impl: "cpu" and "triton" are fused implementations; "reference" and "cuda" are compositions of that
            implementation of `selective_scan` with reversed copies. "auto" takes the fused one where it is available,
            else the composition of the fastest scan.

    Returns:
        (B, L, D), contiguous.

    States, exponentials and sums are kept in float32 (float64). Gradients come in the dtype of their input. The same
    call gives the same bits.

    Can be differentiated any number of times, also by `torch.func` and in forward mode. The first gradient is computed
    by the chosen implementation, all others by the reference (see `_autograd.py`).

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, named.
        RuntimeError: `impl` cannot run on this device.
    """
    _check(x_forward, x_backward, proj, dt_weight, A, D, dt_bias)
    out_dtype = out_dtype or x_forward.dtype
    chosen = DEFAULT_IMPL if impl == "auto" else impl
    if chosen not in ("reference", "cuda"):
        chosen = resolve(BIDIRECTIONAL_SCAN, impl, x_forward.device, x_forward.dtype)
    if chosen in ("reference", "cuda"):
        return reference.composition(x_forward, x_backward, proj, dt_weight, A, D, dt_bias, out_dtype, impl)
    return _SCAN.forward(x_forward, x_backward, proj, dt_weight, A, D, dt_bias, out_dtype, False, chosen)[0]


def _check(x_forward, x_backward, proj, dt_weight, A, D, dt_bias) -> None:
    name = "bidirectional_scan"
    check_floating(name, "x_forward", x_forward)
    if x_forward.dim() != 3 or 0 in x_forward.shape[1:]:
        raise ValueError(f"{name}: x_forward must be (B, L, D) with at least one token, got {tuple(x_forward.shape)}")
    if A.dim() != 2 or not 1 <= A.shape[1] <= MAX_STATE:
        raise ValueError(f"{name}: A must be (2 * D, N) with N from 1 to {MAX_STATE}, got {tuple(A.shape)}")
    if dt_weight.dim() != 3 or not 1 <= dt_weight.shape[2] <= MAX_RANK:
        raise ValueError(f"{name}: dt_weight must be (2, D, R), 1 <= R <= {MAX_RANK}, got {tuple(dt_weight.shape)}")
    (batch, length, dim), n_state, rank = x_forward.shape, A.shape[1], dt_weight.shape[2]
    own, wide = (x_forward.dtype,), (state_dtype(x_forward.dtype),)
    others = {
        "x_backward": (x_backward, [(batch, length, dim)], own),
        "proj": (proj, [(batch, length, 2 * (rank + 2 * n_state))], own),
        "dt_weight": (dt_weight, [(2, dim, rank)], wide),
        "A": (A, [(2 * dim, n_state)], wide),
        "D": (D, [(2 * dim,)], wide),
        "dt_bias": (dt_bias, [(2 * dim,)], wide),
    }
    check_beside(name, "x_forward", x_forward, others, f", R {rank}, N {n_state}")


# ---- registration ---------------------------------------------------------------------------------------------------

# `states` is what the backward needs besides the inputs: the float32 state before every chunk of `STATE_CHUNK[impl]`
# tokens of a direction, (C + 1, B, S, N, D) with C = ceil(L / chunk); the last entry is not read. Without
# `keep_states`, where no backward follows, it has no elements. "reference" is a composition of other operators, without
# these two.

BIDIRECTIONAL_SCAN = declare(
    "bidirectional_scan", __package__, SINGLE_AND_HALF, cpu=("cpu",), triton=("cuda",), reference=None
)

STATE_CHUNK = {"cpu": CPU_CHUNK, "triton": TRITON_CHUNK}
"""Tokens between two saved states, by implementation."""


def _fake_fwd(x_forward, x_backward, proj, dt_weight, A, D, dt_bias, out_dtype, keep_states, impl):
    batch, length, dim = x_forward.shape
    n_chunks = (length + STATE_CHUNK[impl] - 1) // STATE_CHUNK[impl]
    shape = (n_chunks + 1, batch, 2, A.shape[1], dim) if keep_states else (0,)
    out = torch.empty_like(x_forward, dtype=out_dtype, memory_format=torch.contiguous_format)
    return out, x_forward.new_empty(shape, dtype=torch.float32)


def _fake_bwd(dout, x_forward, x_backward, proj, dt_weight, A, D, dt_bias, states, impl):
    inputs = (x_forward, x_backward, proj, dt_weight, A, D, dt_bias)
    return tuple(empty_gradient(t, x_forward) for t in inputs)


bidirectional_scan_fwd = register(
    BIDIRECTIONAL_SCAN,
    "bidirectional_scan_fwd(Tensor x_forward, Tensor x_backward, Tensor proj, Tensor dt_weight, Tensor A, Tensor D, "
    "Tensor dt_bias, ScalarType out_dtype, bool keep_states, str impl) -> (Tensor out, Tensor states)",
    _fake_fwd,
    "forward",
)

bidirectional_scan_bwd = register(
    BIDIRECTIONAL_SCAN,
    "bidirectional_scan_bwd(Tensor dout, Tensor x_forward, Tensor x_backward, Tensor proj, Tensor dt_weight, Tensor A, "
    "Tensor D, Tensor dt_bias, Tensor states, str impl) -> (Tensor dx_forward, Tensor dx_backward, Tensor dproj, "
    "Tensor ddt_weight, Tensor dA, Tensor dD, Tensor ddt_bias)",
    _fake_bwd,
    "backward",
)

_SCAN = Differentiable(bidirectional_scan_fwd, bidirectional_scan_bwd, reference.forward)
