"""Initial values of the parameters of a selective scan: Gu & Dao 2023, "Mamba", section 3.6; and two simpler ways.

K directions, D channels, N state, R rank of dt. Parameters: A_logs (K*D, N), Ds (K*D), dt_projs_weight (K, D, R),
dt_projs_bias (K, D), all float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn

DT_MIN, DT_MAX, DT_FLOOR = 0.001, 0.1, 1e-4
INITS = ("v0", "v1", "v2")


def ssm_parameters(init: str, k: int, d: int, n: int, r: int) -> dict[str, nn.Parameter]:
    """Fresh parameters by name, in the order of the checkpoints.

    "v0": Mamba's (A = -1..-N; step sizes log-uniform in [0.001, 0.1]). "v1": normal. "v2": A = -1, uniform.
    """
    if init == "v0":
        a_logs = torch.arange(1, n + 1, dtype=torch.float32).log().repeat(k * d, 1)
        dt_weight = torch.empty(k, d, r).uniform_(-(r**-0.5), r**-0.5)
        dt_bias = mamba_dt_bias(k, d)
    elif init == "v1":
        a_logs, dt_weight, dt_bias = torch.randn(k * d, n), 0.1 * torch.randn(k, d, r), 0.1 * torch.randn(k, d)
    elif init == "v2":
        a_logs, dt_weight, dt_bias = torch.zeros(k * d, n), 0.1 * torch.rand(k, d, r), 0.1 * torch.rand(k, d)
    else:
        raise ValueError(f"ssm_init={init!r} is not one of {', '.join(INITS)}")
    tensors = {"A_logs": a_logs, "Ds": torch.ones(k * d), "dt_projs_weight": dt_weight, "dt_projs_bias": dt_bias}
    return {name: nn.Parameter(value) for name, value in tensors.items()}


def mamba_dt_bias(*shape: int) -> torch.Tensor:
    """softplus^-1 of step sizes drawn log-uniformly from [DT_MIN, DT_MAX], so that softplus(bias) is such a step."""
    log_min, log_max = math.log(DT_MIN), math.log(DT_MAX)
    dt = torch.exp(torch.rand(*shape) * (log_max - log_min) + log_min).clamp(min=DT_FLOOR)
    return dt + torch.log(-torch.expm1(-dt))
