"""Initial values of the parameters of a selective scan: Gu & Dao 2023, "Mamba", section 3.6; and two simpler ways.

K directions, D channels, N state, R rank of dt; in Mamba-2 R heads of D/R channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from torch import Tensor

DT_MIN, DT_MAX, DT_FLOOR = 0.001, 0.1, 1e-4
A_MAX = 16.0
INITS = ("v0", "v1", "v2")


def ssm_parameters(
    k: int, d: int, n: int, r: int, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> dict[str, nn.Parameter]:
    """A_logs (K*D, N), Ds (K*D), dt_projs_weight (K, D, R), dt_projs_bias (K, D) without values, in the checkpoints'
    order."""
    shapes = {"A_logs": (k * d, n), "Ds": (k * d,), "dt_projs_weight": (k, d, r), "dt_projs_bias": (k, d)}
    return _empty(shapes, device, dtype)


def ssd_parameters(
    k: int, d: int, r: int, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> dict[str, nn.Parameter]:
    """Ds (K, R, D/R), A_logs (K, R), dt_projs_bias (K, R) of Mamba-2's scan, likewise."""
    return _empty({"Ds": (k, r, d // r), "A_logs": (k, r), "dt_projs_bias": (k, r)}, device, dtype)


@torch.no_grad()
def reset_ssm(
    init: str,
    A_logs: Tensor,
    Ds: Tensor,
    dt_projs_weight: Tensor | None,
    dt_projs_bias: Tensor,
    dt_std: float = 0.1,
) -> None:
    """Values for `ssm_parameters`, in place; a mixer that is given its step sizes has no dt_projs_weight.

    "v0": Mamba's (A = -1..-N; step sizes log-uniform in [0.001, 0.1]). "v1": normal, `dt_std` for what makes the step
    sizes. "v2": A = -1, uniform.
    """
    nn.init.ones_(Ds)
    of_dt = [dt_projs_bias] if dt_projs_weight is None else [dt_projs_weight, dt_projs_bias]
    if init == "v0":
        reset_decay_(A_logs)
        if dt_projs_weight is not None:
            reset_projection_(dt_projs_weight)
        reset_dt_bias_(dt_projs_bias)
    elif init == "v1":
        A_logs.normal_()
        for parameter in of_dt:
            parameter.normal_(std=dt_std)
    elif init == "v2":
        A_logs.zero_()
        for parameter in of_dt:
            parameter.uniform_(0, 0.1)
    else:
        raise _unknown(init)


@torch.no_grad()
def reset_ssd(init: str, Ds: Tensor, A_logs: Tensor, dt_projs_bias: Tensor) -> None:
    """Values for `ssd_parameters`, in place.

    "v1" and "v2" as in `reset_ssm`. "v0", which the published code leaves undone, are Mamba-2's own: -A uniform in
    [1, 16], step sizes log-uniform in [0.001, 0.1] (Dao & Gu 2024, "Transformers are SSMs").
    """
    nn.init.ones_(Ds)
    if init == "v0":
        reset_head_decay_(A_logs)
        reset_dt_bias_(dt_projs_bias)
    elif init == "v1":
        A_logs.normal_()
        dt_projs_bias.normal_(std=0.1)
    elif init == "v2":
        A_logs.zero_()
        dt_projs_bias.uniform_(0, 0.1)
    else:
        raise _unknown(init)


def x_proj_parameter(
    k: int, d: int, n: int, r: int, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> nn.Parameter:
    """x_proj_weight (K, R + 2N, D) without values, rows: dt (R), B (N), C (N)."""
    return nn.Parameter(torch.empty(k, r + 2 * n, d, device=device, dtype=dtype))


# ---- values, in place: computed in float32, whatever the dtype of the parameter ----


def reset_projection_(weight: Tensor) -> None:
    """(..., inputs): uniform in +-inputs^-0.5, as in `nn.Linear`."""
    bound = weight.shape[-1] ** -0.5
    nn.init.uniform_(weight, -bound, bound)


@torch.no_grad()
def reset_decay_(A_log: Tensor) -> None:
    """(..., N): A = -1..-N."""
    A_log.copy_(torch.arange(1, A_log.shape[-1] + 1, dtype=torch.float32, device=A_log.device).log().expand_as(A_log))


@torch.no_grad()
def reset_head_decay_(A_log: Tensor) -> None:
    """Mamba-2's, one number per head: -A uniform in [1, 16]."""
    A_log.copy_(torch.empty(A_log.shape, dtype=torch.float32, device=A_log.device).uniform_(1, A_MAX).log())


@torch.no_grad()
def reset_dt_bias_(bias: Tensor) -> None:
    """softplus^-1 of step sizes drawn log-uniformly from [DT_MIN, DT_MAX], so that softplus(bias) is such a step."""
    log_min, log_max = math.log(DT_MIN), math.log(DT_MAX)
    uniform = torch.rand(bias.shape, dtype=torch.float32, device=bias.device)
    dt = torch.exp(uniform * (log_max - log_min) + log_min).clamp(min=DT_FLOOR)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def _empty(
    shapes: dict[str, tuple[int, ...]], device: torch.device | None, dtype: torch.dtype | None
) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for name, shape in shapes.items()}


def _unknown(init: str) -> ValueError:
    return ValueError(f"ssm_init={init!r} is not one of {', '.join(INITS)}")
