"""Predicts the cost of our GPU kernels without a GPU: python kernels/benchmarks/static.py --out static.csv

Every kernel is compiled for sm_80, sm_90 and sm_100 as its launch at the sizes of VMamba-T, VSSD-T and Vim-T would have
it, batch 128 (launches.py); the machine code tells what a thread executes (sass.py), and published numbers of the GPUs
how long that takes at least (gpus.py). Nothing is measured: all columns but the sizes are predictions. A kernel that
waits, for memory, a barrier or another warp, takes longer than predicted.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from binaries import Binary, compile_launch
from gpus import CAPABILITIES, GPUS, WARP, Gpu, issue_seconds, occupancy
from launches import OPERATORS, Launch, launches
from mamba_ssm_scan import compile_published, published
from output import write_csv
from sass import CLASSES, executed
from static_plot import draw

COLUMNS = (
    "operator",
    "size",
    "dtype",
    "implementation",
    "kernel",
    "capability",
    "predicted_registers",
    "predicted_stack_bytes",
    "predicted_shared_bytes",
    "predicted_occupancy",
    *(f"predicted_hot_{name}" for name in CLASSES),
    "predicted_hot_instructions",
    "predicted_instructions",
    "predicted_bytes",
    "gpu",
    "predicted_issue_us",
    "predicted_pipeline_us",
    "predicted_pipeline",
    "predicted_memory_us",
    "predicted_us",
    "predicted_bound",
)
"""Instructions (of threads) per token, channel and state; `hot`: of the innermost loop alone, by class. Bytes per token
and channel. The three times are those to issue all instructions, to run those of the fullest pipeline, and to move all
bytes; the fourth is the longest of them."""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--capability", nargs="+", type=int, choices=CAPABILITIES, default=list(CAPABILITIES))
    parser.add_argument("--mamba-ssm", type=Path, help="unpacked source of mamba_ssm, whose scan is predicted, too")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def row(launch: Launch, binary: Binary, capability: int, gpu: Gpu | None) -> dict:
    """One line of the table; `gpu` None where no GPU of the capability is in GPUS."""
    hot, total = executed(binary.code, launch.trips, launch.widest, launch.tile, launch.beside)
    threads, work = launch.warps * WARP, launch.channels * launch.states
    per_item = launch.grid * threads / work
    of_class = Counter({name: sum(n for (kind, _), n in hot.items() if kind == name) for name in CLASSES})
    shared = binary.shared + launch.shared
    values = {
        "operator": launch.operator,
        "size": launch.size,
        "dtype": str(launch.dtype).removeprefix("torch."),
        "implementation": launch.implementation,
        "kernel": launch.kernel,
        "capability": capability,
        "predicted_registers": binary.registers,
        "predicted_stack_bytes": binary.stack,
        "predicted_shared_bytes": shared,
        "predicted_occupancy": f"{occupancy(capability, binary.registers, threads, shared):.3f}",
        **{f"predicted_hot_{name}": f"{per_item * n:.3g}" for name, n in of_class.items()},
        "predicted_hot_instructions": f"{per_item * sum(hot.values()):.3g}",
        "predicted_instructions": f"{per_item * sum(total.values()):.3g}",
        "predicted_bytes": f"{launch.bytes / launch.channels:.3g}",
    }
    return values | ({} if gpu is None else times(launch, total, gpu))


def times(launch: Launch, total: Counter, gpu: Gpu) -> dict:
    """Bounds on the time of a launch whose threads execute `total`, in microseconds."""
    by_pipeline = issue_seconds(gpu, total, launch.warps, launch.grid)
    issue, memory = by_pipeline.pop("issue"), launch.bytes / gpu.bandwidth
    pipeline = max(by_pipeline, key=by_pipeline.get)
    bounds = {"issue": issue, pipeline: by_pipeline[pipeline], "memory": memory}
    bound = max(bounds, key=bounds.get)
    return {
        "gpu": gpu.name,
        "predicted_issue_us": f"{1e6 * issue:.4g}",
        "predicted_pipeline_us": f"{1e6 * by_pipeline[pipeline]:.4g}",
        "predicted_pipeline": pipeline,
        "predicted_memory_us": f"{1e6 * memory:.4g}",
        "predicted_us": f"{1e6 * bounds[bound]:.4g}",
        "predicted_bound": bound,
    }


def rows(args: argparse.Namespace) -> Iterator[dict]:
    dtype = getattr(torch, args.dtype)
    for capability in args.capability:
        gpu = next((g for g in GPUS if g.capability == capability), None)
        multiprocessors = gpu.multiprocessors if gpu else max(g.multiprocessors for g in GPUS)
        for launch in launches(multiprocessors, dtype):
            if launch.operator in args.ops:
                yield row(launch, compile_launch(launch, capability), capability, gpu)
                if args.mamba_ssm is not None and launch.implementation == "cuda":
                    theirs = published(launch)
                    binary = compile_published(theirs, args.mamba_ssm, capability)
                    yield row(theirs, binary, capability, gpu)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    table = []
    for line in rows(args):
        table.append(line)
        print(" ".join(str(line.get(name, "")) for name in COLUMNS[:6]), flush=True)
    write_csv(table, COLUMNS, args.out)
    if any(line.get("gpu") for line in table):  # times, of which there are none for a GPU that is not in GPUS
        draw(table, args.out)
    print(f"wrote {args.out}: predictions, not measurements")


if __name__ == "__main__":
    main()
