"""Measures images/s and peak memory of models, in inference and training: the engine of tp.py and scaleup.py.

All variants take turns, for several rounds, so that what else happens on the machine hits all of them; images/s is the
median over rounds, slowest and fastest are the spread. On the CPU a turn is as many steps as fill its seconds; on CUDA
it is a `triton.testing.do_bench` of that length, which empties the cache of the GPU before every step.

Inference is a forward pass in evaluation mode; training is forward, cross-entropy and backward: gradients only, no
optimizer, no data. bf16 is autocast, weights stay fp32. Compiled models are specialised on their image size
(torch.compile, dynamic=False). Peak memory is that of one step after warm-up: weights, images, and `peak_bytes`.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from analyze.memory import peak_bytes
from ssm_train.common.timing import timed

MODES = ("inference", "training")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Variant:
    """One thing to measure, on `batch` images of size x size pixels."""

    model: str
    size: int
    batch: int
    mode: str = "inference"
    precision: str = "fp32"
    compiled: bool = False


@dataclass
class Result:
    """What became of a variant; `status` is waiting, running, ok, out of memory, or failed: and why."""

    variant: Variant
    status: str = "waiting"
    samples: list[float] = field(default_factory=list)
    """Images/s of each round."""
    peak_mib: float | None = None

    @property
    def images_per_second(self) -> float | None:
        """The median; None where the variant did not get through all rounds."""
        return statistics.median(self.samples) if self.status == "ok" else None

    def turns_over(self, rounds: int) -> int:
        """Of the first turn and `rounds` more, how many are over."""
        if self.status in ("waiting", "running"):
            return (self.peak_mib is not None) + len(self.samples)
        return 1 + rounds


class Step:
    """One step of a variant: `step.ready()` once before timing, then `step()`."""

    def __init__(self, variant: Variant, model: nn.Module, images: torch.Tensor) -> None:
        self._model, self._images, self._training = model, images, variant.mode == "training"
        self._called = torch.compile(model, dynamic=False) if variant.compiled else model
        self._precision = PRECISIONS[variant.precision]
        self._targets = torch.zeros(variant.batch, dtype=torch.int64, device=images.device)

    @property
    def own_bytes(self) -> int:
        """Weights, buffers and images."""
        tensors = itertools.chain(self._model.parameters(), self._model.buffers(), [self._images])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def ready(self) -> None:
        self._model.train(self._training)

    def __call__(self) -> None:
        autocast = torch.autocast(self._images.device.type, self._precision, enabled=self._precision != torch.float32)
        if not self._training:
            with torch.inference_mode(), autocast:
                self._called(self._images)
            return
        try:
            with autocast:
                logits = self._called(self._images)
            F.cross_entropy(logits.float(), self._targets).backward()
        finally:
            self._model.zero_grad(set_to_none=True)


def measure(
    variants: Sequence[Variant],
    build: Callable[[Variant], nn.Module],
    device: torch.device,
    *,
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    changed: Callable[[list[Result]], None] = lambda results: None,
) -> list[Result]:
    """Measure all `variants` in turns, as the head of this file tells, each turn `seconds` long.

    `build` gives the model of a variant, on `device`; several may share one. `changed` is called with all results
    before a variant is first tried and after every measurement.
    """
    results = [Result(variant) for variant in variants]
    # shared by variants of one size
    images = cache(lambda batch, size: torch.randn(batch, 3, size, size, device=device))
    steps: dict[Variant, Step] = {}
    counts: dict[Variant, int] = {}

    def prepare(result: Result) -> None:
        v = result.variant
        step = steps[v] = Step(v, build(v), images(v.batch, v.size))
        step.ready()
        timed(step, device)  # compiles kernels and fills caches
        result.peak_mib = (step.own_bytes + peak_bytes(step, device)) / 2**20
        if device.type != "cuda":
            counts[v] = max(1, math.ceil(seconds / timed(step, device, clock=clock)))

    def sample(result: Result) -> None:
        v = result.variant
        steps[v].ready()
        if device.type == "cuda":
            taken = bench(steps[v], seconds)
        else:
            taken = timed(steps[v], device, counts[v], clock) / counts[v]
        result.samples.append(v.batch / taken)

    # more specialisations than by default: dynamo counts those of all models of one class together
    with torch._dynamo.config.patch(cache_size_limit=8 + 2 * len(results)):
        for action, repeats in ((prepare, 1), (sample, rounds)):
            for _, result in itertools.product(range(repeats), results):
                if result.status not in ("waiting", "running"):
                    continue
                if result.status == "waiting":
                    result.status = "running"
                    changed(results)
                result.status = failure(lambda action=action, result=result: action(result), device) or "running"
                changed(results)
    for result in results:
        result.status = "ok" if result.status == "running" else result.status
    changed(results)
    return results


def bench(step: Callable[[], None], seconds: float) -> float:
    """Seconds of one `step` on the GPU, the mean of as many as fill `seconds`."""
    from triton.testing import do_bench  # there is no triton where there is no CUDA

    return do_bench(step, warmup=0, rep=1e3 * seconds, return_mode="mean") / 1e3


def failure(action: Callable[[], None], device: torch.device) -> str:
    """Do it; returns "", or the status of a variant for which it failed."""
    try:
        action()
        return ""
    # a failing compilation is a RuntimeError; models refuse an image size by ValueError, or timm's by assertion
    except (MemoryError, RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        # PyTorch has an exception of its own for CUDA alone
        full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in reason
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return "out of memory" if full else f"failed: {reason[:200]}"
