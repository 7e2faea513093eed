"""The launches of our GPU kernels, written down without a GPU: the implementations' own Python runs on fake tensors.

So grids, blocks and constants are those of a real call. What cannot be known here is told: the number of
multiprocessors, and how often the loops of a kernel turn (LOOPS).

Shapes: B batch, D channels, S side of the map, L = S * S tokens, K = 4 routes, N state, R rank of the step sizes.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from cases import HEAD_DIM, SSD_STAGES, SSD_STATE, STAGES, VIM_SIZES, K
from sass import Expected
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction

from ssm_ops._interface import BACKWARD_ROWS, FORWARD_ROWS, RUN, SUMS

BATCH = 128
WARP = 32


@dataclass
class Launch:
    """One launch of a kernel."""

    operator: str
    size: str
    implementation: str
    kernel: str
    dtype: torch.dtype
    grid: int
    warps: int
    tensors: dict[str, Tensor]  # all that it reads or writes
    channels: int  # tokens * channels of the operator
    states: int  # of a channel, 1 where there are none
    trips: tuple[int, ...]  # turns of the hot loop and of those around it, the outermost first
    beside: int  # turns of each loop beside the hot one
    source: tuple  # what the compiler takes
    widest: int = 16  # bytes of an access that strides and length permit
    tile: Expected | None = None
    shared: int = 0  # bytes that the launch asks for, beside what the kernel declares

    @property
    def bytes(self) -> int:
        """That must move: every tensor once."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(frozen=True)
class Shape:
    """Of a model's layer; `groups` are the routes."""

    name: str
    dim: int
    length: int
    state: int
    groups: int = K


