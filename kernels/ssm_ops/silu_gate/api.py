"""The gate of Mamba's mixers in one pass: what the scan gives, times SiLU of the other half of the input projection.

Gu & Dao 2023, "Mamba", section 3.4 (https://arxiv.org/abs/2312.00752).
"""

from __future__ import annotations

from torch import Tensor

from .._autograd import Differentiable
from .._common import check_beside, check_floating
from .._library import SINGLE_AND_HALF, declare, register, resolve
from .impl import reference


def silu_gate(y: Tensor, z: Tensor, *, scale: float = 1.0, impl: str = "auto") -> Tensor:
    """y * silu(z) * scale

    Shapes: B batch, L tokens, D channels.

    Args:
        y: (B, L, D), float32, float16, bfloat16 or float64.
        z: (B, L, D), dtype of y; any strides, half of a wider tensor too.
        scale: of the result.
        impl: "auto", "cpu" (not in float64) or "reference", which is plain PyTorch without a custom operator.

    Returns:
        (B, L, D), contiguous, dtype of y.

    Formed in float32 (float64 for float64 inputs) and rounded once, whatever autocast says. The same call gives the
    same bits. Differentiable any number of times, under `torch.func` and in forward mode, too (`_autograd.py`).

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, named.
        RuntimeError: `impl` cannot run on this device.
    """
    check_floating("silu_gate", "y", y)
    if y.dim() != 3:
        raise ValueError(f"silu_gate: y must be (B, L, D), got {tuple(y.shape)}")
    check_beside("silu_gate", "y", y, {"z": (z, [y.shape], (y.dtype,))})
    if impl == "reference":
        return _GATE.meaning(y, z, scale, impl)
    return _GATE.forward(y, z, scale, resolve(SILU_GATE, impl, y.device, y.dtype))


# ---- registration ---------------------------------------------------------------------------------------------------

SILU_GATE = declare("silu_gate", __package__, SINGLE_AND_HALF, cpu=("cpu",), reference=None)


def _fake_fwd(y, z, scale, impl):
    return y.new_empty(y.shape, dtype=y.dtype)


def _fake_bwd(dout, y, z, scale, impl):
    return y.new_empty(y.shape, dtype=y.dtype), y.new_empty(y.shape, dtype=y.dtype)


silu_gate_fwd = register(
    SILU_GATE, "silu_gate_fwd(Tensor y, Tensor z, float scale, str impl) -> Tensor out", _fake_fwd, "forward"
)

silu_gate_bwd = register(
    SILU_GATE,
    "silu_gate_bwd(Tensor dout, Tensor y, Tensor z, float scale, str impl) -> (Tensor dy, Tensor dz)",
    _fake_bwd,
    "backward",
)

_GATE = Differentiable(silu_gate_fwd, silu_gate_bwd, reference.forward)
