"""A residual addition and the norm of the sum: LayerNorm (Ba et al. 2016, https://arxiv.org/abs/1607.06450) or RMSNorm
(Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467), over the channels of every token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import FLOATING, check_beside, check_floating
from .._library import SINGLE_AND_HALF, declare, resolve, runs_eagerly
from .impl import reference


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The sum s = x + branch, and per token

        (s - mean(s)) / sqrt(var(s) + eps) * weight + bias      or, with `rms`,
        s / sqrt(mean(s^2) + eps) * weight + bias

    Shapes: C channels, the last dimension.

    Args:
        x: (..., C), float32, float16, bfloat16 or float64.
        branch: shape of x, float32, float16, bfloat16 or float64; None for the norm of x.
        weight, bias: (C,), of any of these dtypes, or None.
        out_dtype: of the normed result; None is that of the sum.
        impl: "auto", "cpu" (not in float64), or "reference", which is plain PyTorch. "cpu" is for inference: where a
            derivative is wanted, or the call is compiled, exported or transformed, "auto" takes the reference, whose
            parts PyTorch differentiates and fuses itself.

    Returns:
        the sum, in the promoted dtype of x and branch (x itself without a branch), and the normed result.

    Mean, variance and result are formed in float32 (float64) from the unrounded sum. The same call gives the same bits.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, named.
        RuntimeError: `impl` cannot run on this device, or not with derivatives.
    """
    _check(x, branch, weight, bias)
    wanted = torch.promote_types(x.dtype, x.dtype if branch is None else branch.dtype)
    args = (x, branch, weight, bias, eps, rms, wanted, out_dtype or wanted)
    eager = runs_eagerly(x, branch, weight, bias)
    if impl == "reference" or (impl == "auto" and (not eager or x.device.type != "cpu" or wanted == torch.float64)):
        return reference.forward(*args)
    chosen = resolve(ADD_NORM, impl, x.device, wanted)
    if chosen == "reference":
        return reference.forward(*args)
    if not eager:
        raise RuntimeError(f"add_norm: impl={impl!r} has no derivatives and cannot be traced; take impl='auto'")
    return ADD_NORM.find(chosen).load().forward(*args)


def _check(x, branch, weight, bias) -> None:
    check_floating("add_norm", "x", x)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"add_norm: x must be (..., C) with C > 0, got {tuple(x.shape)}")
    if branch is not None:
        check_floating("add_norm", "branch", branch)
        check_beside("add_norm", "x", x, {"branch": (branch, [x.shape], (branch.dtype,))})
    parameters = {"weight": weight, "bias": bias}
    check_beside("add_norm", "x", x, {name: (t, [x.shape[-1:]], FLOATING) for name, t in parameters.items()})


ADD_NORM = declare("add_norm", __package__, SINGLE_AND_HALF, cpu=("cpu",), reference=None)
