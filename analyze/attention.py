"""The weights with which a mixer of VMamba, Vim or VSSD adds up the tokens of an image: what attention maps show.

Per channel a selective scan gives, beside the skip connection,

    y_t = sum over s <= t of W_ts u_s,      W_ts = dt_s sum_n C_tn B_sn exp(A_n (dt_{s+1} + ... + dt_t))

so a row of W says of which tokens s the token t is made, like a row of softmax attention (Liu et al. 2024, "VMamba",
https://arxiv.org/abs/2401.10166, where w_t = exp(A (dt_0 + ... + dt_t)) and the exponential above is w_t / w_s). Only
rows are formed, never L x L numbers. The quotient is the exponential of a sum of decays that is never positive: it
cannot overflow where w_s has become too small for a division.

Modes, each a mean over channels:
    CB      sum_n C_tn B_sn
    CBdt    dt_s of it
    CwBw    sum_n C_tn B_sn w_tn / w_sn
    CwBdtw  dt_s of it: W itself, the derivative of y_t by u_s
    ww      sum_n w_tn / w_sn: the memory alone
NC-SSD knows no distance: every token has one weight, w_s = dt_s |A|, step size included. CwBw and CwBdtw are there the
same, sum_n C_tn B_sn w_s, and ww is w_s. In its normalised form (VSSD of ICCV 2025) w_s is a softmax over the tokens,
which the step size is part of: CBdt is the same as CwBw, too. Every sum over n is divided by the token t's own number.
Softmax attention has one mode, softmax: its probabilities, meant over heads.

Shapes: L tokens of a sequence, S steps of a scan (L, or a line of a map), D channels (heads where all channels of a
head share everything), N state, G groups of B and C, R rank of dt, K scans, H W map.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_models.layers.attention import Attention
from ssm_models.layers.linear_nc_ssd import LinearNCSSD
from ssm_models.layers.ss2d import SS2D, K
from ssm_models.layers.ss2d_m0 import SS2DM0
from ssm_models.layers.ss2d_xv import SS2DXv
from ssm_ops import cross_scan

MODES = ("CB", "CBdt", "CwBw", "CwBdtw", "ww")

_BLOCK = 2**23  # numbers of the largest tensor of a row, 32 MiB in float32


@dataclass(frozen=True)
class Scan:
    """One causal scan seen from one of its steps.

    name, of the route; dt (D, S) after softplus; A (D, N), or (D, 1) where the states share a decay; B, C (G, N, S),
    which D / G neighbouring channels share; places (S,), the token that each step reads; query, the step seen from.
    """

    name: str
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    places: Tensor
    query: int
    modes: ClassVar = MODES

    def row(self, mode: str, length: int) -> Tensor:
        """(length,) weights in the order of the tokens; 0 for those that are not read before the query."""
        seen = self.query + 1
        dt = self.dt[:, :seen]
        A = self.A if "w" in mode else torch.zeros_like(self.A[:, :1])
        products = self.C[:, :, self.query, None] * self.B[:, :, :seen]  # (G, N, s)
        if mode == "ww":
            products = torch.ones_like(products)
        if A.shape[1] == 1:
            products = products.sum(1, keepdim=True)
        # dt between a step and the query: summed from there, so that the largest weights are the most precise ones
        age = F.pad(dt[:, 1:].flip(1).cumsum(1).flip(1), (0, 1))  # (D, s)
        factor = dt if "dt" in mode else torch.ones_like(dt)
        group = torch.arange(len(A), device=A.device) // (len(A) // len(products))
        total = torch.zeros_like(age[0])
        for d in torch.arange(len(A), device=A.device).split(max(1, _BLOCK // products[0].numel())):
            decay = (A[d, :, None] * age[d, None]).exp()  # (block, N, s)
            total += ((products[group[d]] * decay).sum(1) * factor[d]).sum(0)
        return total.new_zeros(length).index_copy(0, self.places[:seen], total / len(A))


@dataclass(frozen=True)
class NonCausal:
    """The sum of NC-SSD: dt and w (D, L) per head, B and C (D, N, L)."""

    dt: Tensor
    w: Tensor
    B: Tensor
    C: Tensor
    query: int
    name: ClassVar = "all tokens"
    modes: ClassVar = MODES

    def row(self, mode: str, length: int) -> Tensor:
        """(length,) weights of all tokens."""
        if mode == "ww":
            return self.w.mean(0)
        products = (self.C[:, :, self.query, None] * self.B).sum(1)  # (D, L)
        factors = {"CB": torch.ones_like(self.dt), "CBdt": self.dt, "CwBw": self.w, "CwBdtw": self.w}
        return (products * factors[mode]).mean(0)


@dataclass(frozen=True)
class Softmax:
    """Softmax attention: q and k (heads, L, d)."""

    q: Tensor
    k: Tensor
    query: int
    name: ClassVar = "all tokens"
    modes: ClassVar = ("softmax",)

    def row(self, mode: str, length: int) -> Tensor:
        """(length,) probabilities of all tokens."""
        scores = self.k @ self.q[:, self.query, :, None] * self.q.shape[2] ** -0.5  # (heads, L, 1)
        return scores.squeeze(2).softmax(1).mean(0)


Source = Scan | NonCausal | Softmax


def sources(mixer: nn.Module, x: Tensor, grid: tuple[int, int], query: int) -> list[Source]:
    """What adds up the tokens of the sequence or map x at token `query`: a route each, in the order of the paper.

    Args:
        mixer: SS2D of any forward type, SS2DXv, SS2DM0, BiMamba, NCSSD, LinearNCSSD or Attention.
        x: input of the mixer for one image.
        grid: (H, W) of the map; (1, L) of a sequence.
        query: number of the token, row by row.
    """
    if isinstance(mixer, Attention):
        q, k, _ = mixer.to_qkv(x).flatten(0, 2).unflatten(1, (3, mixer.num_heads, -1)).permute(1, 2, 0, 3)
        return [Softmax(q, k, query)]
    with recorded(mixer) as calls:
        mixer(x)
    if isinstance(mixer, SS2D) and mixer.scans == "cascade2d":
        return _cascade(calls, grid, query)
    if isinstance(mixer, LinearNCSSD):
        return _linear_nc_ssd(mixer, calls, query)
    ((name, call),) = calls
    return _READERS[name](mixer, call, grid, query)


@contextmanager
def recorded(mixer: nn.Module) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Within it, the calls of scans from the file of `mixer` are listed: name of the operator, arguments by name."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def recording(name: str, operator: Callable) -> Callable:
        signature = inspect.signature(operator)

        @wraps(operator)
        def wrapper(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            calls.append((name, bound.arguments))
            return operator(*args, **kwargs)

        return wrapper

    module = sys.modules[type(mixer).__module__]
    operators = {name: vars(module)[name] for name in _READERS if name in vars(module)}
    try:
        for name, operator in operators.items():
            setattr(module, name, recording(name, operator))
        yield calls
    finally:
        for name, operator in operators.items():
            setattr(module, name, operator)


# ---- from the arguments of an operator to scans ----

_ROUTES = {
    "cross2d": ("rows", "columns", "rows back", "columns back"),
    "unidi": ("rows",) * 4,
    "bidi": ("rows", "rows", "rows back", "rows back"),
}
_WAYS = ("forwards", "backwards")


def _split(names: tuple[str, ...], dt, A, B, C, places: Tensor, queries: list[int]) -> list[Scan]:
    """K scans from tensors that hold them one after the other: dt (K*D, S), A (K*D, N), B, C (K*G, N, S)."""
    parts = zip(*(t.chunk(len(places)) for t in (dt, A, B, C)), strict=True)
    return [Scan(name, *part, *where) for name, part, *where in zip(names, parts, places, queries, strict=True)]


def _at_token(places: Tensor, token: int) -> list[int]:
    """The step of every scan, places (K, S), that reads the token."""
    return [int((where == token).nonzero()) for where in places]


def _cross_places(grid: tuple[int, int], scans: str, device: torch.device) -> Tensor:
    """(K, L): the tokens along the routes of SS2D."""
    tokens = torch.arange(grid[0] * grid[1], device=device).view(1, 1, *grid)
    return cross_scan(tokens, scans=scans, impl="reference")[0, :, 0]


def _both_ways(tokens: Tensor) -> Tensor:
    return torch.stack([tokens, tokens.flip(0)])


def _low_rank(call: dict, routes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dt, A, B, C from routes (K, R + 2N, L), along which step sizes still have R numbers."""
    weight, A = call["dt_weight"], call["A"]
    dt, B, C = routes.to(weight.dtype).split([weight.shape[2], A.shape[1], A.shape[1]], dim=1)
    return F.softplus((weight @ dt).flatten(0, 1) + call["dt_bias"][:, None]), A, B, C


