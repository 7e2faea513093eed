"""Selective scan in plain PyTorch, on any device: the code to read, the oracle of the kernels, the form for export.

A loop over single tokens is what makes such a scan slow in PyTorch. Here a chunk of T tokens is cut into P segments of
S tokens, P and S about sqrt(T). All segments are scanned at once, starting from zero, in S vectorised steps; P steps
then carry the state from segment to segment; at last each token adds the carried state times the decay since the
segment began. Chunks follow one another, so memory does not grow with L beyond the inputs and one chunk.

Shapes: B batch, G groups, E = D / G channels of a group, N state, L tokens, T tokens of a chunk. Inside a chunk every
tensor is (T, B, G, N or 1, E or 1): time leads, so that a step is one contiguous slice; channels are innermost.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._common import plus_product, state_dtype

STATE_CHUNK = 256
"""Tokens of a chunk, between two saved states."""

_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # the former came with torch 2.7


def linear_recurrence(decay: Tensor, x: Tensor, h0: Tensor) -> Tensor:
    """h_t = exp(decay_t) h_{t-1} + x_t for t = 0..T-1 along dim 0, from h_{-1} = h0.

    decay, x: (T, *), h0: (*).
    """
    if _is_exporting():
        return _recurrence_by_doubling(decay.exp(), x, h0)
    length = x.shape[0]
    steps = math.isqrt(length - 1) + 1
    segments = (length + steps - 1) // steps
    if segments * steps > length:
        pad = (0, 0) * (x.dim() - 1) + (0, segments * steps - length)
        decay, x = F.pad(decay, pad), F.pad(x, pad)
    decay, x = decay.unflatten(0, (segments, steps)), x.unflatten(0, (segments, steps))  # (P, S, *)

    h = list(x.unbind(1))
    for s, factor in enumerate(decay.exp().unbind(1)):
        if s > 0:
            h[s] = plus_product(h[s], factor, h[s - 1])

    since_start = decay.cumsum(1).exp()  # decay from the segment's start to each token
    h = list(torch.stack(h, 1).unbind(0))
    for p, factor in enumerate(since_start.unbind(0)):
        h[p] = plus_product(h[p], factor, h0 if p == 0 else h[p - 1][-1])
    return torch.cat(h)[:length]


def _recurrence_by_doubling(factor: Tensor, x: Tensor, h0: Tensor) -> Tensor:
    """h_t = factor_t h_{t-1} + x_t as `linear_recurrence`, in few large steps that change nothing in place: a graph for
    export grows with log(T), where the loops above would write out sqrt(T) steps. Segments are the same.
    """
    length = x.shape[0]
    steps = math.isqrt(length - 1) + 1
    pad = (0, 0) * (x.dim() - 1) + (0, -length % steps)
    factor, x = (F.pad(t, pad).unflatten(0, (-1, steps)) for t in (factor, x))  # (P, S, *)
    factor, h = _double(factor, x, 1)
    through, last = factor[:, -1], h[:, -1]
    first = plus_product(last[:1], through[:1], h0)
    after = _double(through, torch.cat([first, last[1:]]), 0)[1]  # the state after each segment
    before = torch.cat([h0.unsqueeze(0), after[:-1]])
    return plus_product(h, factor, before.unsqueeze(1)).flatten(0, 1)[:length]


def _double(factor: Tensor, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Along `dim`, the products of `factor` since the start and the recurrence from zero: step k joins what 2^k tokens
    have gathered with what the 2^k before them have (Hillis & Steele 1986, "Data parallel algorithms")."""
    for k in range((x.shape[dim] - 1).bit_length()):
        later = (0, 0) * (x.dim() - 1 - dim) + (2**k, -(2**k))
        x = plus_product(x, factor, F.pad(x, later))
        factor = factor * F.pad(factor, later, value=1.0)
    return factor, x


