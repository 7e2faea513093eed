"""State space duality (SSD), the scan of Mamba-2: one decay per head, so that a chunk of tokens is a matrix product.

Dao & Gu 2024, "Transformers are SSMs", sections 3 and 6 (https://arxiv.org/abs/2405.21060).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import Differentiable
from .._common import check_ssd, empty_gradient, state_dtype
from .._interface import MAX_STATE
from .._library import SINGLE_AND_HALF, declare, register, resolve
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
    come in the dtype of their input. The same call gives the same bits.

    Can be differentiated any number of times, also by `torch.func` and in forward mode. The first gradient is computed
    by the chosen implementation, all others by the reference (see `_autograd.py`).

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, named.
        RuntimeError: `impl` cannot run on this device.
    """
    check_ssd("ssd_chunk_scan", x, dt, A, B, C, D, dt_bias, initial_states)
    if B.shape[3] > MAX_STATE:
        raise ValueError(
            f"ssd_chunk_scan: the state size N is {B.shape[3]} (B is {tuple(B.shape)}); legal: 1 to {MAX_STATE}"
        )
    if not isinstance(chunk_size, (int, torch.SymInt)):
        raise TypeError(f"ssd_chunk_scan: chunk_size must be an int, got {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"ssd_chunk_scan: chunk_size is {chunk_size}; legal: 1 or more")
    args = (x, dt, A, B, C, D, dt_bias, initial_states, dt_softplus, chunk_size, out_dtype or x.dtype)
    if impl == "reference":
        out, final_states, _ = _SSD.meaning(*args, impl)
    else:
        out, final_states, _ = _SSD.forward(*args, resolve(SSD_CHUNK_SCAN, impl, x.device, x.dtype))
    return (out, final_states) if return_final_states else out


# ---- registration ---------------------------------------------------------------------------------------------------

# `states` is what the backward needs besides the inputs: the fp32 (fp64 for fp64) state before every chunk of
# `chunk_size` tokens and after the last, (S + 1, B, H, P, N) with S = ceil(L / chunk_size).

SSD_CHUNK_SCAN = declare("ssd_chunk_scan", __package__, SINGLE_AND_HALF, triton=("cuda",), reference=None)


def _fake_fwd(x, dt, A, B, C, D, dt_bias, initial_states, dt_softplus, chunk_size, out_dtype, impl):
    (batch, length, heads, head_dim), n_state = x.shape, B.shape[3]
    n_chunks = (length + chunk_size - 1) // chunk_size
    out = x.new_empty(x.shape, dtype=out_dtype)
    final = x.new_empty((batch, heads, head_dim, n_state), dtype=state_dtype(x.dtype))
    return out, final, x.new_empty((n_chunks + 1, *final.shape), dtype=final.dtype)


def _fake_bwd(dout, dfinal_states, x, dt, A, B, C, D, dt_bias, initial_states, states, dt_softplus, chunk_size, impl):
    return tuple(empty_gradient(t, x) for t in (x, dt, A, B, C, D, dt_bias, initial_states))


ssd_chunk_scan_fwd = register(
    SSD_CHUNK_SCAN,
    "ssd_chunk_scan_fwd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, "
    "Tensor? initial_states, bool dt_softplus, SymInt chunk_size, ScalarType out_dtype, str impl) "
    "-> (Tensor out, Tensor final_states, Tensor states)",
    _fake_fwd,
    "forward",
)

ssd_chunk_scan_bwd = register(
    SSD_CHUNK_SCAN,
    "ssd_chunk_scan_bwd(Tensor dout, Tensor dfinal_states, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? dt_bias, Tensor? initial_states, Tensor states, bool dt_softplus, SymInt chunk_size, str impl) "
    "-> (Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor ddt_bias, "
    "Tensor dinitial_states)",
    _fake_bwd,
    "backward",
)

_SSD = Differentiable(ssd_chunk_scan_fwd, ssd_chunk_scan_bwd, reference.forward)
