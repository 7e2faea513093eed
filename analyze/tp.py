"""Throughput and peak memory of models, of this repository and of timm, over image sizes: inference and training.

python analyze/tp.py [--models tiny] [--sizes 224 384 512 640 738 1024 1248] [--precisions fp32 bf16] \
    [--compile no yes] [--modes inference training] [--batch 64] [--rounds 5] [--out tp.png]

--models takes names of timm's registry, ours included, and names of sets: nano, tiny, small, base (ours beside Swin,
ConvNeXt and DeiT of that size). Beside the picture comes a csv with a line for every variant.

How it is measured. All variants take turns, for several rounds, so that what else happens on the machine hits all of
them; images/s is the median over rounds, slowest and fastest are the spread. A turn is as many steps as fill --seconds.
Inference is a forward pass in evaluation mode; training is forward, cross-entropy and backward without stochastic
depth: gradients only, no optimizer, no data. Images are synthetic, weights random. bf16 is autocast, weights stay fp32.
Compiled models are specialised on their image size (torch.compile, dynamic=False).

Peak memory is that of one step after warm-up: weights, images, and the most that PyTorch's allocator had handed out at
once in the step for activations, gradients and temporaries. On CUDA it is read from the allocator's own statistics. On
the CPU it is the running sum of the allocations and frees that PyTorch's profiler records, and not resident memory,
which contains PyTorch itself and what its libraries keep; scratch memory that oneDNN or our kernels take from the C
library is left out.

A variant that runs out of memory or fails has that as its status in the csv and a cross in the picture. (The weights of
all models stay on the device, and take their part of it.) The csv is written anew at every step: where the system kills
the process, the variant that is "running" without a peak memory was at fault.
"""

import argparse
import csv
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from rich.console import Console
from rich.progress import Progress
from torch import nn
from torch.autograd.profiler import profile

from analyze.inputs import find_device
from ssm_train.common.command import run
from ssm_train.common.errors import UserError
from ssm_train.step.model import check_model_name

SETS = {
    "nano": "vmamba_nano vim_nano vssd_nano",
    "tiny": "vmamba_tiny_s1l8 vssd_tiny vim_tiny_patch16_224 "
    "swin_tiny_patch4_window7_224 convnext_tiny deit_tiny_patch16_224",
    "small": "vmamba_small_s1l20 vssd_small vim_small_patch16_224 "
    "swin_small_patch4_window7_224 convnext_small deit_small_patch16_224",
    "base": "vmamba_base_s1l20 vssd_base vim_base_patch16_224 "
    "swin_base_patch4_window7_224 convnext_base deit_base_patch16_224",
}
MODES = ("inference", "training")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

# of Okabe and Ito, told apart by colour-blind readers and in grey
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


_STYLES = {"eager": {"linestyle": "-", "marker": "o"}, "compiled": {"linestyle": "--", "marker": "s"}}


