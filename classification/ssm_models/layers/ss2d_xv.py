"""The xv mixers of VMamba: step sizes, B and C come from the block's input, beside what is scanned, not from it.

Liu et al. 2024, "VMamba" (https://arxiv.org/abs/2401.10166), as in the original code of May 2024 (the later code
cannot run them). There is no gate, and no activation before the scan.

Shapes: B batch, H W map, L = H*W tokens, C channels of the block, D = ssm_ratio * C inner channels, N state,
R rank of dt, K = 4 routes, T channels for the step sizes: R (xv1a), D (xv2a) or K*R (xv3a).
"""

from __future__ import annotations

import torch
import torch.nn as nn
from timm.layers import is_exportable
from torch import Tensor

from ssm_ops import cross_merge, cross_scan, selective_scan, ss2d_scan

from .act import get_act
from .conv2d import Conv2d
from .forward_type import parse_xv
from .linear import get_linear, of_channels
from .ss2d import K, at_least_float32, check_conv, get_dt_rank, make_out_norm
from .ssm_init import reset_ssm, ssm_parameters


class SS2DXv(nn.Module):
    """(conv) -> in_proj to [u: D, dt: T, B: K*N, C: K*N] -> (conv) -> four scans of u -> out_norm -> out_proj.

    Every route has its own N channels of B and C, which are read along it.

    Args:
        act_layer: nothing to choose, "silu"; the convolutions' activation is part of `forward_type`.
        initialize: "v0", "v1" (of standard deviation 1 for the step sizes) or "v2", see ssm_init.py.
        forward_type: see forward_type.py.
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
        forward_type: str = "xv1a",
        channel_first: bool = False,
        impl: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        variant = parse_xv(forward_type)
        check_conv(d_conv)
        if d_conv < 2 and (variant.conv_act or not variant.in_conv):
            raise ValueError(f"forward_type={forward_type!r} describes convolutions, but there are none: conv {d_conv}")
        if act_layer.lower() != "silu":
            raise ValueError(
                f"forward_type={forward_type!r} has no use for act {act_layer!r}: leave it at 'silu'; _ca and _ca1 in "
                f"the forward type activate convolutions"
            )
        d_inner = int(ssm_ratio * d_model)
        rank = get_dt_rank(dt_rank, d_model)
        dt_dim = {"shared": rank, "given": d_inner, "routed": K * rank}[variant.dt]
        self.d_state = d_state
        self.splits = [d_inner, dt_dim, K * d_state, K * d_state]
        self.dt = variant.dt
        self.in_conv, self.proj_conv, self.out_conv = variant.in_conv, variant.proj_conv, variant.out_conv
        self.mul = variant.mul
        self.channel_first = channel_first
        self.impl = "reference" if is_exportable() else impl

        def conv(dim: int) -> nn.Module:
            return MapConv(dim, d_conv, conv_bias, channel_first, **dd) if d_conv > 1 else nn.Identity()

        self.initialize = initialize
        parameters = ssm_parameters(K, d_inner, d_state, rank, **dd)
        for name in ("dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"):
            if name != "dt_projs_weight" or self.dt != "given":
                self.register_parameter(name, parameters[name])
        self.out_norm = make_out_norm(variant.out_norm, d_inner, channel_first, **dd)
        linear = get_linear(channel_first)
        self.in_proj = linear(d_model, sum(self.splits), bias=False, **dd)
        if self.in_conv:
            self.conv2d = conv(d_model)
        if self.proj_conv:
            self.conv2d = conv(sum(self.splits))
        if self.out_conv:
            self.oconv2d = conv(d_inner)
        if self.in_conv or self.out_conv:
            self.conv_act = get_act(variant.conv_act) if variant.conv_act else nn.Identity()
        self.out_act = nn.GELU() if variant.out_act else nn.Identity()
        self.out_proj = linear(d_inner, d_model, bias=False, **dd)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        dt_weight = None if self.dt == "given" else self.dt_projs_weight
        reset_ssm(self.initialize, self.A_logs, self.Ds, dt_weight, self.dt_projs_bias, dt_std=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> the same; (B, C, H, W) with `channel_first`."""
        if self.in_conv:
            x = self.conv_act(self.conv2d(x))
        x = of_channels(self.in_proj, x, self.channel_first)
        if self.proj_conv:
            x = self.conv2d(x)
        u, dt, B, C = x.split(self.splits, dim=1 if self.channel_first else 3)
        y = self._scan_given_dt(u, dt, B, C) if self.dt == "given" else self._scan(u, dt, B, C)
        y = self.out_act(self.out_norm(y).to(u.dtype))
        if self.mul:
            y = y * u
        if self.out_conv:
            y = y + self.conv_act(self.oconv2d(u))
        return self.dropout(of_channels(self.out_proj, y, self.channel_first))

    def _scan(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """Step sizes of rank R: the scan of SS2D, with other projections per pixel. Maps in the layout of the block."""
        if self.channel_first:
            dt, B, C = (t.permute(0, 2, 3, 1) for t in (dt, B, C))
        else:
            u = u.permute(0, 3, 1, 2)
        dt = dt.unsqueeze(3).expand(-1, -1, -1, K, -1) if self.dt == "shared" else dt.unflatten(3, (K, -1))
        proj = torch.cat([dt, B.unflatten(3, (K, -1)), C.unflatten(3, (K, -1))], dim=4)
        y = ss2d_scan(
            u,
            proj.flatten(3),
            at_least_float32(self.dt_projs_weight),
            -at_least_float32(self.A_logs).exp(),
            at_least_float32(self.Ds),
            at_least_float32(self.dt_projs_bias).flatten(),
            out_dtype=self.Ds.dtype,  # as in SS2D
            impl=self.impl,
        )
        return y if self.channel_first else y.permute(0, 2, 3, 1)

    def _scan_given_dt(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """D step sizes per pixel for all routes. Maps in the layout of the block."""
        channel_dim = 1 if self.channel_first else 3
        size = u.shape[2:] if self.channel_first else u.shape[1:3]
        fields = torch.cat([t.unflatten(channel_dim, (K, -1)) for t in (B, C)], dim=channel_dim + 1)
        fields = cross_scan(fields, in_channel_first=self.channel_first, one_by_one=True, impl=self.impl)
        B, C = fields.chunk(2, dim=2)  # (B, K, N, L)
        u, dt = (cross_scan(t, in_channel_first=self.channel_first, impl=self.impl) for t in (u, dt))  # (B, K, D, L)
        y = selective_scan(
            u.flatten(1, 2),
            dt.flatten(1, 2),
            -at_least_float32(self.A_logs).exp(),
            B,
            C,
            at_least_float32(self.Ds),
            at_least_float32(self.dt_projs_bias).flatten(),
            delta_softplus=True,
            out_dtype=self.Ds.dtype,
            impl=self.impl,
        )
        y = y.unflatten(1, (K, -1)).unflatten(3, size)
        y = cross_merge(y, in_channel_first=self.channel_first, impl=self.impl)
        return y.unflatten(2 if self.channel_first else 1, size)


class MapConv(Conv2d):
    """Depthwise convolution of a map in the layout of the block."""

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        bias: bool,
        channel_first: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=bias, **dd)
        self.channel_first = channel_first

    def forward(self, x: Tensor) -> Tensor:
        if self.channel_first:
            return super().forward(x)
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
