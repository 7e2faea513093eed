"""SS2D, the mixer of VMamba: an image is read along four routes, each by a selective scan, and the results are summed.

Liu et al. 2024, "VMamba", section 4.2 (https://arxiv.org/abs/2401.10166).

Shapes: B batch, H W map, L = H*W tokens, C channels of the block, D = ssm_ratio * C inner channels, N state,
R rank of dt, K = 4 routes.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import is_exportable
from torch import Tensor

from ssm_ops import no_autocast, selective_scan, ss2d_scan

from . import onednn
from .act import get_act
from .conv2d import Conv2d, activated
from .forward_type import parse_forward_type
from .linear import get_linear, of_channels
from .norm import get_norm, normed, to_channel_first, to_channel_last
from .ssm_init import reset_projection_, reset_ssm, ssm_parameters, x_proj_parameter

K = 4


class SS2D(nn.Module):
    """in_proj -> (gate) -> depthwise conv -> act -> four scans -> out_norm -> times gate -> out_proj.

    Args:
        d_model: C.
        d_state: N.
        ssm_ratio: D = int(ssm_ratio * C).
        dt_rank: R, or "auto" for ceil(C / 16).
        act_layer: after the convolution and on the gate.
        d_conv: kernel of the depthwise convolution (odd); below 2 there is none.
        dropout: after out_proj.
        initialize: "v0", "v1" or "v2", see ssm_init.py.
        forward_type: the published name of the variant, see forward_type.py.
        channel_first: (B, C, H, W) instead of (B, H, W, C).
        impl: implementation of the operators, see `ssm_ops`; under timm's exportable flag "reference" is taken.
        device, dtype: of the parameters, as in PyTorch's layers.
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
        forward_type: str = "v2",
        channel_first: bool = False,
        impl: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        variant = parse_forward_type(forward_type)
        if variant.fixed and (act_layer.lower(), d_conv, conv_bias, initialize) != ("silu", 3, True, "v0"):
            raise ValueError(
                f"forward_type={forward_type!r} has SiLU, a 3x3 convolution with bias and init v0, nothing else: got "
                f"act {act_layer!r}, conv {d_conv}, bias {conv_bias}, init {initialize!r}. v05 leaves the choice"
            )
        check_conv(d_conv)
        linear = get_linear(channel_first)
        d_inner = int(ssm_ratio * d_model)
        self.d_state = d_state
        self.dt_rank = get_dt_rank(dt_rank, d_model)
        self.scans, self.scan_fp32, self.gated = variant.scans, variant.scan_fp32, variant.gate
        self.channel_first = channel_first
        self.folded = self.packed = None
        self.impl = "reference" if is_exportable() else impl

        self.initialize = initialize
        self.x_proj_weight = x_proj_parameter(K, d_inner, d_state, self.dt_rank, **dd)
        for name, parameter in ssm_parameters(K, d_inner, d_state, self.dt_rank, **dd).items():
            self.register_parameter(name, parameter)

        out_norm = make_out_norm(variant.out_norm, d_inner, channel_first, **dd)
        if not variant.fixed:  # this place in the order of the parameters belongs to the checkpoints
            self.out_norm = out_norm
        self.in_proj = linear(d_model, d_inner * (2 if variant.gate else 1), bias=False, **dd)
        if d_conv > 1:
            conv = {"groups": d_inner, "padding": d_conv // 2, "bias": conv_bias}
            self.conv2d = Conv2d(d_inner, d_inner, d_conv, **conv, **dd)
        else:
            self.conv2d = nn.Identity()
        self.act = get_act(act_layer)
        if variant.gate:
            self.gate_act = get_act(act_layer) if variant.gate_act else nn.Identity()
        if variant.fixed:
            self.out_norm = out_norm
        self.out_act = nn.GELU() if variant.out_act else nn.Identity()
        self.out_proj = linear(d_inner, d_model, bias=False, **dd)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_projection_(self.x_proj_weight)
        reset_ssm(self.initialize, self.A_logs, self.Ds, self.dt_projs_weight, self.dt_projs_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> the same; (B, C, H, W) with `channel_first`."""
        x = of_channels(self.in_proj, x, self.channel_first)
        gate = None
        if self.gated:
            x, gate = x.chunk(2, dim=1 if self.channel_first else -1)
            gate = self.gate_act(gate)
        if not self.channel_first:
            x = x.permute(0, 3, 1, 2)
        x = activated(self.conv2d, self.act, x)  # (B, D, H, W)
        y = self._cascade(x) if self.scans == "cascade2d" else self._scan_map(x)
        y = self.out_act(normed(self.out_norm, y).to(x.dtype))
        if gate is not None:
            y = y * gate
        return self.dropout(of_channels(self.out_proj, y, self.channel_first))

    def fold_constants(self, dtype: torch.dtype) -> None:
        """For inference with products in `dtype`: what the scan needs of the parameters, once."""
        self.folded = self._parameters_of_scan()
        self.packed = onednn.pack_linear(self.x_proj_weight.detach().flatten(0, 1).to(dtype))

    def _parameters_of_scan(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt_weight (K, D, R), A (K*D, N), D (K*D), dt_bias (K*D) in float32 (or float64)."""
        if self.folded is not None:
            return self.folded
        A_logs, Ds = at_least_float32(self.A_logs), at_least_float32(self.Ds)
        weight, bias = at_least_float32(self.dt_projs_weight), at_least_float32(self.dt_projs_bias)
        return weight, -A_logs.exp(), Ds, bias.flatten()

    def _project(self, tokens: Tensor) -> Tensor:
        """(B, H, W, D) -> what the scan reads beside them, (B, H, W, K * (R + 2N))."""
        weight = self.x_proj_weight.flatten(0, 1)
        if self.packed is not None:
            return onednn.linear(tokens, self.packed, None)
        return onednn.linear(tokens, weight, None) if onednn.takes(tokens, weight) else F.linear(tokens, weight)

    def _scan_map(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> the sum over the routes, (B, H, W, D), or (B, D, H, W) with `channel_first`."""
        proj = self._project(x.permute(0, 2, 3, 1))
        dtype = torch.promote_types(x.dtype, torch.float32 if self.scan_fp32 else proj.dtype)
        y = ss2d_scan(
            x.to(dtype),
            proj.to(dtype),
            *self._parameters_of_scan(),
            scans=self.scans,
            out_dtype=self.Ds.dtype,  # float32 for the norm, but in a model of half-precision weights theirs
            impl=self.impl,
        )
        return y if self.channel_first else y.permute(0, 2, 3, 1)

    def _cascade(self, x: Tensor) -> Tensor:
        """Each row both ways, then each column both ways; layouts as `_scan_map`.

        The backward pass of a pair is added without being reversed again. Nobody has said why, but it is the published
        model, and weights depend on it. All of it is in float32, as the norms' results are, whatever autocast says.
        """
        with no_autocast(x.device.type):
            x = self._cascade_in_float32(x).to(self.Ds.dtype)
        return x if self.channel_first else x.permute(0, 2, 3, 1)

    def _cascade_in_float32(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> the same."""
        weight, A, Ds, bias = self._parameters_of_scan()
        x_proj, x = self.x_proj_weight.to(weight.dtype), x.to(weight.dtype)
        for first, line_dim in ((0, 2), (2, 3)):
            which = slice(first, first + 2)
            x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2])  # (B, H, W, D)
            lines = x.permute(0, 1, 3, 2) if line_dim == 2 else x.permute(0, 2, 3, 1)  # (B, lines, D, length)
            sequence = lines.flatten(0, 1)
            u = torch.stack([sequence, sequence.flip(2)], 1)  # (B*lines, 2, D, length)
            dt, B, C = (x_proj[which] @ u).split([self.dt_rank, self.d_state, self.d_state], dim=2)
            y = selective_scan(
                u.flatten(1, 2),
                (weight[which] @ dt).flatten(1, 2),
                A.unflatten(0, (K, -1))[which].flatten(0, 1),
                B,
                C,
                Ds.unflatten(0, (K, -1))[which].flatten(),
                bias.unflatten(0, (K, -1))[which].flatten(),
                delta_softplus=True,
                impl=self.impl,
            )
            x = y.unflatten(1, (2, -1)).sum(1).unflatten(0, lines.shape[:2])  # (B, lines, D, length)
            x = x.permute(0, 2, 1, 3) if line_dim == 2 else x.permute(0, 2, 3, 1)  # (B, D, H, W)
        return x


# ---- shared by the mixers of VMamba ----


def get_dt_rank(dt_rank: int | str, d_model: int) -> int:
    return math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank


def check_conv(d_conv: int) -> None:
    if d_conv > 1 and d_conv % 2 == 0:
        raise ValueError(f"d_conv={d_conv} must be odd, or below 2 for no convolution")


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def make_out_norm(
    kind: str,
    dim: int,
    channel_first: bool,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The norm between scan and out_proj, for the layout of the block. Sequential indices are checkpoint keys."""
    first, last = (nn.Identity, nn.Identity) if channel_first else (to_channel_first, to_channel_last)
    norm = get_norm("ln2d" if channel_first else "ln")
    dd = {"device": device, "dtype": dtype}
    conv = {"kernel_size": 3, "padding": 1, "groups": dim, "bias": False, **dd}
    if kind == "ln":
        return norm(dim, **dd)
    if kind == "none":
        return nn.Identity()
    if kind == "sigmoid":
        return nn.Sigmoid()
    if kind == "softmax":
        return SpatialSoftmax(channel_first)
    if kind == "dwconv3":
        return nn.Sequential(first(), Conv2d(dim, dim, **conv), last())
    return nn.Sequential(norm(dim, **dd), first(), Conv2d(dim, dim, **conv), last())  # cnorm


class SpatialSoftmax(nn.Module):
    """Softmax over the positions of a map, per channel."""

    def __init__(self, channel_first: bool):
        super().__init__()
        self.dims = (2, 3) if channel_first else (1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return (
            x.flatten(*self.dims)
            .softmax(self.dims[0])
            .unflatten(self.dims[0], x.shape[self.dims[0] : self.dims[1] + 1])
        )