def _ss2d_scan(mixer: nn.Module, call: dict, grid: tuple[int, int], query: int) -> list[Scan]:
    fields = call["proj"].unflatten(3, (K, -1)).permute(0, 3, 4, 1, 2)  # (1, K, R + 2N, H, W)
    routes = cross_scan(fields, one_by_one=True, scans=call["scans"], impl="reference")[0]
    places = _cross_places(grid, call["scans"], routes.device)
    return _split(_ROUTES[call["scans"]], *_low_rank(call, routes), places, _at_token(places, query))


def _bidirectional_scan(mixer: nn.Module, call: dict, grid: tuple[int, int], query: int) -> list[Scan]:
    there, back = call["proj"][0].mT.chunk(2)  # (R + 2N, L) each
    places = _both_ways(torch.arange(there.shape[1], device=there.device))
    return _split(_WAYS, *_low_rank(call, torch.stack([there, back.flip(1)])), places, _at_token(places, query))


def _selective_scan(mixer: nn.Module, call: dict, grid: tuple[int, int], query: int) -> list[Scan]:
    scan = _full_rank(call, 0)
    if isinstance(mixer, SS2DXv):
        names, places = _ROUTES["cross2d"], _cross_places(grid, "cross2d", scan[0].device)
    else:
        names, places = _WAYS[:1], torch.arange(scan[0].shape[1], device=scan[0].device)[None]
    return _split(names, *scan, places, _at_token(places, query))


