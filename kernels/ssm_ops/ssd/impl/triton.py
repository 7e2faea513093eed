"""Chunked SSD in Triton: one kernel along the states, and others over all tiles of tokens at once.

`ssd_state_kernel` walks a sample from tile to tile and leaves the state at every boundary; walking backwards over dy
and C it leaves the gradients of these states. With both at hand tiles know nothing of each other: `ssd_out_kernel`
makes y, `ssd_input_grad_kernel` the gradients of x and of the steps, and `ssd_projection_grad_kernel` those of B and C,
for which it goes through the heads of their group. A program writes only what it owns; what is left to add up (A, D and
dt_bias, one partial per tile) is added by torch in a fixed order. So the same call gives the same bits.

A tile is a chunk or a part of one. Those of the backward are smaller, as it holds more in registers, and it forms the
states between them again from those that were saved. The mathematics of a tile is that of reference.py.

Products are exact to float32. Two half-precision inputs go through the tensor cores as they are (tf32 holds float16 and
bfloat16 exactly); an operand with steps or decays in it is split, which makes three products of one ("tf32x3"); float32
inputs are multiplied in float32 ("ieee").

Shapes: B batch, L tokens, H heads, P channels of a head, N state, G groups, E = H / G heads of a group; of a program:
BT tokens of a tile, BP channels, BN states. Between tiles are the boundaries 0 (before the first) to n_tiles.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from .triton_grad_kernels import ssd_input_grad_kernel, ssd_projection_grad_kernel
from .triton_kernels import ssd_out_kernel, ssd_state_kernel, ssd_step_kernel

# Largest BT, BP and BN, warps and stages, such that the compilers for sm_80 and sm_90 keep everything in registers.
# The walk takes the tiles of its caller; the two gradients share theirs.
WALK = {"BP": 32, "BN": 32, "num_warps": 8}
OUT = {"BT": 64, "BP": 32, "BN": 32, "num_warps": 8}
INPUT_GRAD = {"BT": 32, "BP": 16, "BN": 16, "num_warps": 2, "num_stages": 1}
PROJECTION_GRAD = {"BT": 32, "BP": 16, "BN": 64, "num_warps": 8, "num_stages": 1}


def forward(
    x, dt, A, B, C, D, dt_bias, initial_states, dt_softplus: bool, chunk_size: int, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(out (B, L, H, P), final states (B, H, P, N), the state before every chunk and after the last)"""
    x, B, C = (_last_contiguous(t) for t in (x, B, C))
    out = x.new_empty(x.shape, dtype=out_dtype)
    size = _tiles(x, B, chunk_size, OUT["BT"])
    parts, n_tiles = size[-2:]
    grid, constants = _plan(x, B, OUT)
    with torch.cuda.device_of(x):
        steps = _steps(dt, A, dt_bias, dt_softplus, size, OUT["BT"])
        states = _walk(x, B, steps, initial_states, size, reverse=False)
        ssd_out_kernel[(x.shape[0] * n_tiles * x.shape[2] * grid[0],)](
            *(x, steps, B, C, _per_channel(D, x), states, out),
            *(*x.stride()[:3], *B.stride()[:3], *C.stride()[:3], states.stride(0), *size),
            EXACT=_exact(x),
            X_VEC=_vector_width(x),
            BC_VEC=_vector_width(B, C),
            **constants,
        )
    return out, states[-1].clone(), states[::parts].contiguous()


def backward(
    dout, dfinal_states, x, dt, A, B, C, D, dt_bias, initial_states, states, dt_softplus: bool, chunk_size: int
) -> tuple[Tensor, ...]:
    """Gradients of (x, dt, A, B, C, D, dt_bias, initial states); absent ones as tensors without elements."""
    x, B, C, dout = _last_contiguous(x), _last_contiguous(B), _last_contiguous(C), dout.contiguous()
    batch, _, heads, head_dim = x.shape
    size = _tiles(x, B, chunk_size, INPUT_GRAD["BT"])
    parts, n_tiles = size[-2:]

    dx, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, B, C))
    d_dt = x.new_empty(dt.shape, dtype=torch.float32)
    dA = x.new_empty((batch, n_tiles, heads), dtype=torch.float32)
    dD = None if D is None else x.new_empty((batch, n_tiles, heads, head_dim), dtype=torch.float32)
    vectors = {"X_VEC": _vector_width(x), "BC_VEC": _vector_width(B, C), "EXACT_DY": _exact(x, dout)}
    with torch.cuda.device_of(x):
        steps = _steps(dt, A, dt_bias, dt_softplus, size, INPUT_GRAD["BT"])
        if parts > 1:
            states = _walk(x, B, steps, states[0], size, reverse=False)
        d_states = _walk(dout, C, steps, dfinal_states, size, reverse=True)
        strides = (*x.stride()[:3], *B.stride()[:3], *C.stride()[:3], states.stride(0), *size)
        _, constants = _plan(x, B, INPUT_GRAD)
        ssd_input_grad_kernel[(batch * n_tiles * heads,)](
            *(dout, x, steps, A.contiguous(), B, C, _per_channel(D, x), states, d_states, dx, d_dt, dA, dD),
            *strides,
            EXACT=_exact(x),
            **vectors,
            **constants,
        )
        grid, constants = _plan(x, B, PROJECTION_GRAD)
        ssd_projection_grad_kernel[(batch * n_tiles * B.shape[2] * grid[1],)](
            *(dout, x, steps, B, C, states, d_states, dB, dC), *strides, **vectors, **constants
        )
    absent = [x.new_empty(0) for _ in range(3)]  # three, for the outputs of an operator may not share memory
    if D is not None:
        dD = dD.sum((0, 1)) if D.dim() == 2 else dD.sum((0, 1, 3))
    return (
        dx,
        d_dt.to(dt.dtype),
        dA.sum((0, 1)),
        dB,
        dC,
        absent[0] if D is None else dD,
        absent[1] if dt_bias is None else d_dt.sum((0, 1)),
        absent[2] if initial_states is None else d_states[0].clone(),
    )


