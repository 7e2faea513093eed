"""Throughput of whole models: python kernels/benchmarks/models.py --device cuda --dtype bfloat16 --out models.csv

All models are timed on synthetic images (see timing.py), and the table shows the median of the images per second with
the slowest and fastest run. "inference" is the forward pass in eval mode; "training" is forward, cross-entropy and
backward in train mode (no stochastic depth), that is the gradients only: no optimizer, no data. bfloat16 means
autocast, the weights stay float32. Peak memory (CUDA) is that of one step: the model's weights, its gradients and its
activations.

--linear times one image at S x S and at 4S x 4S pixels instead; a cost of 16 is linear in the number of pixels. Beside
the csv comes its picture.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from output import panels, write_csv, write_picture
from timing import measure
from torch import nn

import ssm_models  # noqa: F401  registers its models in timm

COLUMNS = (
    "model",
    "pass",
    "size",
    "batch",
    "dtype",
    "layout",
    "compiled",
    "images_per_second",
    "slowest",
    "fastest",
    "median_ms",
    "peak_mb",
)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", default=["vmamba_tiny_s1l8", "swin_tiny_patch4_window7_224"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--channels-last", action="store_true", help="also with weights and images in channels_last")
    parser.add_argument("--linear", action="store_true", help="the cost of one image of 4 S x 4 S pixels over S x S")
    parser.add_argument("--repeats", type=int, default=10, help="turns on the CPU")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def create(name: str, size: int, device: torch.device) -> nn.Module:
    """A model from the registry, for images of `size`, without stochastic depth."""
    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise SystemExit(f"error: --models {name} is not in timm's registry, nor in that of ssm_models")
    fixed = {"img_size": size} if config.fixed_input_size and size != config.input_size[-1] else {}
    return timm.create_model(name, drop_path_rate=0.0, **fixed).to(device)


def infer(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> None:
    with torch.inference_mode(), torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        model(images)


def train(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> None:
    model.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        logits = model(images)
    targets = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    F.cross_entropy(logits.float(), targets).backward()


PASSES = {"inference": infer, "training": train}


def peak_mb(model: nn.Module, run, device: torch.device) -> float | str:
    """MB of one warm step, without what other models hold; empty on the CPU, where nobody counts."""
    if device.type != "cuda":
        return ""
    run()
    model.zero_grad(set_to_none=True)
    own = sum(t.numel() * t.element_size() for t in itertools.chain(model.parameters(), model.buffers()))
    others = torch.cuda.memory_allocated(device) - own
    torch.cuda.reset_peak_memory_stats(device)
    run()
    model.zero_grad(set_to_none=True)
    return (torch.cuda.max_memory_allocated(device) - others) / 1e6


def measure_models(
    models: dict[tuple[str, str, int], nn.Module], args: argparse.Namespace, passes: tuple[str, ...], batch: int
) -> list[dict]:
    """Rows of all `models`, by (name, layout, size), in all `passes`."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    rows = []
    for label in passes:
        runs, peaks = {}, {}
        for key, model in models.items():
            model.train(label == "training")
            images = torch.randn(batch, 3, key[2], key[2], device=device).to(memory_format=LAYOUTS[key[1]])
            called = torch.compile(model) if args.compile else model
            runs[key] = functools.partial(PASSES[label], called, images, dtype)
            peaks[key] = peak_mb(model, runs[key], device)
        for (name, layout, size), t in measure(runs, args.repeats, device).items():
            speed = (batch / t.median, batch / t.slowest, batch / t.fastest, 1e3 * t.median)
            values = (name, label, size, batch, args.dtype, layout, args.compile, *speed, peaks[name, layout, size])
            rows.append(dict(zip(COLUMNS, values, strict=True)))
            print(
                f"{name:30} {label:10} {size:4} px  batch {batch:<4} {args.dtype} {layout:13} "
                f"{'compiled' if args.compile else 'eager':8} {batch / t.median:9.1f} images/s "
                f"({batch / t.slowest:.1f}..{batch / t.fastest:.1f})"
                + (f"  {rows[-1]['peak_mb']:.0f} MB" if device.type == "cuda" else ""),
                flush=True,
            )
        write_csv(rows, COLUMNS, args.out)  # what is there stays, should the run be cut short
        draw(rows, args.out)
    return rows


def draw(rows: list[dict], out: Path) -> None:
    """A panel per pass: images per second, slowest and fastest run as error bars."""
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    figure, found = panels(len(passes), (9, 0.6 * len(rows) + 1.5 * len(passes)))
    for axes, label in zip(found, passes, strict=True):
        mine = [row for row in rows if row["pass"] == label]
        names = [f"{row['model']}\n{row['layout']}, {row['size']} px" for row in mine]
        median = [row["images_per_second"] for row in mine]
        low = [row["images_per_second"] - row["slowest"] for row in mine]
        high = [row["fastest"] - row["images_per_second"] for row in mine]
        axes.barh(names, median, xerr=(low, high), capsize=3)
        how = "compiled" if mine[0]["compiled"] else "eager"
        axes.set(title=f"{label}, batch {mine[0]['batch']}, {mine[0]['dtype']}, {how}", xlabel="images/s")
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    write_picture(figure, out)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.device(args.device)
    torch.manual_seed(0)
    layouts = tuple(LAYOUTS) if args.channels_last else ("nchw",)
    sizes = (args.size, 4 * args.size) if args.linear else (args.size,)
    models = {}
    for name, size in itertools.product(args.models, sizes):
        model = create(name, size, device)
        for layout in layouts:
            models[name, layout, size] = copy.deepcopy(model).to(memory_format=LAYOUTS[layout])
    if args.linear:
        rows = measure_models(models, args, ("inference",), batch=1)
        milliseconds = {(row["model"], row["layout"], row["size"]): row["median_ms"] for row in rows}
        for name, layout in itertools.product(args.models, layouts):
            cost = milliseconds[name, layout, sizes[1]] / milliseconds[name, layout, sizes[0]]
            print(f"{name:30} {layout:13} {sizes[1]} px cost {cost:.1f} times {sizes[0]} px; 16 is linear in pixels")
    else:
        measure_models(models, args, tuple(PASSES), args.batch)
    print(f"wrote {args.out} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
