"""What a model could reach on this CPU at best: python kernels/benchmarks/roofline.py --out roofline.csv

A prepared model (`ssm_models.for_inference`) takes at least the time of its products, and at least the time to bring
its weights and the inputs and results of its products through the memory. Both floors are measured, in turns with the
model itself: each linear map and convolution alone, by the same packed kernel and on inputs of the same shape, which
then lie in the cache as well as they ever can; and a large copy, for the bandwidth. What is left between the larger
floor and the model are its scans, norms, activations and additions, and the calls themselves. Images of 224 x 224,
float32 or bfloat16 products. Models of timm run eager, with their own layers alone.
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from cpu_models import DTYPES, GROUPS, cpu_name
from models import create, infer
from output import legend_beside, panels, write_csv, write_picture
from timing import measure
from torch import nn

from ssm_models import for_inference

COLUMNS = (
    *("cpu", "threads", "torch", "dtype", "batch", "model", "model_ms", "linear_ms", "convolution_ms", "bytes_ms"),
    "share_of_products",
)
COPIED = 256 << 20
"""Bytes of the copy: more than any cache."""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[name for group in GROUPS.values() for name in group])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=[str(d).removeprefix("torch.") for d in DTYPES], default="float32")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def products_of(model: nn.Module, images: torch.Tensor) -> tuple[Counter, int]:
    """How often each layer that is a product is called with what: (its name, shape of the input, its strides). And the
    numbers in all inputs and results."""
    calls, moved = Counter(), 0

    def note(name: str, given: torch.Tensor, result: torch.Tensor) -> None:
        nonlocal moved
        calls[name, given.shape, given.stride()] += 1
        moved += given.numel() + result.numel()

    hooks = [
        module.register_forward_hook(lambda _, given, result, name=name: note(name, given[0], result))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    return calls, moved


def call_alone(layer: nn.Module, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Callable[[], None]:
    packed = layer.for_inference(dtype) if hasattr(layer, "for_inference") else layer
    return functools.partial(infer, packed, torch.empty_strided(shape, strides).normal_(), dtype)


def floors(name: str, batch: int, dtype: torch.dtype, turns: int) -> dict:
    """A row of the table."""
    images = torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)
    model = create(name, 224, torch.device("cpu")).to(memory_format=torch.channels_last).eval()
    calls, moved = products_of(model, images)
    fast = for_inference(model, dtype) if type(model).__module__.startswith("ssm_models") else model
    convolutions = {key: isinstance(model.get_submodule(key[0]), nn.Conv2d) for key in calls}
    runs = {key: call_alone(model.get_submodule(key[0]), *key[1:], dtype) for key in calls}
    source, target = torch.zeros(COPIED, dtype=torch.uint8), torch.empty(COPIED, dtype=torch.uint8)
    runs["copy"] = functools.partial(target.copy_, source)
    runs["model"] = functools.partial(infer, fast, images, dtype)
    times = measure(runs, turns, torch.device("cpu"))

    parts = {
        kind: sum(times[key].median * count for key, count in calls.items() if convolutions[key] == kind)
        for kind in (True, False)
    }
    weights = sum(p.numel() for p in model.parameters())
    bandwidth = 2 * COPIED / times["copy"].fastest
    whole = times["model"].median
    values = (cpu_name(), torch.get_num_threads(), torch.__version__, str(dtype).removeprefix("torch."), batch, name)
    milliseconds = (whole, parts[False], parts[True], (weights + moved) * dtype.itemsize / bandwidth)
    rounded = (*(f"{1e3 * t:.2f}" for t in milliseconds), f"{sum(parts.values()) / whole:.3f}")
    return dict(zip(COLUMNS, (*values, *rounded), strict=True))


def draw(rows: list[dict], table: Path) -> None:
    """A panel per precision and batch: of every model's time the part of its products, and the rest."""
    cells = list(dict.fromkeys((row["dtype"], row["batch"]) for row in rows))
    figure, found = panels(len(cells), (12, 3 * len(cells)))
    for axes, (dtype, batch) in zip(found, cells, strict=True):
        mine = [row for row in rows if (row["dtype"], row["batch"]) == (dtype, batch)]
        names, left = [row["model"] for row in mine], [0.0] * len(mine)
        for label, column in (("linear maps", "linear_ms"), ("convolutions", "convolution_ms")):
            shares = [100 * float(row[column]) / float(row["model_ms"]) for row in mine]
            axes.barh(names, shares, left=left, label=label)
            left = [one + other for one, other in zip(left, shares, strict=True)]
        axes.barh(names, [max(100 - share, 0) for share in left], left=left, color="lightgrey", label="the rest")
        axes.set(title=f"{mine[0]['cpu']}, {dtype}, batch {batch}", xlabel="% of the time of the model", xlim=(0, 100))
        axes.invert_yaxis()
        legend_beside(axes)
    write_picture(figure, table)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(0)
    rows = []
    for name in args.models:
        row = floors(name, args.batch, getattr(torch, args.dtype), args.turns)
        rows.append(row)
        write_csv(rows, COLUMNS, args.out)
        print(
            f"{name:32} {row['model_ms']:>8} ms: linear maps {row['linear_ms']}, convolutions {row['convolution_ms']}, "
            f"bytes {row['bytes_ms']}; products are {100 * float(row['share_of_products']):.0f} %",
            flush=True,
        )
    draw(rows, args.out)
    print(f"wrote {args.out} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
