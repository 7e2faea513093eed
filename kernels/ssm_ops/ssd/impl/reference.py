"""The chunked SSD scan in plain PyTorch, on any device: to read, to test kernels against, and to export.

Unrolled over a chunk of T tokens, the recurrence is attention with a decay instead of a softmax (W is in `decays`):

    y_i = sum_{j <= i} W_ji (B_j . C_i) s_j x_j  +  exp(a_0 + .. + a_i) h C_i  +  D x_i         a_t = s_t A
    h'  = exp(a_0 + .. + a_{T-1}) h  +  sum_j W_{j,T-1} s_j x_j B_j^T

with h the state before the chunk and h' the one after it. Chunks follow one another, so memory does not grow with L
beyond the inputs and one chunk; the last chunk may be short.

Shapes: B batch, G groups, E = H / G heads of a group, P channels of a head, N state, L tokens, T tokens of a chunk.
Inside a chunk x and y are (B, G, E, T, P), s and a (B, G, E, T), B and C (B, G, 1, T, N), states (B, G, E, P, N).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._common import plus_product, state_dtype


def decays(a: Tensor) -> Tensor:
    """(*, T) -> (*, T, T): W[j, i] = exp(a_{j+1} + .. + a_i), what token i still sees of token j; 0 for i < j.

    Every sum is formed by itself: as the difference of two sums from the chunk's start it would lose its digits to
    strong decays before j.
    """
    later = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool, device=a.device).triu(1)
    return torch.where(later, a.unsqueeze(-2), 0).cumsum(-1).exp().triu()


def decays_adjoint(d_log: Tensor) -> Tensor:
    """(*, T, T) -> (*, T): gradient of a from that of log W; da_k sums d_log[j, i] over j < k <= i."""
    from_k_on = d_log.flip(-1).cumsum(-1).flip(-1)  # [j, k]: over i >= k
    return from_k_on.triu(1).sum(-2)


class _Chunks:
    """The inputs, cut into chunks and brought to the layout and dtype of the products."""

    def __init__(self, x, dt, A, B, C, D, dt_bias, dt_softplus, chunk_size):
        self.groups, self.dtype = B.shape[2], state_dtype(x.dtype)
        self.x, self.dt, self.B, self.C = x, dt, B, C
        self.A = A.unflatten(0, (self.groups, -1)).unsqueeze(-1)  # (G, E, 1)
        self.D = None if D is None else D.reshape(A.shape[0], -1).unflatten(0, (self.groups, -1)).unsqueeze(2)
        self.dt_bias, self.dt_softplus = dt_bias, dt_softplus
        length = x.shape[1]
        self.slices = [slice(t, min(t + chunk_size, length)) for t in range(0, length, chunk_size)]

    def per_head(self, x: Tensor, where: slice) -> Tensor:
        """(B, L, H, P) -> (B, G, E, T, P)"""
        return x[:, where].to(self.dtype).unflatten(2, (self.groups, -1)).permute(0, 2, 3, 1, 4).contiguous()

    def per_group(self, x: Tensor, where: slice) -> Tensor:
        """(B, L, G, N) -> (B, G, 1, T, N)"""
        return x[:, where].to(self.dtype).transpose(1, 2).unsqueeze(2).contiguous()

    def raw_step(self, where: slice) -> Tensor:
        """dt + bias before the softplus: (B, G, E, T)"""
        raw = self.dt[:, where].to(self.dtype)
        raw = raw if self.dt_bias is None else raw + self.dt_bias
        return raw.unflatten(2, (self.groups, -1)).permute(0, 2, 3, 1).contiguous()

    def step(self, raw: Tensor) -> Tensor:
        return F.softplus(raw) if self.dt_softplus else raw  # identity above 20, as everywhere in this field


def _joined(chunks: list[Tensor], dtype: torch.dtype) -> Tensor:
    """[(B, G, E, T, *), ...] -> (B, L, G*E, *)"""
    return torch.cat(chunks, 3).flatten(1, 2).movedim(2, 1).to(dtype).contiguous()


def forward(
    x, dt, A, B, C, D, dt_bias, initial_states, dt_softplus: bool, chunk_size: int, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(out (B, L, H, P), final states (B, H, P, N), the state before every chunk and after the last)"""
    c = _Chunks(x, dt, A, B, C, D, dt_bias, dt_softplus, chunk_size)
    batch, _, heads, head_dim = x.shape
    shape = (batch, heads, head_dim, B.shape[3])
    start = torch.zeros(shape, dtype=c.dtype, device=x.device) if initial_states is None else initial_states
    state = start.unflatten(1, (c.groups, -1))
    out, states = [], []
    for where in c.slices:
        states.append(state)
        xt, Bt, Ct = c.per_head(x, where), c.per_group(B, where), c.per_group(C, where)
        step = c.step(c.raw_step(where))
        a = step * c.A
        weight, since_start = decays(a), a.cumsum(-1).exp().unsqueeze(-1)
        sx = step.unsqueeze(-1) * xt

        y = (weight * (Bt @ Ct.transpose(-2, -1))).transpose(-2, -1) @ sx + since_start * (Ct @ state.transpose(-2, -1))
        out.append(y if D is None else plus_product(y, c.D, xt))
        state = since_start[..., -1:, :] * state + (weight[..., -1:] * sx).transpose(-2, -1) @ Bt
    states = torch.stack([*states, state]).flatten(2, 3)
    return _joined(out, out_dtype), states[-1].clone(), states


