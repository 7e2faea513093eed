"""The mixer of Vision Mamba: a selective scan over a sequence in one or in both directions.

Zhu et al. 2024, "Vision Mamba", algorithm 1 (https://arxiv.org/abs/2401.09417).

Shapes: B batch, L tokens, C channels of the model, E channels of the scan, N state, R rank of dt, S directions.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import is_exportable
from torch import Tensor

from ssm_ops import causal_conv1d, selective_scan

from .ssm_init import mamba_dt_bias

BIMAMBA_TYPES = ("none", "v1", "v2")


class BiMamba(nn.Module):
    """in_proj -> [causal conv -> SiLU -> scan] forwards and backwards -> sum -> times gate -> out_proj.

    Both directions are one convolution and one scan of twice the channels, the second half on the reversed sequence.

    Args:
        d_model: C.
        d_state: N.
        d_conv: taps of the causal convolution.
        expand: E = int(expand * C).
        dt_rank: R, or "auto" for ceil(C / 16).
        conv_bias, bias: of the convolution; of in_proj and out_proj.
        bimamba_type: "none" scans forwards only. "v1" shares all parameters but A, and convolves forwards only. "v2"
            (published) has parameters of its own for the way back, named `*_b`.
        if_divide_out: halve the sum of the two directions; only "v2" does.
        init_layer_scale: initial value of factors per channel of the output, `gamma`; None for none.
        impl: implementation of the operators, see `ssm_ops`; under timm's exportable flag "reference" is taken.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        conv_bias: bool = True,
        bias: bool = False,
        bimamba_type: str = "v2",
        if_divide_out: bool = True,
        init_layer_scale: float | None = None,
        impl: str = "auto",
    ):
        super().__init__()
        if bimamba_type not in BIMAMBA_TYPES:
            raise ValueError(f"bimamba_type={bimamba_type!r} is not one of {', '.join(BIMAMBA_TYPES)}")
        self.d_state = d_state
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.bimamba_type = bimamba_type
        self.halve = if_divide_out and bimamba_type == "v2"
        self.impl = "reference" if is_exportable() else impl
        d_inner = int(expand * d_model)

        def decay() -> nn.Parameter:
            return nn.Parameter(torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(d_inner, 1))

        def conv() -> nn.Conv1d:
            return nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1, bias=conv_bias)

        # the order of all these belongs to the checkpoints
        self.gamma = None if init_layer_scale is None else nn.Parameter(torch.full((d_model,), init_layer_scale))
        self.A_log, self.D = decay(), nn.Parameter(torch.ones(d_inner))
        if bimamba_type != "none":
            self.A_b_log = decay()
        if bimamba_type == "v2":
            self.D_b = nn.Parameter(torch.ones(d_inner))
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=bias)
        self.conv1d = conv()
        self.x_proj = nn.Linear(d_inner, self.dt_rank + 2 * d_state, bias=False)  # rows: dt (R), B (N), C (N)
        self.dt_proj = nn.Linear(self.dt_rank, d_inner)
        if bimamba_type == "v2":
            self.conv1d_b = conv()
            self.x_proj_b = nn.Linear(d_inner, self.dt_rank + 2 * d_state, bias=False)
            self.dt_proj_b = nn.Linear(self.dt_rank, d_inner)
            # The published models start the way back without Mamba's initial step sizes: softplus(0) = 0.69.
            nn.init.zeros_(self.dt_proj_b.bias)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        with torch.no_grad():
            self.dt_proj.bias.copy_(mamba_dt_bias(d_inner))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> the same."""
        x, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # (B, E, L) each
        if self.bimamba_type == "none":
            y = self._scan(self._conv(x, [self.conv1d]), [self.x_proj], [self.dt_proj], [self.A_log], [self.D])
        else:
            forwards, backwards = self._both_ways(x).chunk(2, dim=1)
            y = forwards + backwards.flip(2)
        y = y * F.silu(z)
        y = self.out_proj((0.5 * y if self.halve else y).transpose(1, 2))
        return y if self.gamma is None else y * self.gamma

    def _both_ways(self, x: Tensor) -> Tensor:
        """(B, E, L) -> (B, 2E, L): the scan, then the scan of the reversed sequence, still reversed."""
        decays = [self.A_log, self.A_b_log]
        if self.bimamba_type == "v1":
            u = self._conv(x, [self.conv1d])  # causal forwards for both directions, as published
            u = torch.cat([u, u.flip(2)], 1)
            return self._scan(u, [self.x_proj] * 2, [self.dt_proj] * 2, decays, [self.D] * 2)
        u = self._conv(torch.cat([x, x.flip(2)], 1), [self.conv1d, self.conv1d_b])
        return self._scan(u, [self.x_proj, self.x_proj_b], [self.dt_proj, self.dt_proj_b], decays, [self.D, self.D_b])

    def _conv(self, x: Tensor, convs: list[nn.Conv1d]) -> Tensor:
        """(B, S*E, L) -> SiLU of the causal convolutions, one per direction."""
        weight = torch.cat([conv.weight for conv in convs]).squeeze(1)
        bias = None if convs[0].bias is None else torch.cat([conv.bias for conv in convs])
        return causal_conv1d(x, weight, bias, activation="silu", impl=self.impl)

    def _scan(self, u: Tensor, x_projs, dt_projs, A_logs, Ds) -> Tensor:
        """(B, S*E, L) -> the same; lists of S modules and parameters."""
        by_direction = u.unflatten(1, (len(A_logs), -1))
        projected = torch.stack([proj.weight for proj in x_projs]) @ by_direction  # (B, S, R + 2N, L)
        dt, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=2)
        delta = torch.stack([proj.weight for proj in dt_projs]) @ dt  # (B, S, E, L)
        return selective_scan(
            u,
            delta.flatten(1, 2).to(u.dtype),
            -torch.cat([_at_least_float32(A_log) for A_log in A_logs]).exp(),
            B.to(u.dtype),
            C.to(u.dtype),
            torch.cat([_at_least_float32(D) for D in Ds]),
            torch.cat([_at_least_float32(proj.bias) for proj in dt_projs]),
            delta_softplus=True,
            impl=self.impl,
        )


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