class _Chunks:
    """The inputs, cut into chunks and brought to the layout and dtype of the recurrence."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        self.u, self.delta, self.B, self.C, self.z = u, delta, B, C, z
        self.batch, self.dim, self.length = u.shape
        self.groups, self.n_state = B.shape[1:3]
        self.dtype = state_dtype(u.dtype)
        self.A = A.unflatten(0, (self.groups, -1)).transpose(1, 2)  # (G, N, E)
        self.D = None if D is None else D.unflatten(0, (self.groups, 1, -1))
        self.delta_bias, self.delta_softplus = delta_bias, delta_softplus

    def slices(self) -> list[slice]:
        chunk = self.length if _is_exporting() else STATE_CHUNK
        return [slice(t, min(t + chunk, self.length)) for t in range(0, self.length, chunk)]

    def per_channel(self, x: Tensor, where: slice) -> Tensor:
        """(B, D, L) -> (T, B, G, 1, E)"""
        x = x[:, :, where].permute(2, 0, 1).to(self.dtype).contiguous()
        return x.unflatten(2, (self.groups, 1, -1))

    def per_state(self, x: Tensor, where: slice) -> Tensor:
        """(B, G, N, L) -> (T, B, G, N, 1)"""
        x = x[..., where].permute(3, 0, 1, 2).to(self.dtype).contiguous()
        return x.unsqueeze(-1)

    def raw_delta(self, where: slice) -> Tensor:
        """delta + bias of every channel, before the softplus: (T, B, G, 1, E)"""
        delta = self.delta[:, :, where].to(self.dtype)
        if self.delta_bias is not None:
            delta = delta + self.delta_bias[:, None]
        repeats = self.dim // delta.shape[1]
        if repeats > 1:
            delta = delta.repeat_interleave(repeats, dim=1)
        return delta.permute(2, 0, 1).contiguous().unflatten(2, (self.groups, 1, -1))

    def step_size(self, raw: Tensor) -> Tensor:
        return F.softplus(raw) if self.delta_softplus else raw  # identity above 20, as everywhere in this field

    def zero_state(self) -> Tensor:
        shape = (self.batch, self.groups, self.n_state, self.dim // self.groups)
        return torch.zeros(shape, dtype=self.dtype, device=self.u.device)

    def output(self, h: Tensor, u: Tensor, C: Tensor) -> Tensor:
        """y before the gate: (T, B, G, 1, E)"""
        y = _sum_states(h * C)
        return y if self.D is None else plus_product(y, self.D, u)


def _sum_states(x: Tensor) -> Tensor:
    """(T, B, G, N, E) -> (T, B, G, 1, E); a sum over one state would cost a pass over memory."""
    return x if x.shape[3] == 1 else x.sum(3, keepdim=True)


def _to_input_layout(chunks: list[Tensor], dtype: torch.dtype) -> Tensor:
    """[(T, B, G, M, E), ...] -> (B, G*M*E, L)"""
    return torch.cat(chunks).flatten(2).permute(1, 2, 0).to(dtype).contiguous()


def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype, keep_states) -> tuple[Tensor, ...]:
    """(out (B, D, L), last state (B, D, N), the state before every chunk and after the last (S + 1, B, G, N, E), which
    has no elements without `keep_states`)"""
    c = _Chunks(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    state = c.zero_state()
    out, states = [], []
    for where in c.slices():
        states.append(state)
        ut, dt = c.per_channel(u, where), c.step_size(c.raw_delta(where))
        h = linear_recurrence(dt * c.A, dt * ut * c.per_state(B, where), state)
        y = c.output(h, ut, c.per_state(C, where))
        if z is not None:
            y = y * F.silu(c.per_channel(z, where))
        out.append(y)
        state = h[-1]
    last = state.transpose(2, 3).reshape(c.batch, c.dim, c.n_state).clone()
    kept = torch.stack([*states, state]) if keep_states else state.new_empty(0)
    return _to_input_layout(out, out_dtype), last, kept


def backward(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus) -> tuple[Tensor, ...]:
    """Gradients of (u, delta, A, B, C, D, z, delta_bias); absent ones as tensors without elements.

    With lambda_t = dy_t C_t + exp(dt_{t+1} A) lambda_{t+1}, the gradient of the state, the rest is local in time. The
    chunks are visited from the last to the first; `carry` is the part of lambda that comes from the chunk after.
    """
    c = _Chunks(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    carry = c.zero_state()
    du, d_raw, dz, dB, dC = [], [], [], [], []
    dA = torch.zeros_like(c.A)
    dD = None if D is None else torch.zeros_like(c.D)
    for index, where in reversed(list(enumerate(c.slices()))):
        ut, Bt, Ct = c.per_channel(u, where), c.per_state(B, where), c.per_state(C, where)
        raw = c.raw_delta(where)
        dt = c.step_size(raw)
        decay, x = dt * c.A, dt * ut * Bt
        h = linear_recurrence(decay, x, states[index])

        dy = c.per_channel(dout, where)
        if z is not None:
            zt = c.per_channel(z, where)
            gate = torch.sigmoid(zt)
            dz.append(dy * c.output(h, ut, Ct) * gate * (1 + zt * (1 - gate)))
            dy = dy * zt * gate

        # lambda is the same recurrence run backwards in time, each step with the decay of the token after it
        after = torch.cat([torch.zeros_like(decay[:1]), decay[1:].flip(0)])
        lam = linear_recurrence(after, (dy * Ct).flip(0), carry).flip(0)
        carry = decay[0].exp() * lam[0]

        d_decay = lam * (h - x)  # h - x = exp(decay) h_{t-1}
        lam_B = _sum_states(lam * Bt)
        d_dt = plus_product(_sum_states(d_decay * c.A), lam_B, ut)
        d_raw.append(torch.where(raw > 20, d_dt, d_dt * torch.sigmoid(raw)) if delta_softplus else d_dt)
        du.append(dt * lam_B if D is None else plus_product(dt * lam_B, dy, c.D))
        dB.append((lam * (dt * ut)).sum(4, keepdim=True))
        dC.append((h * dy).sum(4, keepdim=True))
        dA = dA + (d_decay * dt).sum((0, 1))
        if dD is not None:
            dD = dD + (dy * ut).sum((0, 1))

    for parts in (du, d_raw, dz, dB, dC):
        parts.reverse()
    d_delta = _to_input_layout(d_raw, c.dtype).unflatten(1, (delta.shape[1], -1)).sum(2)
    absent = [u.new_empty(0) for _ in range(3)]  # three, for the outputs of an operator may not share memory
    return (
        _to_input_layout(du, u.dtype),
        d_delta.to(delta.dtype),
        dA.transpose(1, 2).reshape(A.shape),
        _to_input_layout(dB, B.dtype).view(B.shape),
        _to_input_layout(dC, C.dtype).view(C.shape),
        absent[0] if dD is None else dD.reshape(D.shape),
        absent[1] if z is None else _to_input_layout(dz, z.dtype),
        absent[2] if delta_bias is None else d_delta.sum((0, 2)).to(delta_bias.dtype),
    )