# ---- measuring -------------------------------------------------------------------------------------------------------


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
    steps: dict[Variant, tuple[Step, int]] = {}

    def timed(step: Step, count: int) -> float:
        step.ready()
        _wait(device)
        start = clock()
        for _ in range(count):
            step()
        _wait(device)
        return clock() - start

    def prepare(result: Result) -> None:
        v = result.variant
        step = Step(v, build(v), images(v.batch, v.size))
        timed(step, 1)  # compiles kernels and fills caches
        step.ready()
        result.peak_mib = (step.own_bytes + peak_bytes(step, device)) / 2**20
        steps[v] = step, max(1, math.ceil(seconds / timed(step, 1)))

    def sample(result: Result) -> None:
        step, count = steps[result.variant]
        result.samples.append(result.variant.batch * count / timed(step, count))

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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Most bytes that one `step` has allocated at the same time, on `device`."""
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else a PyTorch for CUDA complains that there is no GPU
    with profile(use_kineto=True, profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


# ---- what to measure -------------------------------------------------------------------------------------------------


def named_models(names: Iterable[str]) -> list[str]:
    """`names` with sets replaced by their models. UserError for an unknown one."""
    found = list(dict.fromkeys(itertools.chain.from_iterable(SETS.get(name, name).split() for name in names)))
    for name in found:
        check_model_name(name, "--models")
    return found


def builder(device: torch.device) -> Callable[[Variant], nn.Module]:
    """Builds every model once, or once for every size where it is made for one; without stochastic depth."""

    @cache
    def create(name: str, size: int | None) -> nn.Module:
        fixed = {} if size is None else {"img_size": size}
        try:
            return timm.create_model(name, drop_path_rate=0.0, **fixed).to(device)
        except TypeError as error:
            raise UserError(f"model {name} cannot be built as needed here: {error}") from error

    def build(variant: Variant) -> nn.Module:
        settings = timm.get_pretrained_cfg(variant.model)
        rebuilt = settings.fixed_input_size and variant.size != settings.input_size[-1]
        return create(variant.model, variant.size if rebuilt else None)

    return build


# ---- results ---------------------------------------------------------------------------------------------------------

COLUMNS = (
    "model",
    "mode",
    "size",
    "batch",
    "precision",
    "compiled",
    "images_per_second",
    "slowest",
    "fastest",
    "rounds",
    "peak_mib",
    "status",
    "device",
)


def table(results: Iterable[Result], device: str) -> list[dict[str, object]]:
    """The lines of the csv; what was not measured is left blank."""
    rows = []
    for result in results:
        v, speed = result.variant, result.images_per_second
        spread = (min(result.samples), max(result.samples)) if speed is not None else (None, None)
        done = len(result.samples)
        cells = (v.model, v.mode, v.size, v.batch, v.precision, v.compiled, speed, *spread, done, result.peak_mib)
        rows.append(dict(zip(COLUMNS, (*cells, result.status, device), strict=True)))
    return rows


def write_csv(rows: Iterable[dict[str, object]], path: Path, columns: Sequence[str] = COLUMNS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def draw(results: Sequence[Result], device: str) -> Figure:
    """A row per mode and precision: images/s and peak memory over the image size. Colours tell models, dashes and
    squares what is compiled; a cross at the foot stands for a variant that has no number."""
    kinds = list(dict.fromkeys((result.variant.mode, result.variant.precision) for result in results))
    figure = Figure(figsize=(11, 0.8 + 3.6 * len(kinds)), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05, hspace=0.05)
    grid = figure.subplots(len(kinds), 2, squeeze=False)
    colors = dict(zip(dict.fromkeys(r.variant.model for r in results), itertools.cycle(_COLORS), strict=False))
    for (speed, memory), kind in zip(grid, kinds, strict=True):
        mine = [result for result in results if (result.variant.mode, result.variant.precision) == kind]
        for (model, color), compiled in itertools.product(colors.items(), (False, True)):
            line = [r for r in mine if (r.variant.model, r.variant.compiled) == (model, compiled)]
            style = {"color": color, **_STYLES["compiled" if compiled else "eager"]}
            _curves(speed, memory, sorted(line, key=lambda result: result.variant.size), style)
        speed.set(title=f"{', '.join(kind)}: throughput ({device})", ylabel="images/s")
        memory.set(title=f"{', '.join(kind)}: peak memory, batch {mine[0].variant.batch}", ylabel="MiB")
        for axes in (speed, memory):
            size_axis(axes, sorted({result.variant.size for result in results}))
            log_y_axis(axes)
    handles = _legend(results, colors)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize="small")
    return figure


def _curves(speed: Axes, memory: Axes, line: Sequence[Result], style: dict[str, str]) -> None:
    ok = [result for result in line if result.images_per_second is not None]
    sizes = [result.variant.size for result in ok]
    middle = [statistics.median(result.samples) for result in ok]
    below = [m - min(result.samples) for m, result in zip(middle, ok, strict=True)]
    above = [max(result.samples) - m for m, result in zip(middle, ok, strict=True)]
    if ok:
        speed.errorbar(sizes, middle, yerr=(below, above), capsize=2, markersize=4, linewidth=1.3, **style)
        memory.plot(sizes, [result.peak_mib for result in ok], markersize=4, linewidth=1.3, **style)
    for result in line:
        if result.images_per_second is None:
            for axes in (speed, memory):
                foot = axes.get_xaxis_transform()  # x in data, y as share of the height
                axes.plot(result.variant.size, 0.03, "x", color=style["color"], markersize=8, transform=foot)


def _legend(results: Iterable[Result], colors: dict[str, str]) -> list[Line2D]:
    variants = [result.variant for result in results]
    handles = [Line2D([], [], color=color, label=model) for model, color in colors.items()]
    if any(variant.compiled for variant in variants):
        handles += [Line2D([], [], color="grey", label=name, **style) for name, style in _STYLES.items()]
    if any(result.status not in ("ok", "waiting", "running") for result in results):
        handles.append(Line2D([], [], color="grey", marker="x", ls="", label="out of memory or failed"))
    return handles


def log_y_axis(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers: 1, 2, 5, 10, ..."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def size_axis(axes: Axes, sizes: Sequence[int]) -> None:
    """A logarithmic x axis with the image sizes as its ticks."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("image size (pixels a side)")
    axes.grid(alpha=0.3, which="both")


