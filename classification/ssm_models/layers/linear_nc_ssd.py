"""The mixer of VSSD's second generation: NC-SSD as normalised linear attention, with rotated keys and queries.

Shi et al. 2025, "VSSD: Vision Mamba with Non-Causal State Space Duality", ICCV; the same title as that of 2024
(https://arxiv.org/abs/2407.18559).

Shapes as in `nc_ssd`: B batch, H W map, L = H*W tokens, E inner channels, h heads, P = E / h, N state, G groups of keys
(B) and queries (C).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_ops import nc_ssd, runs_eagerly

from .map_rope import kept_rotations, rotate, rotations
from .nc_ssd import NCSSD, at_least_float32

EPS = 1e-6


class LinearNCSSD(NCSSD):
    """`NCSSD` with a mixing of its own. For every head, over the tokens t and s of a map,

        k, q = elu(B) + 1, elu(C) + 1
        d    = softplus(dt + dt_bias) exp(A_log)
        w    = softmax over the tokens of d
        k', q' = k, q rotated by row and column, see `map_rope`
        y_t  = sum_s w_s (q'_t . k'_s) x_s / (sum_s w_s (q_t . k_s) + 1e-6 E) + D x_t

    Both sums are `ssm_ops.nc_ssd`, that below of ones in the place of x. The denominator knows no rotation, so that it
    is a sum of positive numbers.

    Published is this form alone, and in code that carries no licence: it is written here from formulas. Some of them
    are certain, and some are a reading that nobody has checked on the published weights. Those are

    * that the weights were trained with `exp_da` and `rope` on; each can be switched off,
    * the constant of the denominator. There it is 1e-6 beside keys and queries of which the latter are divided by E,
      which is the same as 1e-6 E beside undivided ones (attribute `eps`),
    * the eps of the norms, here and in the whole model: PyTorch's 1e-5, as in 2024 (their attribute `eps`).

    Args:
        d_model, d_state, headdim, expand, ngroups, impl, device, dtype: as of `NCSSD`.
        exp_da: the weights as above. False: w = d / (L max over the tokens of d).
        rope: rotate keys and queries, which needs a d_state that 4 divides. False: k', q' = k, q.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        headdim: int = 64,
        expand: int = 2,
        ngroups: int = 1,
        exp_da: bool = True,
        rope: bool = True,
        impl: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        if rope and d_state % 4:
            raise ValueError(f"d_state={d_state} must be a multiple of 4 for rotary position embeddings")
        super().__init__(d_model, d_state, headdim, expand, ngroups, impl=impl, device=device, dtype=dtype)
        self.exp_da, self.rope = exp_da, rope
        self.eps = EPS * expand * d_model

    def _mix(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, L, h, P), dt (B, L, h), B, C (B, L, G, N), grid (H, W) -> (B, L, h, P)"""
        both = _elu_plus_1(torch.cat([B, C], dim=2))  # at once: small maps feel the number of operations
        (k, q), rotated = both.chunk(2, dim=2), self._rotated(both, grid).chunk(2, dim=2)
        w, D = self._token_weights(dt), at_least_float32(self.D)
        A = -torch.ones_like(D)
        y = nc_ssd(x, w, A, *rotated, bfloat16_products=True, out_dtype=D.dtype, impl=self.impl)
        norm = self._normaliser(w, k, q)
        x = x.to(y.dtype)
        if runs_eagerly(y, norm, D):  # y and norm are new, and nobody else has them
            return y.div_(norm.add_(self.eps)).addcmul_(D[:, None], x).to(self.D.dtype)
        return torch.addcmul(y / (norm + self.eps), D[:, None], x).to(self.D.dtype)

    def _normaliser(self, w: Tensor, k: Tensor, q: Tensor) -> Tensor:
        """sum_s w_s (q_t . k_s), (B, L, h, 1): as many channels of one head as heads share keys, which is faster than
        as many heads of one channel."""
        heads = w.unflatten(2, (-1, self.groups)).transpose(-2, -1)  # (B, L, G, h / G)
        ones = torch.ones_like(w[..., : self.groups])
        y = nc_ssd(heads, ones, -ones[0, 0], k.to(w.dtype), q.to(w.dtype), impl=self.impl)
        return y.transpose(-2, -1).flatten(2).unsqueeze(3)

    def _token_weights(self, dt: Tensor) -> Tensor:
        """(B, L, h) -> weights, in float32 at least."""
        d = F.softplus(at_least_float32(dt) + self.dt_bias) * at_least_float32(self.A_log).exp()
        if self.exp_da:
            # several times as fast along numbers that lie side by side
            return d.transpose(-2, -1).softmax(2).transpose(-2, -1)
        return d / (d.amax(1, keepdim=True) * d.shape[1])

    def _rotated(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if not self.rope:
            return x
        if runs_eagerly(x):
            tables = kept_rotations(*grid, x.shape[3], x.device, x.dtype)
        else:
            tables = rotations(*grid, x.shape[3], like=x)
        return rotate(x.unflatten(1, grid), *tables).flatten(1, 2)


def _elu_plus_1(x: Tensor) -> Tensor:
    """elu(x) + 1, without its subtraction of one and the loss of digits that this is."""
    return x.clamp(max=0).exp() + F.relu(x)
