"""Non-causal state space duality (NC-SSD), the mixer of VSSD: every token sees every token, weighted but not decayed.

Shi et al. 2024, "VSSD: Vision Mamba with Non-Causal State Space Duality", section 3.2
(https://arxiv.org/abs/2407.18559).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import Differentiable
from .._common import check_ssd, empty_gradient, state_dtype
from .._library import SINGLE_AND_HALF, declare, register, resolve
from .impl import reference


def nc_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    positive: bool = True,
    bfloat16_products: bool = False,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """For every sample and head j, with group g = j mod G, over all tokens t = 0..L-1:

        s_t = dt_t + dt_bias                    (softplus of it with dt_softplus; identity above 20)
        w_t = -s_t A                            (s_t A if not `positive`)
        S   = sum_t w_t x_t B_t^T               (P x N numbers, one state for the whole image)
        y_t = S C_t + D x_t

    Shapes: B batch, L length, H heads, P channels of a head, N state, G groups.

    Args:
        x: (B, L, H, P), float32, float16, bfloat16 or float64; any strides.
        dt: (B, L, H), in the dtype of x or in float32 (float64 where x is).
        A: (H,), negative by custom, as D and dt_bias in float32 (float64 where x is).
        B, C: (B, L, G, N). G divides H: groups take turns over the heads, unlike in `ssd_chunk_scan`, where
            neighbouring heads share a group. Dtype of x.
        D: (H,) or (H, P), the skip connection.
        dt_bias: (H,).
        positive: the sign of the weights; True is that of all published VSSD models.
        bfloat16_products: multiply bfloat16 inputs as they are, for processors that have units for it. All that is
            multiplied is rounded to bfloat16, w x and the state too, and so is, once, what comes out; the sums of a
            product are float32. No effect on other dtypes, nor on the CPU library, whose products are float32.
        out_dtype: of the result; None is that of x.
        impl: "auto", "cpu" (not in float64) or "reference", which is plain PyTorch without a custom operator, also
            under ``torch.export``.

    Returns:
        (B, L, H, P), contiguous.

    The order of the tokens does not matter. The state is a sum over all tokens, not a mean: it grows with the image.
    It and all sums are kept in float32 (float64 for float64 inputs), whatever autocast says; but see
    `bfloat16_products`. Gradients come in the dtype of their input. The same call gives the same bits.

    Can be differentiated any number of times, also by `torch.func` and in forward mode. The first gradient is computed
    by the chosen implementation, all others by the reference (see `_autograd.py`).

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, named.
        RuntimeError: `impl` cannot run on this device.
    """
    check_ssd("nc_ssd", x, dt, A, B, C, D, dt_bias)
    args = (x, dt, A, B, C, D, dt_bias, dt_softplus, positive, bfloat16_products, out_dtype or x.dtype)
    if impl == "reference":
        return _NC_SSD.meaning(*args, impl)[0]
    return _NC_SSD.forward(*args, resolve(NC_SSD, impl, x.device, x.dtype))[0]


# ---- registration ---------------------------------------------------------------------------------------------------

# `state` is what the backward needs besides the inputs: the sum over all tokens, (B, H, N, P), fp32 (fp64 for fp64).

NC_SSD = declare("nc_ssd", __package__, SINGLE_AND_HALF, cpu=("cpu",), reference=None)


def _fake_fwd(x, dt, A, B, C, D, dt_bias, dt_softplus, positive, bfloat16_products, out_dtype, impl):
    batch, _, heads, head_dim = x.shape
    state = x.new_empty((batch, heads, B.shape[3], head_dim), dtype=state_dtype(x.dtype))
    return x.new_empty(x.shape, dtype=out_dtype), state


def _fake_bwd(dout, x, dt, A, B, C, D, dt_bias, state, dt_softplus, positive, bfloat16_products, impl):
    return tuple(empty_gradient(t, x) for t in (x, dt, A, B, C, D, dt_bias))


nc_ssd_fwd = register(
    NC_SSD,
    "nc_ssd_fwd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus, "
    "bool positive, bool bfloat16_products, ScalarType out_dtype, str impl) -> (Tensor out, Tensor state)",
    _fake_fwd,
    "forward",
)

nc_ssd_bwd = register(
    NC_SSD,
    "nc_ssd_bwd(Tensor dout, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, "
    "Tensor state, bool dt_softplus, bool positive, bool bfloat16_products, str impl) "
    "-> (Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor ddt_bias)",
    _fake_bwd,
    "backward",
)

_NC_SSD = Differentiable(nc_ssd_fwd, nc_ssd_bwd, reference.forward)
