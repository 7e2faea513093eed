"""Times the operators: python kernels/benchmarks/run.py --device cpu --ops selective_scan ss2d_scan --out results.csv

First the numbers of every implementation are compared with the first one's; one that differs is not timed but reported.
Then all ways to compute a case take turns, forward and forward + backward, and the table shows medians with the fastest
and slowest run, the bytes that must move, and their rate as a share of the copy bandwidth measured here. Beside the csv
comes a PNG of the curves.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import time
from pathlib import Path

import torch
from cases import STAGES, Case, cross_case, selective_scan_case, ss2d_scan_case

from ssm_ops._library import OPERATORS, available

OPS = ("selective_scan", "ss2d_scan", "cross_scan", "cross_merge")
COLUMNS = (
    "operator",
    "size",
    "dtype",
    "impl",
    "pass",
    "median_ms",
    "min_ms",
    "max_ms",
    "bytes",
    "copy_share",
    "speedup",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--state", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--loop", action="store_true", help="also the token-by-token loop (selective_scan; slow)")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def cases(args, device, dtype):
    """Every case of the command line, made one after the other."""
    for op, batch, (dim, side) in itertools.product(args.ops, args.batch, STAGES):
        impls = available(OPERATORS[op], args.device, dtype)
        if op in ("cross_scan", "cross_merge"):
            yield cross_case(op, batch, dim, side, device, dtype, impls)
            continue
        make = {"selective_scan": selective_scan_case, "ss2d_scan": ss2d_scan_case}[op]
        for n_state, half in itertools.product(args.state, (1, 2)):
            yield make(batch, dim // half, side, n_state, device, dtype, impls)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gate(case: Case) -> dict[str, float]:
    """Relative rms difference of every way to the first one, over output and gradients."""
    results = {}
    for name, run in case.run.items():
        out = run(*case.inputs)
        torch.manual_seed(0)
        dout = torch.randn(out.shape, device=out.device).to(out.dtype)  # not randn_like, which follows the strides
        results[name] = (out, *torch.autograd.grad(out, case.inputs, dout))
    first = next(iter(results.values()))
    return {
        name: max(
            ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
            for a, b in zip(r, first, strict=True)
        )
        for name, r in results.items()
    }


def time_case(case: Case, names: list[str], repeats: int, device: torch.device) -> dict[str, tuple[list, list]]:
    """Seconds of (forward, forward + backward) of every way, measured in turns."""
    taken = {name: ([], []) for name in names}
    for turn in range(repeats + 1):
        for name in names:
            with torch.no_grad():
                synchronize(device)
                start = time.perf_counter()
                out = case.run[name](*case.inputs)
                synchronize(device)
                forward = time.perf_counter() - start
            dout = torch.ones_like(out)
            start = time.perf_counter()
            torch.autograd.grad(case.run[name](*case.inputs), case.inputs, dout)
            synchronize(device)
            if turn > 0:  # the first turn warms up
                taken[name][0].append(forward)
                taken[name][1].append(time.perf_counter() - start)
    return taken


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second (read + written) of a large copy: the best of ten."""
    x = torch.empty(2**28 if device.type == "cuda" else 2**26, device=device)
    y, best = torch.empty_like(x), float("inf")
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        y.copy_(x)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * x.numel() * x.element_size() / best


def rows_of(case: Case, args, device, dtype, bandwidth: float) -> list[dict]:
    if not args.loop:
        case.run.pop("loop", None)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    differences = gate(case)
    wrong = {name: error for name, error in differences.items() if not error < tolerance}
    for name, error in wrong.items():
        print(f"WRONG {case.operator} {case.size} {name}: relative difference {error:.1e}, not timed")
    names = [name for name in case.run if name not in wrong]
    rows = []
    taken = time_case(case, names, args.repeats, device)
    for index, (label, moved) in enumerate(
        (("forward", case.bytes_forward), ("forward+backward", case.bytes_forward + case.bytes_backward))
    ):
        slowest = max(statistics.median(t[index]) for t in taken.values())
        for name, t in taken.items():
            seconds = statistics.median(t[index])
            values = (case.operator, case.size, args.dtype, name, label, 1e3 * seconds, 1e3 * min(t[index]))
            values += (1e3 * max(t[index]), moved, moved / seconds / bandwidth, slowest / seconds)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
            print(
                f"{case.operator:15} {case.size:28} {label:17} {name:12} {1e3 * seconds:9.3f} ms "
                f"({1e3 * min(t[index]):.3f}..{1e3 * max(t[index]):.3f})  {moved / seconds / bandwidth:5.1%} of copy  "
                f"x{slowest / seconds:.1f}",
                flush=True,
            )
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """One panel per operator and pass: milliseconds over the sizes, a line per way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = sorted({(r["operator"], r["pass"]) for r in rows})
    figure, axes = plt.subplots(len(panels), 1, figsize=(12, 4 * len(panels)), squeeze=False)
    for axis, (operator, label) in zip(axes[:, 0], panels, strict=True):
        mine = [r for r in rows if (r["operator"], r["pass"]) == (operator, label)]
        for impl in dict.fromkeys(r["impl"] for r in mine):
            points = [r for r in mine if r["impl"] == impl]
            axis.plot([r["size"] for r in points], [r["median_ms"] for r in points], "o-", label=impl)
        axis.set(title=f"{operator}, {label}", ylabel="ms", yscale="log")
        axis.tick_params(axis="x", rotation=60, labelsize=7)
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    args = parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, copy bandwidth {bandwidth / 1e9:.1f} GB/s")
    rows = []
    for case in cases(args, device, dtype):
        rows += rows_of(case, args, device, dtype, bandwidth)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, args.out.with_suffix(".png"))
    print(f"wrote {args.out} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
