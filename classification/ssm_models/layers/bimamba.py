"""The mixer of Vision Mamba: a selective scan over a sequence in one or in both directions.

Zhu et al. 2024, "Vision Mamba", algorithm 1 (https://arxiv.org/abs/2401.09417).

Shapes: B batch, L tokens, C channels of the model, E channels of the scan, N state, R rank of dt.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import is_exportable
from torch import Tensor

from ssm_ops import bidirectional_scan, causal_conv1d, no_autocast, selective_scan, silu_gate

from .linear import Linear
from .onednn import is_plain
from .ssm_init import reset_decay_, reset_dt_bias_, reset_projection_

BIMAMBA_TYPES = ("none", "v1", "v2")


class BiMamba(nn.Module):
    """in_proj -> [causal conv -> SiLU -> scan] forwards and backwards -> sum -> times gate -> out_proj.

    Both directions are one operator, `ssm_ops.bidirectional_scan`, which reads the weight of `dt_proj`, as
    `ssm_ops.causal_conv1d` does that of `conv1d`; activations stay (B, L, E) all the way. Where there is more to these
    layers than their weights (adapters, parametrisations, quantised layers, hooks), they are called, at the speed of a
    composition.

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
        impl: implementation of the scan, see `ssm_ops`; convolution and gate take the fastest there is, or "reference"
            with the scan. Under timm's exportable flag all do.
        device, dtype: of the parameters, as in PyTorch's layers.
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
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if bimamba_type not in BIMAMBA_TYPES:
            raise ValueError(f"bimamba_type={bimamba_type!r} is not one of {', '.join(BIMAMBA_TYPES)}")
        self.d_state = d_state
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.bimamba_type = bimamba_type
        self.halve = if_divide_out and bimamba_type == "v2"
        self.folded = None
        self.impl = "reference" if is_exportable() else impl
        self.side_impl = "reference" if self.impl == "reference" else "auto"  # of convolution and gate
        d_inner = int(expand * d_model)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **dd))

        def conv() -> nn.Conv1d:
            return nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1, bias=conv_bias, **dd)

        # the order of all these belongs to the checkpoints
        self.init_layer_scale = init_layer_scale
        self.gamma = None if init_layer_scale is None else empty(d_model)
        self.A_log, self.D = empty(d_inner, d_state), empty(d_inner)
        if bimamba_type != "none":
            self.A_b_log = empty(d_inner, d_state)
        if bimamba_type == "v2":
            self.D_b = empty(d_inner)
        self.in_proj = Linear(d_model, 2 * d_inner, bias=bias, **dd)
        self.conv1d = conv()
        self.x_proj = Linear(d_inner, self.dt_rank + 2 * d_state, bias=False, **dd)  # rows: dt (R), B (N), C (N)
        self.dt_proj = nn.Linear(self.dt_rank, d_inner, **dd)
        if bimamba_type == "v2":
            self.conv1d_b = conv()
            self.x_proj_b = Linear(d_inner, self.dt_rank + 2 * d_state, bias=False, **dd)
            self.dt_proj_b = nn.Linear(self.dt_rank, d_inner, **dd)
        self.out_proj = Linear(d_inner, d_model, bias=bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Values of its own parameters, and of the projections to the step sizes."""
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.init_layer_scale)
        reset_decay_(self.A_log)
        nn.init.ones_(self.D)
        if self.bimamba_type != "none":
            reset_decay_(self.A_b_log)
        if self.bimamba_type == "v2":
            nn.init.ones_(self.D_b)
            # The published models start the way back without Mamba's initial step sizes: softplus(0) = 0.69.
            nn.init.zeros_(self.dt_proj_b.bias)
        reset_projection_(self.dt_proj.weight)
        reset_dt_bias_(self.dt_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> the same."""
        x, z = self.in_proj(x).chunk(2, dim=2)  # (B, L, E) each
        y = self._forwards(x) if self.bimamba_type == "none" else self._both_ways(x)
        y = self.out_proj(silu_gate(y, z.to(y.dtype), scale=0.5 if self.halve else 1.0, impl=self.side_impl))
        return y if self.gamma is None else y * self.gamma

    def _conv(self, x: Tensor, conv: nn.Module, reverse: bool = False) -> Tensor:
        """(B, L, E) -> SiLU of the causal convolution, from the end with `reverse`."""
        if not is_plain(conv, nn.Conv1d):
            u = x.flip(1) if reverse else x
            u = F.silu(conv(u.transpose(-2, -1))[..., : x.shape[1]]).transpose(-2, -1).to(x.dtype)
            return u.flip(1) if reverse else u
        weight, impl = conv.weight.squeeze(1), self.side_impl
        u = causal_conv1d(x.transpose(-2, -1), weight, conv.bias, activation="silu", reverse=reverse, impl=impl)
        return u.transpose(-2, -1)

    def _both_ways(self, x: Tensor) -> Tensor:
        """(B, L, E) -> the sum of the scans in both directions."""
        shared = self.bimamba_type == "v1"
        there = self._conv(x, self.conv1d)
        # v1 convolves forwards for both ways, as published
        back = there if shared else self._conv(x, self.conv1d_b, reverse=True)
        proj = [self.x_proj(there), (self.x_proj if shared else self.x_proj_b)(back)]
        if not self._has_plain_steps():
            y = self._scan(back.flip(1), proj[1].flip(1), *self._of_the_way_back())
            return self._scan(there, proj[0], self.dt_proj, self.A_log, self.D) + y.flip(1)
        proj = torch.cat(proj, 2).to(there.dtype)
        return bidirectional_scan(there, back, proj, *self._parameters_of_scan(), impl=self.impl)

    def _of_the_way_back(self) -> tuple[nn.Module, Tensor, Tensor]:
        """Its dt_proj, A_b_log and D."""
        if self.bimamba_type == "v1":
            return self.dt_proj, self.A_b_log, self.D
        return self.dt_proj_b, self.A_b_log, self.D_b

    def _has_plain_steps(self) -> bool:
        """Whether the step sizes of both directions are no more than products with weights."""
        return is_plain(self.dt_proj, nn.Linear) and (self.bimamba_type == "v1" or is_plain(self.dt_proj_b, nn.Linear))

    def fold_constants(self, dtype: torch.dtype) -> None:
        """For inference: what the scan of both directions needs of the parameters, once. They stay in float32."""
        if self.bimamba_type != "none" and self._has_plain_steps():
            self.folded = self._parameters_of_scan()

    def _parameters_of_scan(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of both directions: dt_weight (2, E, R), A (2E, N), D (2E), dt_bias (2E) in float32 (or float64)."""
        if self.folded is not None:
            return self.folded
        dt_proj, A_b_log, D = self._of_the_way_back()
        return (
            _at_least_float32(torch.stack([self.dt_proj.weight, dt_proj.weight])),
            -torch.cat([_at_least_float32(self.A_log), _at_least_float32(A_b_log)]).exp(),
            _at_least_float32(torch.cat([self.D, D])),
            _at_least_float32(torch.cat([self.dt_proj.bias, dt_proj.bias])),
        )

    def _forwards(self, x: Tensor) -> Tensor:
        """(B, L, E) -> the scan from the first token to the last."""
        u = self._conv(x, self.conv1d)
        return self._scan(u, self.x_proj(u), self.dt_proj, self.A_log, self.D)

    def _scan(self, u: Tensor, proj: Tensor, dt_proj: nn.Module, A_log: Tensor, D: Tensor) -> Tensor:
        """One direction: (B, L, E), (B, L, R + 2N) -> (B, L, E)."""
        dt, B, C = proj.split([self.dt_rank, self.d_state, self.d_state], dim=2)
        with no_autocast(u.device.type):  # step sizes in float32, as `bidirectional_scan` has them
            if is_plain(dt_proj, nn.Linear):
                weight, bias = _at_least_float32(dt_proj.weight), _at_least_float32(dt_proj.bias)
                delta = weight @ dt.transpose(-2, -1).to(weight.dtype)  # (B, E, L)
            else:
                delta, bias = _at_least_float32(dt_proj(dt.to(D.dtype))).transpose(-2, -1), None
        y = selective_scan(
            u.transpose(-2, -1),
            delta,
            -_at_least_float32(A_log).exp(),
            B.transpose(-2, -1).to(u.dtype),
            C.transpose(-2, -1).to(u.dtype),
            _at_least_float32(D),
            bias,
            delta_softplus=True,
            impl=self.impl,
        )
        return y.transpose(-2, -1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
