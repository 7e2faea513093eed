"""The mixer of VSSD: state space duality without causality (NC-SSD), and the causal forms it is compared with.

Shi et al. 2024, "VSSD: Vision Mamba with Non-Causal State Space Duality", section 3.2
(https://arxiv.org/abs/2407.18559).

Shapes: B batch, H W map, L = H*W tokens, C channels of the block, E = expand * C inner channels, h heads,
P = E / h channels of a head, N state, G groups of keys (B) and queries (C).
"""

from __future__ import annotations

import torch
import torch.nn as nn
from timm.layers import is_exportable
from torch import Tensor

from ssm_ops import nc_ssd, ssd_chunk_scan

from .conv import DepthwiseConv, depthwise_silu
from .linear import Linear
from .norm import normed
from .ssm_init import reset_dt_bias_, reset_head_decay_


class NCSSD(nn.Module):
    """in_proj -> depthwise conv -> SiLU -> SSD over all tokens -> norm -> times gate -> out_proj.

    Args:
        d_model: C.
        d_state: N.
        headdim: P, a divisor of E.
        expand: E = expand * C.
        ngroups: G, a divisor of h; -1 for one group per head.
        linear_attn_duality: NC-SSD, in which every token sees every token. False: the scan of Mamba-2, in which a token
            sees those before it in raster order.
        ssd_positive_dA: the weight of a token is dt * exp(A_log), else the negative of it; NC-SSD alone has the choice.
        bidirection: of the causal form: the second half of the heads reads the tokens from the end. Needs an even G.
            NC-SSD knows no direction.
        chunk_size: of the causal form; changes time and memory, not the result.
        impl: implementation of the operators, see `ssm_ops`; under timm's exportable flag "reference" is taken.
        device, dtype: of the parameters, as in PyTorch's layers.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        headdim: int = 64,
        expand: int = 2,
        ngroups: int = 1,
        linear_attn_duality: bool = True,
        ssd_positive_dA: bool = True,
        bidirection: bool = False,
        chunk_size: int = 256,
        impl: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        d_inner = expand * d_model
        if d_inner % headdim:
            raise ValueError(f"headdim={headdim} does not divide the {d_inner} inner channels")
        nheads = d_inner // headdim
        groups = nheads if ngroups == -1 else ngroups
        if groups < 1 or nheads % groups:
            raise ValueError(f"ngroups={ngroups} does not divide the {nheads} heads; -1 is one group per head")
        self.backwards = bidirection and not linear_attn_duality
        if self.backwards and groups % 2:
            raise ValueError(f"bidirection=True needs an even number of groups, half for each way: got {groups}")
        self.headdim, self.groups = headdim, groups
        self.causal, self.positive, self.chunk_size = not linear_attn_duality, ssd_positive_dA, chunk_size
        self.impl = "reference" if is_exportable() else impl

        d_conv = d_inner + 2 * groups * d_state
        self.proj_sizes = [d_inner, d_conv, nheads]  # gate, what is convolved, dt
        self.conv_sizes = [d_inner, groups * d_state, groups * d_state]  # x, B, C
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(nheads, **dd)) for _ in range(3))
        self.in_proj = Linear(d_model, sum(self.proj_sizes), bias=False, **dd)
        self.conv2d = DepthwiseConv(d_conv, **dd)
        self.norm = nn.LayerNorm(d_inner, **dd)
        self.out_proj = Linear(d_inner, d_model, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_dt_bias_(self.dt_bias)
        reset_head_decay_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> the same."""
        height, width = x.shape[1:3]
        gate, xBC, dt = self.in_proj(x).split(self.proj_sizes, dim=-1)
        xBC = depthwise_silu(self.conv2d, xBC)
        x, B, C = xBC.flatten(1, 2).split(self.conv_sizes, dim=-1)
        y = self._mix(
            x.unflatten(2, (-1, self.headdim)),
            dt.flatten(1, 2),
            B.unflatten(2, (self.groups, -1)),
            C.unflatten(2, (self.groups, -1)),
            (height, width),
        )
        y = normed(self.norm, y.flatten(2)).unflatten(1, (height, width))
        return self.out_proj(y.to(gate.dtype) * gate)  # the gate has no activation, unlike Mamba-2's

    def _mix(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, L, h, P), dt (B, L, h), B, C (B, L, G, N) -> (B, L, h, P); the shape of the map does not matter."""
        shared = {
            "D": at_least_float32(self.D),
            "dt_bias": at_least_float32(self.dt_bias),
            "dt_softplus": True,
            # float32 for the norm, as the state grows with the image; in a model of half-precision weights theirs
            "out_dtype": self.D.dtype,
            "impl": self.impl,
        }
        A = -at_least_float32(self.A_log).exp()
        if not self.causal:
            # GPUs have units for bfloat16, and under autocast the official products are in it, too
            return nc_ssd(x, dt, A, B, C, positive=self.positive, bfloat16_products=x.is_cuda, **shared)
        if self.backwards:
            x, dt, B, C = (_flip_second_half(t) for t in (x, dt, B, C))
        y = ssd_chunk_scan(x, dt, A, B, C, self.chunk_size, **shared)
        return _flip_second_half(y) if self.backwards else y


def _flip_second_half(x: Tensor) -> Tensor:
    """(B, L, heads or groups, ...): reverse the tokens of the second half of the heads or groups."""
    forwards, backwards = x.chunk(2, dim=2)
    return torch.cat([forwards, backwards.flip(1)], dim=2)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