def _steps(dt, A, dt_bias, dt_softplus: bool, size: tuple[int, ...], block: int) -> Tensor:
    """What `ssd_step_kernel` says of every tile: (B, H, n_tiles, 4, BT)"""
    (batch, _, heads), n_tiles = dt.shape, size[-1]
    steps = dt.new_empty((batch, heads, n_tiles, 4, block), dtype=torch.float32)
    dt_bias = None if dt_bias is None else dt_bias.contiguous()
    ssd_step_kernel[(batch * n_tiles * heads,)](
        *(dt, A.contiguous(), dt_bias, steps, *dt.stride(), *size), SOFTPLUS=dt_softplus, BT=block, num_warps=1
    )
    return steps


def _walk(v, k, steps, start: Tensor | None, size: tuple[int, ...], reverse: bool) -> Tensor:
    """The state at every boundary, (n_tiles + 1, B, H, P, N), from `start` on, or its gradient with `reverse`."""
    batch, _, heads, head_dim = v.shape
    states = v.new_empty((size[-1] + 1, batch, heads, head_dim, k.shape[3]), dtype=torch.float32)
    grid, constants = _plan(v, k, WALK | {"BT": steps.shape[-1]})
    ssd_state_kernel[(batch * heads * grid[0] * grid[1],)](
        *(v, k, steps, None if start is None else start.contiguous(), states),
        *(*v.stride()[:3], *k.stride()[:3], states.stride(0), *size),
        REVERSE=reverse,
        V_VEC=_vector_width(v),
        K_VEC=_vector_width(k),
        **constants,
    )
    return states


def _tiles(x: Tensor, B: Tensor, chunk_size: int, block: int) -> tuple[int, ...]:
    """L, H, E, tokens of a chunk, tiles of a chunk, tiles of a sample"""
    (_, length, heads, _), groups = x.shape, B.shape[2]
    chunk = min(chunk_size, length)
    parts = triton.cdiv(chunk, block)
    return length, heads, heads // groups, chunk, parts, triton.cdiv(length, chunk) * parts


def _plan(x: Tensor, B: Tensor, largest: dict[str, int]) -> tuple[tuple[int, int], dict]:
    """Blocks of P and of N, and constants. They know nothing of the size of the image."""
    head_dim, n_state = x.shape[3], B.shape[3]
    blocks = {
        "BP": min(largest["BP"], max(16, triton.next_power_of_2(head_dim))),  # a product takes no less than 16
        "BN": min(largest["BN"], max(16, triton.next_power_of_2(n_state))),
    }
    grid = triton.cdiv(head_dim, blocks["BP"]), triton.cdiv(n_state, blocks["BN"])
    split = "ieee" if B.dtype == torch.float32 else "tf32x3"
    return grid, largest | blocks | {"P": head_dim, "N": n_state, "SPLIT": split}


def _exact(*tensors: Tensor) -> str:
    """The precision in which products of these inputs lose nothing."""
    return "ieee" if tensors[0].dtype == torch.float32 else "tf32x3" if tensors[-1].dtype == torch.float32 else "tf32"


def _per_channel(D: Tensor | None, x: Tensor) -> Tensor | None:
    """(H,) or (H, P) -> (H, P)"""
    return None if D is None else D.reshape(D.shape[0], -1).expand(x.shape[2:]).contiguous()


def _last_contiguous(x: Tensor) -> Tensor:
    """x with stride 1 in the last dimension; its other strides stay."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _vector_width(*tensors: Tensor) -> int:
    """The largest power of 2, up to 16 bytes, that divides all strides of these tensors but the last, which is 1."""
    strides = [s for x in tensors for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
    return math.gcd(16 // tensors[0].element_size(), *strides)