SHAPES = {
    "scan": [
        *(Shape("VMamba-T", dim // 2, side * side, 1) for dim, side in STAGES),  # ratio 1, as published last
        *(Shape("VMamba-T", dim, side * side, 16) for dim, side in STAGES),  # ratio 2, as published first
        Shape("Vim-T", *VIM_SIZES[0], 16, groups=1),
    ],
    "ssd": [Shape("VSSD-T", heads * HEAD_DIM, side * side, SSD_STATE, groups=1) for heads, side in SSD_STAGES],
}


def launches(multiprocessors: int, dtype: torch.dtype) -> Iterator[Launch]:
    """Of all operators and implementations, forward and backward."""
    for operator, (implementations, family, call) in OPERATORS.items():
        for implementation in implementations:
            module = importlib.import_module(f"ssm_ops.{_FOLDER.get(operator, operator)}.impl.{implementation}")
            seen = set()
            for shape in SHAPES[family]:
                made: list[Launch] = []
                with FakeTensorMode(), _recorded(module, shape, dtype, multiprocessors, made):
                    size = call(module, shape, {"device": "cuda", "dtype": dtype})
                if size is None or size in seen:  # two models may ask the same of an operator
                    continue
                seen.add(size)
                for launch in made:
                    launch.operator, launch.implementation, launch.size = operator, implementation, size
                    launch.states = shape.state if operator in STATEFUL else 1
                    yield launch


# ---- what is called -------------------------------------------------------------------------------------------------


def _selective_scan(module, s: Shape, kind: dict) -> str:
    channels = s.groups * s.dim
    u, delta = (torch.empty(BATCH, channels, s.length, **kind) for _ in range(2))
    B, C = (torch.empty(BATCH, s.groups, s.state, s.length, **kind) for _ in range(2))
    A, D, bias = (torch.empty(channels, *n, device=kind["device"]) for n in ((s.state,), (), ()))
    out, _, states = module.forward(u, delta, A, B, C, D, None, bias, True, u.dtype, True)
    module.backward(out, u, delta, A, B, C, D, None, bias, states, True)
    return f"{s.name} B{BATCH} D{channels} L{s.length} N{s.state} G{s.groups}"


def _ss2d_scan(module, s: Shape, kind: dict) -> str | None:
    if s.groups != K:
        return None
    rank, side = s.dim // (16 if s.state == 1 else 32), math.isqrt(s.length)  # a sixteenth of the stage's width
    x = torch.empty(BATCH, side, side, s.dim, **kind).permute(0, 3, 1, 2)
    proj = torch.empty(BATCH, side, side, K * (rank + 2 * s.state), **kind)
    sizes = (K, s.dim, rank), (K * s.dim, s.state), (K * s.dim,), (K * s.dim,)
    parameters = [torch.empty(n, device=kind["device"]) for n in sizes]
    out, states = module.forward(x, proj, *parameters, "cross2d", x.dtype, True)
    module.backward(out, x, proj, *parameters, states, "cross2d")
    return f"{s.name} B{BATCH} D{s.dim} {side}x{side} N{s.state} R{rank}"


def _bidirectional_scan(module, s: Shape, kind: dict) -> str | None:
    if s.groups == K:
        return None
    rank = s.dim // 32
    x_forward, x_backward = (torch.empty(BATCH, s.length, s.dim, **kind) for _ in range(2))
    proj = torch.empty(BATCH, s.length, 2 * (rank + 2 * s.state), **kind)
    sizes = (2, s.dim, rank), (2 * s.dim, s.state), (2 * s.dim,), (2 * s.dim,)
    parameters = [torch.empty(n, device=kind["device"]) for n in sizes]
    out, states = module.forward(x_forward, x_backward, proj, *parameters, x_forward.dtype, True)
    module.backward(out, x_forward, x_backward, proj, *parameters, states)
    return f"{s.name} B{BATCH} L{s.length} D{s.dim} N{s.state} R{rank}"


def _cross(module, s: Shape, kind: dict, merge: bool) -> str | None:
    if s.groups != K:
        return None
    side = math.isqrt(s.length)
    if merge:
        module.merge(torch.empty(BATCH, K, s.dim, side, side, **kind), True, True, False, "cross2d")
    else:
        module.scan(torch.empty(BATCH, s.dim, side, side, **kind), True, True, False, "cross2d")
    return f"{s.name} B{BATCH} C{s.dim} {side}x{side}"


def _ssd(module, s: Shape, kind: dict) -> str:
    heads = s.dim // HEAD_DIM
    x, dt = torch.empty(BATCH, s.length, heads, HEAD_DIM, **kind), torch.empty(BATCH, s.length, heads, **kind)
    B, C = (torch.empty(BATCH, s.length, 1, s.state, **kind) for _ in range(2))
    A, D, bias = (torch.empty(heads, device=kind["device"]) for _ in range(3))
    out, _, states = module.forward(x, dt, A, B, C, D, bias, None, True, 256, x.dtype)
    last = torch.empty(BATCH, heads, HEAD_DIM, s.state, device=kind["device"])
    module.backward(out, last, x, dt, A, B, C, D, bias, None, states, True, 256)
    return f"{s.name} B{BATCH} L{s.length} H{heads} P{HEAD_DIM} N{s.state}"


def _causal_conv1d(module, s: Shape, kind: dict) -> str | None:
    if s.groups == K:
        return None
    x, weight, bias = (torch.empty(*n, **kind) for n in ((BATCH, s.dim, s.length), (s.dim, 4), (s.dim,)))
    out = module.forward(x, weight, bias, True, False)
    module.backward(out, x, weight, bias, True, False)
    return f"{s.name} B{BATCH} D{s.dim} L{s.length} K4"


OPERATORS: dict[str, tuple[tuple[str, ...], str, Callable]] = {
    "selective_scan": (("cuda", "triton"), "scan", _selective_scan),
    "ss2d_scan": (("triton",), "scan", _ss2d_scan),
    "bidirectional_scan": (("triton",), "scan", _bidirectional_scan),
    "cross_scan": (("triton",), "scan", lambda *args: _cross(*args, merge=False)),
    "cross_merge": (("triton",), "scan", lambda *args: _cross(*args, merge=True)),
    "ssd_chunk_scan": (("triton",), "ssd", _ssd),
    "causal_conv1d": (("triton",), "scan", _causal_conv1d),
}
"""By operator: implementations on a GPU, which SHAPES, and a call of forward and backward that returns the size."""
STATEFUL = ("selective_scan", "ss2d_scan", "bidirectional_scan", "ssd_chunk_scan")
_FOLDER = {"cross_merge": "cross_scan", "ssd_chunk_scan": "ssd"}


# ---- what is recorded -----------------------------------------------------------------------------------------------


def _tiles(a: dict) -> int:
    return triton.cdiv(a["L"], 1 << (a["LOG_K"] + a["LOG_R"]))


LOOPS: dict[str, Callable[[dict], tuple[int, ...]]] = {
    "selective_scan_fwd_kernel": lambda a: (_tiles(a), a["N"]),
    "selective_scan_bwd_kernel": lambda a: (_tiles(a), a["N"]),
    "route_scan_fwd_kernel": lambda a: (a["n_routes"], _tiles(a), a["N"]),
    "route_scan_bwd_kernel": lambda a: (a["n_routes"], _tiles(a), a["N"]),
    "ssd_state_kernel": lambda a: (a["n_tiles"],),
    "ssd_out_kernel": lambda a: (triton.cdiv(a["N"], a["BN"]),),
    "ssd_input_grad_kernel": lambda a: (triton.cdiv(a["P"], a["BP"]), triton.cdiv(a["N"], a["BN"])),
    "ssd_projection_grad_kernel": lambda a: (a["E"], triton.cdiv(a["P"], a["BP"])),
}
"""Turns of the loops of a Triton kernel, from its arguments by name. Kernels that are absent have none."""

BESIDE: dict[str, Callable[[dict], int]] = dict.fromkeys(
    ("route_scan_fwd_kernel", "route_scan_bwd_kernel"), lambda a: triton.cdiv(a["rank"], a["BR"])
)
"""Turns of the loops beside the hot one, likewise. Those of kernels that are absent count once."""


@contextlib.contextmanager
def _recorded(module, shape: Shape, dtype: torch.dtype, multiprocessors: int, made: list[Launch]) -> Iterator[None]:
    """Launches within are appended to `made` instead of being made; they lack what names the call."""
    common = {"operator": "", "size": "", "implementation": "", "dtype": dtype, "states": 1}
    common["channels"] = BATCH * shape.groups * shape.dim * shape.length

    def triton_run(kernel: JITFunction, *args, grid, warmup, num_warps=4, **constants) -> None:
        a = dict(zip(kernel.arg_names, args, strict=False)) | constants
        trips = LOOPS[kernel.__name__](a) if kernel.__name__ in LOOPS else ()
        tensors = {name: x for name, x in a.items() if isinstance(x, Tensor)}
        source = (kernel, a, num_warps)
        made.append(
            Launch(
                **common,
                kernel=kernel.__name__,
                grid=math.prod(grid),
                warps=num_warps,
                tensors=tensors,
                trips=trips,
                beside=BESIDE[kernel.__name__](a) if kernel.__name__ in BESIDE else 1,
                source=source,
            )
        )

    def cuda_launch(direction, u, delta, z, dout, B, C, A, D, bias, softplus, lanes, warps, *rest) -> None:
        forward, n_state, per_warp = direction == "forward", A.shape[1], WARP // lanes
        read = {"u": u, "delta": delta, "z": z, "dout": dout, "B": B, "C": C, "A": A, "D": D, "delta_bias": bias}
        tensors = {name: x for name, x in (read | rest[-1]).items() if x is not None}
        floats = FORWARD_ROWS * n_state * per_warp if forward else BACKWARD_ROWS * n_state * per_warp + 2 * SUMS
        tiles, batch = triton.cdiv(u.shape[2], lanes * RUN), SUMS // (2 * lanes * RUN)
        states = (n_state,) if forward else (triton.cdiv(n_state, batch), min(n_state, batch))
        grid = u.shape[0] * B.shape[1] * triton.cdiv(u.shape[1] // B.shape[1], warps * per_warp)
        # softplus, and backward its slope; the gate, and gradients in float32, are other paths
        tile = Expected(RUN, 2 * RUN * u.element_size()) if forward else Expected(2 * RUN, 5 * RUN * u.element_size())
        made.append(
            Launch(
                **common,
                kernel=f"{direction}_kernel",
                grid=grid,
                warps=warps,
                tensors=tensors,
                trips=(tiles, *states),
                beside=1,
                source=(f"selective_scan_{direction}", lanes),
                tile=tile,
                widest=math.gcd(RUN, u.shape[2]) * u.element_size(),
                shared=4 * warps * floats,
            )
        )

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", triton_run))
        patches.enter_context(mock.patch.object(torch.cuda, "device_of", lambda _: contextlib.nullcontext()))
        if hasattr(module, "_launch") and hasattr(module, "_multiprocessors"):
            patches.enter_context(mock.patch.object(module, "_launch", cuda_launch))
            patches.enter_context(mock.patch.object(module, "_multiprocessors", lambda _: multiprocessors))
        yield
