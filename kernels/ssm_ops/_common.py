"""What several operators share: limits, the dtype of states, the routes of an image, checks, shapes of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_RANK = 256
"""R, of the step sizes that a fused scan forms itself."""

TRITON_CHUNK = 64
"""Tokens between two states that the Triton scans along routes save."""

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which states, exponentials and sums are kept for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def plus_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a b, in one operation; in traced graphs in two, which every converter of them knows."""
    return x + a * b if torch.jit.is_tracing() else torch.addcmul(x, a, b)


# ---- routes ---------------------------------------------------------------------------------------------------------

# A route is (walk the columns?, walk backwards?).
ROUTES = {
    "cross2d": ((False, False), (True, False), (False, True), (True, True)),
    "unidi": ((False, False),) * 4,
    "bidi": ((False, False), (False, False), (False, True), (False, True)),
}
SCANS = tuple(ROUTES)


def route_bits(scans: str) -> tuple[int, int]:
    """Bit k of the first number: does route k walk the columns? Of the second: does it walk backwards?"""
    columns, backwards = zip(*ROUTES[scans], strict=True)
    return sum(c << k for k, c in enumerate(columns)), sum(b << k for k, b in enumerate(backwards))


def walk(x: Tensor, columns: bool, backwards: bool) -> Tensor:
    """(B, C, H, W) -> (B, C, L) in the order of the route."""
    sequence = (x.transpose(2, 3) if columns else x).flatten(2)
    return sequence.flip(2) if backwards else sequence


# ---- arguments ------------------------------------------------------------------------------------------------------


def check_floating(op: str, name: str, x: Tensor) -> None:
    """
    Raises:
        TypeError: x is of no dtype that the operators compute in.
    """
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} is {x.dtype}; use float32, float16, bfloat16 or float64")


def check_beside(op: str, name: str, x: Tensor, others: dict[str, tuple], sizes: str = "") -> None:
    """Do shape, dtype and device of the other tensors of a call fit `name`, which is x?

    Args:
        others: by name (tensor or None, legal shapes, legal dtypes).
        sizes: what the shapes depend on besides x, for the message.

    Raises:
        ValueError, TypeError: naming what does not fit, and what would.
    """
    for other, (t, shapes, dtypes) in others.items():
        if t is None:
            continue
        if t.shape not in shapes:
            raise ValueError(
                f"{op}: {other} must be {_any_of(map(tuple, shapes))} for {name} {tuple(x.shape)}{sizes}, "
                f"got {tuple(t.shape)}"
            )
        if t.dtype not in dtypes:
            raise TypeError(f"{op}: {other} must be {_any_of(dtypes)} beside {name} in {x.dtype}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{op}: {other} is on {t.device}, {name} is on {x.device}")


def check_states(op: str, states: Tensor, shape: tuple[int, ...]) -> None:
    """
    Raises:
        ValueError: `states`, which a backward was given, are not what its forward keeps.
    """
    if states.shape != shape:
        raise ValueError(
            f"{op}: the backward needs states {tuple(shape)}, got {tuple(states.shape)}: call the forward with "
            "keep_states=True"
        )


def _any_of(legal) -> str:
    return " or ".join(dict.fromkeys(map(str, legal)))


def check_ssd(op: str, x, dt, A, B, C, D, dt_bias, initial_states=None) -> None:
    """The arguments that the SSD operators share, causal or not."""
    check_floating(op, "x", x)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must be (B, L, H, P) with L, H, P > 0, got {tuple(x.shape)}")
    if B.dim() != 4:
        raise ValueError(f"{op}: B must be (B, L, G, N), got {tuple(B.shape)}")
    (batch, length, heads, head_dim), (groups, n_state) = x.shape, B.shape[2:]
    if groups == 0 or heads % groups:
        raise ValueError(f"{op}: G, the groups of B, is {groups}, which does not divide the {heads} heads of x")
    if n_state == 0:
        raise ValueError(f"{op}: the state size N is 0 (B is {tuple(B.shape)}); legal: 1 or more")
    own, wide = x.dtype, state_dtype(x.dtype)
    others = {
        "dt": (dt, [(batch, length, heads)], (own, wide)),
        "A": (A, [(heads,)], (wide,)),
        "B": (B, [(batch, length, groups, n_state)], (own,)),
        "C": (C, [(batch, length, groups, n_state)], (own,)),
        "D": (D, [(heads,), (heads, head_dim)], (wide,)),
        "dt_bias": (dt_bias, [(heads,)], (wide,)),
        "initial_states": (initial_states, [(batch, heads, head_dim, n_state)], (wide,)),
    }
    check_beside(op, "x", x, others)


def empty_gradient(t: Tensor | None, x: Tensor) -> Tensor:
    """Of t, contiguous, not filled; of an absent t without elements, because an operator's arity is fixed."""
    return x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