def backward(
    dout, dfinal_states, x, dt, A, B, C, D, dt_bias, initial_states, states, dt_softplus: bool, chunk_size: int
) -> tuple[Tensor, ...]:
    """Gradients of (x, dt, A, B, C, D, dt_bias, initial states); absent ones as tensors without elements.

    The chunks are visited from the last to the first; `d_state` is the gradient of the state after the chunk at hand.
    """
    c = _Chunks(x, dt, A, B, C, D, dt_bias, dt_softplus, chunk_size)
    states = states.unflatten(2, (c.groups, -1))
    d_state = dfinal_states.to(c.dtype).unflatten(1, (c.groups, -1))
    dx, d_raw, dB, dC = [], [], [], []
    dA = torch.zeros_like(c.A)
    dD = x.new_zeros((c.groups, A.shape[0] // c.groups, x.shape[3]), dtype=c.dtype)
    for state, where in reversed(list(zip(states, c.slices, strict=False))):
        xt, Bt, Ct, dy = c.per_head(x, where), c.per_group(B, where), c.per_group(C, where), c.per_head(dout, where)
        raw = c.raw_step(where)
        step = c.step(raw)
        a = step * c.A
        weight, since_start = decays(a), a.cumsum(-1).exp().unsqueeze(-1)
        to_end, whole = weight[..., -1:], since_start[..., -1:, :]
        sx = step.unsqueeze(-1) * xt

        # of y within the chunk
        weighted = weight * (Bt @ Ct.transpose(-2, -1))
        d_product = sx @ dy.transpose(-2, -1)  # (B, G, E, T, T), source j by target i
        d_scores = (d_product * weight).sum(2, keepdim=True)
        d_log = d_product * weighted
        # of the state after the chunk, and of y through the state before it
        from_end, decayed_dy = Bt @ d_state.transpose(-2, -1), since_start * dy
        d_log[..., -1] += (from_end * to_end * sx).sum(-1)
        d_since = (decayed_dy * (Ct @ state.transpose(-2, -1))).sum(-1)
        d_since[..., -1] += (whole * d_state * state).sum((-1, -2))
        da = decays_adjoint(d_log) + d_since.flip(-1).cumsum(-1).flip(-1)

        d_sx = weighted @ dy + to_end * from_end
        dB.append(d_scores @ Ct + ((to_end * sx) @ d_state).sum(2, keepdim=True))
        dC.append(d_scores.transpose(-2, -1) @ Bt + (decayed_dy @ state).sum(2, keepdim=True))
        d_state = whole * d_state + decayed_dy.transpose(-2, -1) @ Ct

        dx.append(step.unsqueeze(-1) * d_sx if D is None else plus_product(step.unsqueeze(-1) * d_sx, c.D, dy))
        d_step = da * c.A + (d_sx * xt).sum(-1)
        d_raw.append(torch.where(raw > 20, d_step, d_step * torch.sigmoid(raw)) if dt_softplus else d_step)
        dA = dA + (da * step).sum((0, 3)).unsqueeze(-1)
        if D is not None:
            dD = dD + (dy * xt).sum((0, 3))

    for parts in (dx, d_raw, dB, dC):
        parts.reverse()
    d_dt = _joined(d_raw, c.dtype)
    absent = [x.new_empty(0) for _ in range(3)]  # three, for the outputs of an operator may not share memory
    return (
        _joined(dx, x.dtype),
        d_dt.to(dt.dtype),
        dA.reshape(A.shape),
        _joined(dB, B.dtype),
        _joined(dC, C.dtype),
        absent[0] if D is None else (dD if D.dim() == 2 else dD.sum(2)).reshape(D.shape),
        absent[1] if dt_bias is None else d_dt.sum((0, 1)),
        absent[2] if initial_states is None else d_state.flatten(1, 2).contiguous(),
    )
