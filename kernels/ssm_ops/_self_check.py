"""Is an implementation right on this device? Small odd problems, forward and backward, beside the reference.

`python -m ssm_ops._self_check DEVICE OPERATOR:IMPL` prints its verdict in JSON. It is a process of its own
because of what a faulty kernel does to its process: it hangs, or leaves a device on which nothing runs any more. That
must not happen to the one that asks; _trust.py starts this and reads the line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import _trust
from ._library import OPERATORS
from .add_norm import add_norm
from .bidirectional_scan import bidirectional_scan
from .causal_conv1d import causal_conv1d
from .cross_scan import cross_merge, cross_scan
from .depthwise_conv import depthwise_conv
from .nc_ssd import nc_ssd
from .selective_scan import selective_scan
from .silu_gate import silu_gate
from .ss2d_scan import ss2d_scan
from .ssd import ssd_chunk_scan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ERRORS_OF_REFERENCE, SPARE = 4, 1e-5
"""A result may be as far from the truth, in the root mean square and relative to it, as four times the reference in the
same dtype, and a little. Another order of sums stays below twice; one token of a hundred left out is beyond."""


@dataclass(frozen=True)
class Problem:
    """One call: `sizes` of the tensors by name; those in `parameters` stay float32 beside half precision. Without
    `derivatives` the output is all that the operator's kernels give."""

    function: Callable[..., Tensor]
    sizes: dict[str, tuple[int, ...]]
    parameters: tuple[str, ...] = ()
    options: dict[str, object] = field(default_factory=dict)
    derivatives: bool = True

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Of the size that trained models show, rounded to `dtype`, in float64 on the CPU; always the same."""
        generator = torch.Generator().manual_seed(0)
        made = {}
        for name, size in self.sizes.items():
            x = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
            if name == "A":  # decays
                x = -x.abs() - 0.1
            elif name in ("delta", "dt"):
                x = 0.5 * x - 1
            elif name == "dt_weight":
                x = 0.5 * x
            made[name] = x.to(torch.float32 if name in self.parameters else dtype).double()
        return made

    def inference(self, impl: str, dtype: torch.dtype, device: str) -> Tensor:
        """The output, where nothing is kept for a backward: some kernels have a way of their own for that."""
        wide = torch.promote_types(dtype, torch.float32)
        given = {n: x.to(device, wide if n in self.parameters else dtype) for n, x in self.inputs(dtype).items()}
        return self.function(**given, **self.options, impl=impl)

    def results(self, impl: str, dtype: torch.dtype, device: str, computed_in: torch.dtype) -> dict[str, Tensor]:
        """The output and all gradients, of the inputs rounded to `dtype`."""
        wide = torch.promote_types(computed_in, torch.float32)
        leaves = {
            name: x.to(device, wide if name in self.parameters else computed_in).requires_grad_(self.derivatives)
            for name, x in self.inputs(dtype).items()
        }
        out = self.function(**leaves, **self.options, impl=impl)
        if not self.derivatives:
            return {"out": out}
        # factors that every dtype holds exactly
        generator = torch.Generator().manual_seed(1)
        factors = torch.randint(-8, 9, out.shape, generator=generator, dtype=torch.float64, device="cpu") / 4
        out.backward(factors.to(out))
        return {"out": out.detach()} | {f"d{name}": x.grad for name, x in leaves.items()}


def _scan(batch, dim, length, n_state, groups, **extra) -> Problem:
    by_token, by_state = (batch, dim, length), (batch, groups, n_state, length)
    sizes = {"u": by_token, "delta": by_token, "A": (dim, n_state), "B": by_state, "C": by_state, "D": (dim,)}
    parameters = ("A", "D", "delta_bias")
    return Problem(selective_scan, sizes | extra, parameters, {"delta_softplus": True})


def _image_scan(batch, dim, height, width, n_state, rank, scans) -> Problem:
    sizes = {
        "x": (batch, dim, height, width),
        "proj": (batch, height, width, 4 * (rank + 2 * n_state)),
        "dt_weight": (4, dim, rank),
        "A": (4 * dim, n_state),
        "D": (4 * dim,),
        "dt_bias": (4 * dim,),
    }
    return Problem(ss2d_scan, sizes, ("dt_weight", "A", "D", "dt_bias"), {"scans": scans})


def _both_directions(batch, length, dim, n_state, rank) -> Problem:
    sizes = {
        "x_forward": (batch, length, dim),
        "x_backward": (batch, length, dim),
        "proj": (batch, length, 2 * (rank + 2 * n_state)),
        "dt_weight": (2, dim, rank),
        "A": (2 * dim, n_state),
        "D": (2 * dim,),
        "dt_bias": (2 * dim,),
    }
    return Problem(bidirectional_scan, sizes, ("dt_weight", "A", "D", "dt_bias"))


def _heads(function, batch, length, heads, head_dim, n_state, groups) -> Problem:
    by_state = (batch, length, groups, n_state)
    sizes = {
        "x": (batch, length, heads, head_dim),
        "dt": (batch, length, heads),
        "A": (heads,),
        "B": by_state,
        "C": by_state,
        "D": (heads,),
        "dt_bias": (heads,),
    }
    return Problem(function, sizes, ("A", "D", "dt_bias"), {"dt_softplus": True})


def _convolution(batch, dim, length, **options) -> Problem:
    return Problem(causal_conv1d, {"x": (batch, dim, length), "weight": (dim, 4), "bias": (dim,)}, (), options)


def _depthwise(batch, height, width, dim, **options) -> Problem:
    tensors = {"x": (batch, height, width, dim), "weight": (dim, 1, 3, 3), "bias": (dim,)}
    return Problem(depthwise_conv, tensors, ("weight", "bias"), options, derivatives=False)


def _norm(*size: int, **options) -> Problem:
    channels = size[-1:]
    tensors = {"x": size, "branch": size, "weight": channels, "bias": channels}
    return Problem(_normed, tensors, ("weight", "bias"), options, derivatives=False)


def _normed(**arguments) -> Tensor:
    return add_norm(**arguments)[1]


# Sizes that no tile, vector or block divides, and one that all of them do.
PROBLEMS: dict[str, tuple[Problem, ...]] = {
    "selective_scan": (
        _scan(2, 12, 77, 3, groups=2, delta_bias=(12,), z=(2, 12, 77)),
        _scan(1, 64, 320, 1, groups=4, delta_bias=(64,)),
        _scan(1, 5, 131, 16, groups=1),
    ),
    "ss2d_scan": (_image_scan(2, 12, 5, 7, 1, 2, "cross2d"), _image_scan(1, 32, 16, 16, 3, 2, "bidi")),
    "bidirectional_scan": (_both_directions(2, 77, 12, 3, 2), _both_directions(1, 128, 32, 16, 2)),
    "cross_scan": (
        Problem(cross_scan, {"x": (2, 5, 7, 9)}),
        Problem(cross_scan, {"x": (1, 16, 12, 32)}, options={"in_channel_first": False, "out_channel_first": False}),
    ),
    "cross_merge": (
        Problem(cross_merge, {"y": (2, 4, 5, 7, 9)}),
        Problem(
            cross_merge, {"y": (1, 16, 12, 4, 32)}, options={"in_channel_first": False, "out_channel_first": False}
        ),
    ),
    "ssd_chunk_scan": (_heads(ssd_chunk_scan, 2, 77, 4, 12, 5, 2), _heads(ssd_chunk_scan, 1, 128, 2, 64, 64, 1)),
    "nc_ssd": (_heads(nc_ssd, 2, 77, 4, 12, 5, 2),),
    "causal_conv1d": (_convolution(2, 5, 77), _convolution(1, 32, 128, activation="silu", reverse=True)),
    "silu_gate": (Problem(silu_gate, {"y": (2, 7, 77), "z": (2, 7, 77)}, options={"scale": 0.5}),),
    "add_norm": (_norm(2, 7, 77), _norm(1, 64, 32, rms=True)),
    "depthwise_conv": (_depthwise(2, 5, 7, 20), _depthwise(1, 16, 16, 32, activation="silu")),
}


def _error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference, relative to that of `want`; NaN where something is not finite."""
    got = got.double().cpu()
    return float((got - want).norm() / want.norm())