def device_name(device: torch.device) -> str:
    """What the numbers depend on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def progress_bar() -> Progress:
    """On the terminal (stderr), if there is one."""
    return Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def at_least(lowest: float, **options: float | Iterable[float]) -> None:
    """UserError for an option with a number below `lowest`."""
    for name, given in options.items():
        for value in given if isinstance(given, Iterable) else [given]:
            if not value >= lowest:
                raise UserError(f"--{name} {value} must be at least {lowest}")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="analyze/tp.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", default=["nano"], metavar="NAME", help="models, or sets: nano, tiny, small, base (nano)")
    add("--sizes", type=int, nargs="+", default=[32, 64, 128], help="pixels a side (32 64 128)")
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="(both)")
    add("--precisions", nargs="+", choices=PRECISIONS, default=["fp32"], help="(fp32)")
    add("--compile", nargs="+", choices=("no", "yes"), default=["no"], help="torch.compile (no)")
    add("--batch", type=int, default=8, help="images of a step (8)")
    add("--rounds", type=int, default=5, help="turns of every variant (5)")
    add("--seconds", type=float, default=0.1, help="length of a turn (0.1)")
    add("--device", default="", choices=("", "cpu", "cuda"), help="(CUDA where there is one)")
    add("--out", type=Path, default=Path("tp.png"), help="PNG to write, and a csv beside it (tp.png)")
    args = parser.parse_args(argv)

    def command() -> None:
        at_least(1, sizes=args.sizes, batch=args.batch, rounds=args.rounds)
        at_least(0, seconds=args.seconds)
        device, path = find_device(args.device), args.out.with_suffix(".csv")
        name = device_name(device)
        compiled = [choice == "yes" for choice in args.compile]
        choices = itertools.product(args.modes, args.precisions, compiled, args.sizes, named_models(args.models))
        variants = [Variant(model, size, args.batch, mode, p, c) for mode, p, c, size, model in choices]
        with progress_bar() as progress:
            task = progress.add_task("measuring", total=len(variants) * (1 + args.rounds))

            def changed(results: list[Result]) -> None:
                write_csv(table(results, name), path)
                progress.update(task, completed=sum(_turns(result, args.rounds) for result in results))

            torch.manual_seed(0)
            results = measure(
                variants, builder(device), device, rounds=args.rounds, seconds=args.seconds, changed=changed
            )
        _print(results)
        draw(results, name).savefig(args.out, dpi=120)
        print(args.out, path, sep="\n")

    return run(command)


def _turns(result: Result, rounds: int) -> int:
    """Of the first one and `rounds` more, how many are over."""
    if result.status in ("waiting", "running"):
        return (result.peak_mib is not None) + len(result.samples)
    return 1 + rounds


def _print(results: Iterable[Result]) -> None:
    for result in results:
        v = result.variant
        how = f"{v.model:30} {v.mode:9} {v.size:5} px  batch {v.batch} {v.precision}{' compiled' * v.compiled}"
        if result.images_per_second is None:
            print(f"{how}  {result.status}")
        else:
            spread = f"({min(result.samples):.1f}..{max(result.samples):.1f})"
            print(f"{how}  {result.images_per_second:9.1f} images/s {spread}  {result.peak_mib:.0f} MiB")


if __name__ == "__main__":
    sys.exit(main())
