"""The mixer of VMamba's m models: the four routes of SS2D, each read by the scan of Mamba-2.

Liu et al. 2024, "VMamba" (https://arxiv.org/abs/2401.10166); Dao & Gu 2024, "Transformers are SSMs", section 7
(https://arxiv.org/abs/2405.21060).

Shapes: B batch, H W map, L = H*W tokens, C channels of the block, D = ssm_ratio * C inner channels, N state,
K = 4 routes, R heads of a route with P = D / R channels each.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import is_exportable
from torch import Tensor

from ssm_ops import cross_merge, cross_scan, ssd_chunk_scan

from .act import get_act
from .conv2d import Conv2d
from .forward_type import parse_m0
from .linear import get_linear, of_channels
from .norm import to_channel_first, to_channel_last
from .ss2d import K, at_least_float32, check_conv, get_dt_rank, make_out_norm
from .ssm_init import reset_projection_, reset_ssd, ssd_parameters, x_proj_parameter


class SS2DM0(nn.Module):
    """in_proj -> (gate) -> depthwise conv -> act -> four scans of R heads -> out_norm -> times gate -> out_proj.

    Args:
        dt_rank: R, a divisor of D, or "auto" for ceil(C / 16): here the number of heads of a route.
        initialize: "v0", "v1" or "v2", see ssm_init.py.
        forward_type: see forward_type.py.
        initial_state: the scans start from a parameter, zero at first, that no training changes, instead of from zero.
        others: as of `SS2D`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | str = "auto",
        act_layer: str = "silu",
        d_conv: int = 3,
        conv_bias: bool = True,
        dropout: float = 0.0,
        initialize: str = "v0",
        forward_type: str = "m0",
        channel_first: bool = False,
        initial_state: bool = False,
        impl: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        variant = parse_m0(forward_type)
        check_conv(d_conv)
        d_inner = int(ssm_ratio * d_model)
        self.d_state = d_state
        self.dt_rank = get_dt_rank(dt_rank, d_model)
        if d_inner % self.dt_rank:
            raise ValueError(
                f"forward_type={forward_type!r}: dt_rank={self.dt_rank}, the heads, must divide the {d_inner} channels"
            )
        self.gated = variant.gate
        self.channel_first = channel_first
        self.impl = "reference" if is_exportable() else impl

        self.initialize = initialize
        self.x_proj_weight = x_proj_parameter(K, d_inner, d_state, self.dt_rank, **dd)
        for name, parameter in ssd_parameters(K, d_inner, self.dt_rank, **dd).items():
            self.register_parameter(name, parameter)
        state = torch.empty(1, K * self.dt_rank, d_inner // self.dt_rank, d_state, **dd)
        self.initial_state = nn.Parameter(state, requires_grad=False) if initial_state else None
        self.out_norm = make_out_norm(variant.out_norm, d_inner, channel_first, **dd)
        linear = get_linear(channel_first)
        self.in_proj = linear(d_model, d_inner * (2 if variant.gate else 1), bias=False, **dd)
        if d_conv > 1:  # the place in the Sequential is a checkpoint key
            conv = {"groups": d_inner, "padding": d_conv // 2, "bias": conv_bias}
            self.conv2d = nn.Sequential(
                nn.Identity() if channel_first else to_channel_first(),
                Conv2d(d_inner, d_inner, d_conv, **conv, **dd),
                nn.Identity() if channel_first else to_channel_last(),
            )
        else:
            self.conv2d = nn.Identity()
        self.act = get_act(act_layer)
        if variant.gate:
            self.gate_act = get_act(act_layer) if variant.gate_act else nn.Identity()
        self.out_act = nn.GELU() if variant.out_act else nn.Identity()
        self.out_proj = linear(d_inner, d_model, bias=False, **dd)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_projection_(self.x_proj_weight)
        reset_ssd(self.initialize, self.Ds, self.A_logs, self.dt_projs_bias)
        if self.initial_state is not None:
            nn.init.zeros_(self.initial_state)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> the same; (B, C, H, W) with `channel_first`."""
        x = of_channels(self.in_proj, x, self.channel_first)
        gate = None
        if self.gated:
            x, gate = x.chunk(2, dim=1 if self.channel_first else -1)
            gate = self.gate_act(gate)
        x = self.act(self.conv2d(x))
        y = self.out_act(self.out_norm(self._scan_map(x)).to(x.dtype))
        if gate is not None:
            y = y * gate
        return self.dropout(of_channels(self.out_proj, y, self.channel_first))

    def _scan_map(self, x: Tensor) -> Tensor:
        """A map of D channels -> the sum over the routes, both in the layout of the block."""
        size = x.shape[2:] if self.channel_first else x.shape[1:3]
        # a route only permutes pixels: what they are projected to is the same before and after it
        fields = F.linear(x.permute(0, 2, 3, 1) if self.channel_first else x, self.x_proj_weight.flatten(0, 1))
        fields = fields.to(x.dtype).unflatten(3, (K, -1))  # (B, H, W, K, R + 2N)
        fields = cross_scan(fields, in_channel_first=False, out_channel_first=False, one_by_one=True, impl=self.impl)
        dt, B, C = fields.split([self.dt_rank, self.d_state, self.d_state], dim=3)  # (B, L, K, .)
        u = cross_scan(x, in_channel_first=self.channel_first, out_channel_first=False, impl=self.impl)
        state = self.initial_state
        if state is not None:
            state = at_least_float32(state).expand(len(x), -1, -1, -1)
        y = ssd_chunk_scan(
            u.unflatten(3, (self.dt_rank, -1)).flatten(2, 3),  # (B, L, K*R, P)
            dt.flatten(2),
            -at_least_float32(self.A_logs).exp().flatten(),
            B,
            C,
            D=at_least_float32(self.Ds).flatten(0, 1),
            dt_bias=at_least_float32(self.dt_projs_bias).flatten(),
            initial_states=state,
            dt_softplus=True,
            out_dtype=self.Ds.dtype,  # as in SS2D
            impl=self.impl,
        )
        y = y.flatten(2).unflatten(2, (K, -1)).unflatten(1, size)  # (B, H, W, K, D)
        y = cross_merge(y, in_channel_first=self.channel_first, out_channel_first=False, impl=self.impl)
        return y.unflatten(2 if self.channel_first else 1, size)
