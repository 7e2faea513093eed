"""Whole models on a CPU, as ratios to a model of timm: python kernels/benchmarks/cpu_models.py --out FOLDER

Every cell of the table is one round of turns: a group of models, one precision, one batch, so that what else happens on
the machine hits all of them, and their ratio means something where a time alone would not. Per group the first model is
1; a ratio above 1 is faster. Images are 224 x 224 in channels_last, random, and so are the weights.

Ways to run: "eager"; "prepared", by `ssm_models.for_inference`; "int8", linear layers in eight bits by PyTorch's
`quantize_dynamic`, everything else in float32; "compiled", by torch.compile with frozen weights, one image in float32,
which is what timm publishes of its models.
timm's models run eager in the rounds of "prepared", too, as there is nothing to prepare. bfloat16 is autocast.
"training" is forward, cross-entropy and backward in train mode, without stochastic depth.

FOLDER gets cpu-models.csv and its picture. `--profile MODEL` prints instead what groups of operators cost a model.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from models import create, infer, train
from output import legend_beside, panels, write_csv, write_picture
from timing import measure
from torch import nn
from torch.ao.quantization import quantize_dynamic

from ssm_models import for_inference, plain_layers
from ssm_models.layers.onednn import problem

GROUPS = {
    "maps": ("swin_tiny_patch4_window7_224", "convnext_tiny", "vmamba_tiny_s1l8", "vssd_tiny"),
    "tokens": ("deit_tiny_patch16_224", "vim_tiny_patch16_224"),
}
DTYPES = (torch.float32, torch.bfloat16)
BATCHES = {"eager": (1, 8), "prepared": (1, 8), "int8": (1, 8), "compiled": (1,), "training": (8,)}
WAYS = tuple(BATCHES)
SINGLE = ("int8", "compiled")
"""Of these ways there is one precision."""
COLUMNS = ("cpu", "threads", "torch", "way", "dtype", "batch", "model", "baseline", "ratio", "median_ms", "fastest_ms")
# Of an operator's name in the profile, the first that fits.
KINDS = {
    "scans": ("ssm_ops::ss2d", "ssm_ops::bidirectional", "ssm_ops::selective", "ssm_ops::nc_ssd"),
    "short convolution of Vim": ("ssm_ops::causal_conv1d",),
    "gate": ("ssm_ops::silu_gate",),
    "products and convolutions": ("convolution", "linear_pointwise", "mm", "conv2d", "linear", "attention"),
    "norms": ("norm",),
    "activations": ("gelu", "silu", "relu", "clamp", "threshold", "softplus"),
    "copies": ("copy", "cat", "clone", "contiguous", "to_copy"),
    "additions and products by element": ("add", "mul", "sub", "div", "pow", "exp", "sum", "neg"),
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--dtypes", nargs="+", choices=[_name(d) for d in DTYPES], default=[_name(d) for d in DTYPES])
    parser.add_argument("--batches", nargs="+", type=int, choices=(1, 8), default=[1, 8])
    parser.add_argument("--turns", type=int, default=10, help="per cell; the table has their median")
    parser.add_argument("--models", nargs="+", help="in place of the groups; the first is 1")
    parser.add_argument("--size", type=int, default=224)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder of the table")
    where.add_argument("--profile", metavar="MODEL", help="print its time by group of operators instead")
    return parser.parse_args(argv)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cpu_name() -> str:
    """As the processor says, with its number of cores that this process may use."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "unknown"


def runner(model: nn.Module, way: str, dtype: torch.dtype, images: torch.Tensor) -> Callable[[], None]:
    """One step of a model, prepared for its way."""
    ours = type(model).__module__.startswith("ssm_models")
    if way == "training":
        return functools.partial(train, model.train(), images, dtype)
    model = model.eval()
    if way == "compiled":
        return functools.partial(compiled_step, torch.compile(model), images, dtype)
    if way == "int8":
        layers = plain_layers(model) if ours else model
        return functools.partial(infer, quantize_dynamic(layers, {nn.Linear}, dtype=torch.qint8), images, torch.float32)
    if way == "prepared" and ours:
        return functools.partial(infer, for_inference(model, dtype), images, torch.float32)
    return functools.partial(infer, model, images, dtype)


def compiled_step(model: Callable, images: torch.Tensor, dtype: torch.dtype) -> None:
    """Frozen weights want no_grad, not inference_mode."""
    import torch._inductor.config as inductor

    freezing = inductor.patch(freezing=True)
    with freezing, torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(images)


def cells(args: argparse.Namespace) -> Iterator[tuple[tuple[str, ...], str, torch.dtype, int]]:
    groups = [tuple(args.models)] if args.models else [GROUPS[name] for name in args.groups]
    for names, way in itertools.product(groups, args.ways):
        for dtype, batch in itertools.product(DTYPES[:1] if way in SINGLE else DTYPES, BATCHES[way]):
            if _name(dtype) not in args.dtypes or batch not in args.batches:
                continue
            missing = problem(dtype) if way == "prepared" else None
            if missing is None:
                yield names, way, dtype, batch
            else:
                print(f"{way:9} {_name(dtype):9} batch {batch}  left out: {missing}")