def _full_rank(call: dict, sample: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dt, A, B, C of one sample of `selective_scan`."""
    A = call["A"]
    dt = F.softplus(call["delta"][sample].to(A.dtype) + call["delta_bias"][:, None])
    B, C = (call[name][sample].to(A.dtype) for name in "BC")
    return (dt, A, B[None], C[None]) if B.dim() == 2 else (dt, A, B, C)


def _cascade(calls: list[tuple[str, dict]], grid: tuple[int, int], query: int) -> list[Scan]:
    """Scans along the row and then along the column of the query, each of the map that it is fed.

    The results of the ways back are added unreversed, see `SS2D`: they are looked from the mirrored place.
    """
    y, x = divmod(query, grid[1])
    tokens = torch.arange(grid[0] * grid[1], device=calls[0][1]["A"].device).view(grid)
    names = (("row right", "row left"), ("column down", "column up"))
    found = []
    for (_, call), pair, line, step, along in zip(calls, names, (y, x), (x, y), (tokens[y], tokens[:, x]), strict=True):
        found += _split(pair, *_full_rank(call, line), _both_ways(along), [step, step])
    return found


def _per_head(call: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dt (K*heads, L), A (K*heads, 1), B, C (K*G, N, L) of the operators of Mamba-2."""
    A = call["A"][:, None]
    dt = F.softplus(call["dt"][0].to(A.dtype).mT + call["dt_bias"][:, None])
    B, C = (call[name][0].to(A.dtype).permute(1, 2, 0) for name in "BC")
    return dt, A, B, C


def _ssd_chunk_scan(mixer: nn.Module, call: dict, grid: tuple[int, int], query: int) -> list[Scan]:
    scan = _per_head(call)
    there = torch.arange(scan[0].shape[1], device=scan[0].device)
    if isinstance(mixer, SS2DM0):
        names, places = _ROUTES["cross2d"], _cross_places(grid, "cross2d", there.device)
    elif mixer.backwards:
        names, places = _WAYS, _both_ways(there)
    else:
        names, places = _WAYS[:1], there[None]
    return _split(names, *scan, places, _at_token(places, query))


def _nc_ssd(mixer: nn.Module, call: dict, grid: tuple[int, int], query: int) -> list[NonCausal]:
    dt, A, B, C = _per_head(call)
    return [NonCausal(dt, dt * (-A if call["positive"] else A), *_in_turns(len(A), B, C), query)]


def _linear_nc_ssd(mixer: LinearNCSSD, calls: list[tuple[str, dict]], query: int) -> list[NonCausal]:
    """Of two calls: that of the rotated keys and queries, and that of the plain ones, which gives what to divide by."""
    (B, C), (k, q) = ([call[name][0].permute(1, 2, 0) for name in "BC"] for _, call in calls)
    w = calls[0][1]["dt"][0].mT
    B, C, k, q = _in_turns(len(w), *(t.to(w.dtype) for t in (B, C, k, q)))
    norm = (q * (k @ w[:, :, None])).sum(1, keepdim=True) + mixer.eps
    return [NonCausal(w, w, B, C / norm, query)]


def _in_turns(heads: int, *of_groups: Tensor) -> list[Tensor]:
    """(G, ...) -> (heads, ...): groups take turns over the heads, see `ssm_ops.nc_ssd`."""
    return [x[torch.arange(heads, device=x.device) % len(x)] for x in of_groups]


_READERS: dict[str, Callable[..., list]] = {
    "ss2d_scan": _ss2d_scan,
    "bidirectional_scan": _bidirectional_scan,
    "selective_scan": _selective_scan,
    "ssd_chunk_scan": _ssd_chunk_scan,
    "nc_ssd": _nc_ssd,
}
