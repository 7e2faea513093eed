"""Initial values of the parameters of a selective scan: Gu & Dao 2023, "Mamba", section 3.6; and two simpler ways.

K directions, D channels, N state, R rank of dt; in Mamba-2 R heads of D/R channels. All parameters are float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn

DT_MIN, DT_MAX, DT_FLOOR = 0.001, 0.1, 1e-4
A_MAX = 16.0
INITS = ("v0", "v1", "v2")


def ssm_parameters(init: str, k: int, d: int, n: int, r: int, dt_std: float = 0.1) -> dict[str, nn.Parameter]:
    """Fresh A_logs (K*D, N), Ds (K*D), dt_projs_weight (K, D, R), dt_projs_bias (K, D), in the checkpoints' order.

    "v0": Mamba's (A = -1..-N; step sizes log-uniform in [0.001, 0.1]). "v1": normal, `dt_std` for what makes the step
    sizes. "v2": A = -1, uniform.
    """
    if init == "v0":
        a_logs = torch.arange(1, n + 1, dtype=torch.float32).log().repeat(k * d, 1)
        dt_weight = torch.empty(k, d, r).uniform_(-(r**-0.5), r**-0.5)
        dt_bias = mamba_dt_bias(k, d)
    elif init == "v1":
        a_logs, dt_weight, dt_bias = torch.randn(k * d, n), dt_std * torch.randn(k, d, r), dt_std * torch.randn(k, d)
    elif init == "v2":
        a_logs, dt_weight, dt_bias = torch.zeros(k * d, n), 0.1 * torch.rand(k, d, r), 0.1 * torch.rand(k, d)
    else:
        raise _unknown(init)
    return _parameters(A_logs=a_logs, Ds=torch.ones(k * d), dt_projs_weight=dt_weight, dt_projs_bias=dt_bias)


def ssd_parameters(init: str, k: int, d: int, r: int) -> dict[str, nn.Parameter]:
    """Fresh Ds (K, R, D/R), A_logs (K, R), dt_projs_bias (K, R) of Mamba-2's scan, in the checkpoints' order.

    "v1" and "v2" as in `ssm_parameters`. "v0", which the published code leaves undone, are Mamba-2's own: -A uniform in
    [1, 16], step sizes log-uniform in [0.001, 0.1] (Dao & Gu 2024, "Transformers are SSMs").
    """
    if init == "v0":
        a_logs, dt_bias = torch.empty(k, r).uniform_(1, A_MAX).log(), mamba_dt_bias(k, r)
    elif init == "v1":
        a_logs, dt_bias = torch.randn(k, r), 0.1 * torch.randn(k, r)
    elif init == "v2":
        a_logs, dt_bias = torch.zeros(k, r), 0.1 * torch.rand(k, r)
    else:
        raise _unknown(init)
    return _parameters(Ds=torch.ones(k, r, d // r), A_logs=a_logs, dt_projs_bias=dt_bias)


def x_proj_parameter(k: int, d: int, n: int, r: int) -> nn.Parameter:
    """Fresh x_proj_weight (K, R + 2N, D), rows: dt (R), B (N), C (N); uniform as in `nn.Linear`."""
    return nn.Parameter(torch.empty(k, r + 2 * n, d).uniform_(-(d**-0.5), d**-0.5))


def mamba_dt_bias(*shape: int) -> torch.Tensor:
    """softplus^-1 of step sizes drawn log-uniformly from [DT_MIN, DT_MAX], so that softplus(bias) is such a step."""
    log_min, log_max = math.log(DT_MIN), math.log(DT_MAX)
    dt = torch.exp(torch.rand(*shape) * (log_max - log_min) + log_min).clamp(min=DT_FLOOR)
    return dt + torch.log(-torch.expm1(-dt))


def _parameters(**tensors: torch.Tensor) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value) for name, value in tensors.items()}


def _unknown(init: str) -> ValueError:
    return ValueError(f"ssm_init={init!r} is not one of {', '.join(INITS)}")