def _size(problem: Problem) -> tuple[int, ...]:
    """That of the first tensor, by which a problem is known."""
    return next(iter(problem.sizes.values()))


def fault(operator: str, impl: str, device: str) -> str | None:
    """What is wrong with this implementation on this device, None if nothing: its numbers, or that they change."""
    dtypes = [dtype for dtype in DTYPES if dtype in (OPERATORS[operator].kernel_dtypes or DTYPES)]
    for problem in PROBLEMS[operator]:
        for dtype in dtypes:
            truth = problem.results("reference", dtype, "cpu", torch.float64)
            yardstick = problem.results("reference", dtype, "cpu", dtype)
            got, again = (problem.results(impl, dtype, device, dtype) for _ in range(2))
            for name, want in truth.items():
                error, allowed = _error(got[name], want), ERRORS_OF_REFERENCE * _error(yardstick[name], want) + SPARE
                where = f"{name} of {dtype} at {_size(problem)}"
                if not error <= allowed:  # NaN is no number below
                    return f"wrong numbers: {where} is off by {error:.2g} of its size, {allowed:.2g} at most is right"
                if not torch.equal(got[name], again[name]):
                    return f"the same call gives other bits: {where}"
            if not torch.equal(problem.inference(impl, dtype, device), got["out"]):
                return f"inference gives other bits than training: out of {dtype} at {_size(problem)}"
    return None


def main(device: str, pair: str) -> None:
    """Print what is wrong, and whether that may pass."""
    operator, impl = pair.split(":")
    passing = False
    try:
        found = fault(operator, impl, device)
    except Exception as error:  # of a compiler, a driver or a kernel: anything
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        passing = isinstance(error, torch.OutOfMemoryError) or "busy or unavailable" in str(error)
    print(f"{_trust.VERDICT}{json.dumps({'fault': found, 'passing': passing})}")


if __name__ == "__main__":
    main(*sys.argv[1:])