def measure_cell(
    names: tuple[str, ...], way: str, dtype: torch.dtype, batch: int, args: argparse.Namespace
) -> list[dict]:
    images = torch.randn(batch, 3, args.size, args.size).to(memory_format=torch.channels_last)
    runs = {}
    for name in names:
        torch._dynamo.reset()
        model = create(name, args.size, torch.device("cpu")).to(memory_format=torch.channels_last)
        runs[name] = runner(model, way, dtype, images)
    times = measure(runs, args.turns, torch.device("cpu"))
    shared = (cpu_name(), torch.get_num_threads(), torch.__version__, way, _name(dtype), batch)
    rows = []
    for name, t in times.items():
        ratio = times[names[0]].median / t.median
        values = (*shared, name, names[0], f"{ratio:.3f}", f"{1e3 * t.median:.2f}", f"{1e3 * t.fastest:.2f}")
        rows.append(dict(zip(COLUMNS, values, strict=True)))
        print(f"{way:9} {shared[4]:9} batch {batch}  {name:30} {ratio:6.2f}  {1e3 * t.median:9.1f} ms", flush=True)
    return rows


def draw(rows: list[dict], table: Path) -> None:
    """A panel per baseline: ratios as bars, one group per way, precision and batch; of one group a bar per model."""
    baselines = list(dict.fromkeys(row["baseline"] for row in rows))
    figure, found = panels(len(baselines), (17, 4 * len(baselines)))
    for axes, baseline in zip(found, baselines, strict=True):
        mine = [row for row in rows if row["baseline"] == baseline]
        labels = list(dict.fromkeys((row["way"], row["dtype"], row["batch"]) for row in mine))
        models = list(dict.fromkeys(row["model"] for row in mine))
        title = f"images per second on {mine[0]['cpu']}, {baseline} = 1"
        if len(labels) == 1:
            bars = axes.barh(models, [float(row["ratio"]) for row in mine])
            axes.bar_label(bars, fmt="%.2f", padding=3)
            axes.axvline(1, color="black", linewidth=0.8)
            way, dtype, batch = labels[0]
            axes.set(title=f"{title}; {way}, {dtype}, batch {batch}", xlabel="times as fast")
            axes.margins(x=0.08)
            axes.invert_yaxis()
            continue
        for i, model in enumerate(models):
            ratios = {(r["way"], r["dtype"], r["batch"]): float(r["ratio"]) for r in mine if r["model"] == model}
            places = [j + (i + 0.5) / len(models) * 0.8 - 0.4 for j in range(len(labels))]
            axes.bar(places, [ratios[label] for label in labels], 0.8 / len(models), label=model)
        axes.set_xticks(range(len(labels)), [f"{way}\n{dtype}\nbatch {batch}" for way, dtype, batch in labels])
        axes.set(title=title, ylabel="times as fast")
        axes.grid(axis="y", alpha=0.3)
        legend_beside(axes)
    write_picture(figure, table)


# ---- where the time goes --------------------------------------------------------------------------------------------


def kind_of(operator: str) -> str:
    for kind, parts in KINDS.items():
        if any(part in operator for part in parts):
            return kind
    return "the rest"


def print_profile(name: str, args: argparse.Namespace) -> None:
    """Percent of a model's own time by group of operators, for every way in both precisions."""
    for way, dtype in itertools.product([way for way in args.ways if way not in SINGLE], DTYPES):
        if way == "prepared" and problem(dtype) is not None:
            continue
        images = torch.randn(8, 3, args.size, args.size).to(memory_format=torch.channels_last)
        model = create(name, args.size, torch.device("cpu")).to(memory_format=torch.channels_last)
        run = runner(model, way, dtype, images)
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
        sums: dict[str, float] = {}
        for event in profile.key_averages():
            kind = kind_of(event.key)
            sums[kind] = sums.get(kind, 0.0) + event.self_cpu_time_total
        total = sum(sums.values())
        print(f"{name}, {way}, {_name(dtype)}, batch 8")
        for kind, time in sorted(sums.items(), key=lambda item: -item[1]):
            print(f"  {kind:36} {100 * time / total:5.1f} %")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(0)
    if args.profile:
        print_profile(args.profile, args)
        return
    table, rows = args.out / "cpu-models.csv", []
    for cell in cells(args):
        rows += measure_cell(*cell, args)
        write_csv(rows, COLUMNS, table)  # what is there stays, should the run be cut short
    draw(rows, table)
    print(f"wrote {table} and {table.with_suffix('.png')}")


if __name__ == "__main__":
    main()
