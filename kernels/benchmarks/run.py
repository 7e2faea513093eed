"""Times the operators: python kernels/benchmarks/run.py --device cpu --ops selective_scan ss2d_scan --out results.csv

First the numbers of every implementation are compared with the first one's; one that differs is not timed but reported,
and the exit status is 1.
Then all ways to compute a case are timed, forward and forward + backward (see timing.py), and the table shows medians
with the fastest and slowest run, the bytes that must move, and their rate as a share of the copy bandwidth measured
here; a share above 1 has a note. On a GPU the time that a call takes of the host stands apart (host_ms). Beside the csv
comes its picture.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from pathlib import Path

import torch
from cases import MAKERS, Case, cases
from output import write_csv, write_picture
from timing import Times, host_seconds, measure

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
    "host_ms",
    "note",
)
IN_CACHE = "no measure of memory: part of the bytes stays in a cache"
"""Where more bytes a second would have to move than a large copy moves."""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ops", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--sizes", nargs="+", type=int, choices=range(1, 5), default=[1, 2, 3, 4], help="of each four")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--state", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=7, help="turns on the CPU")
    parser.add_argument("--loop", action="store_true", help="also the token-by-token loop (selective_scan; slow)")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


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


def time_case(
    case: Case, names: list[str], repeats: int, device: torch.device
) -> dict[tuple[str, str], tuple[Times, float | None]]:
    """Of every pass and way, with the seconds of the host."""
    dout = torch.ones_like(case.run[names[0]](*case.inputs))

    def forward(run):
        with torch.no_grad():
            run(*case.inputs)

    def both(run):
        torch.autograd.grad(run(*case.inputs), case.inputs, dout)

    runs = {}
    for name in names:
        runs["forward", name] = functools.partial(forward, case.run[name])
        runs["forward+backward", name] = functools.partial(both, case.run[name])
    times = measure(runs, repeats, device)
    return {key: (times[key], host_seconds(run, device)) for key, run in runs.items()}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second (read + written) of a large copy at its best."""
    x = torch.empty(2**28 if device.type == "cuda" else 2**26, device=device)
    y = torch.empty_like(x)
    times = measure({"copy": lambda: y.copy_(x)}, 10, device)
    return 2 * x.numel() * x.element_size() / times["copy"].fastest


def rows_of(case: Case, args, device, dtype, bandwidth: float) -> tuple[list[dict], int]:
    """Of the ways whose numbers are right, and how many are not."""
    if not args.loop:
        case.run.pop("loop", None)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    differences = gate(case)
    wrong = {name: error for name, error in differences.items() if not error < tolerance}
    for name, error in wrong.items():
        print(f"WRONG {case.operator} {case.size} {name}: relative difference {error:.1e}, not timed")
    names = [name for name in case.run if name not in wrong]
    taken = time_case(case, names, args.repeats, device)
    moved = {"forward": case.bytes_forward, "forward+backward": case.bytes_forward + case.bytes_backward}
    rows = []
    for (label, name), (t, host) in taken.items():
        share = moved[label] / t.median / bandwidth
        speedup = max(taken[label, other][0].median for other in names) / t.median
        values = (case.operator, case.size, args.dtype, name, label, 1e3 * t.median, 1e3 * t.fastest, 1e3 * t.slowest)
        notes = ("" if host is None else 1e3 * host, IN_CACHE if share > 1 else "")
        rows.append(dict(zip(COLUMNS, (*values, moved[label], share, speedup, *notes), strict=True)))
        print(
            f"{case.operator:15} {case.size:28} {label:17} {name:12} {1e3 * t.median:9.3f} ms "
            f"({1e3 * t.fastest:.3f}..{1e3 * t.slowest:.3f})  {share:6.1%} of copy{'*' * (share > 1)}  x{speedup:.1f}"
            + ("" if host is None else f"  host {1e3 * host:.3f} ms"),
            flush=True,
        )
    return sorted(rows, key=lambda row: row["pass"]), len(wrong)


def draw(rows: list[dict], out: Path) -> None:
    """Left forward, right forward + backward; per operator a line for every size, and on it the milliseconds of every
    way: a dot at the median, a bar from the fastest run to the slowest."""
    from matplotlib.figure import Figure  # takes a second, and only pictures need it

    operators = list(dict.fromkeys(row["operator"] for row in rows))
    sizes = {name: list(dict.fromkeys(r["size"] for r in rows if r["operator"] == name)) for name in operators}
    heights = [0.19 * len(sizes[name]) + 1.2 for name in operators]
    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(row["impl"] for row in rows))}
    parts = figure.subfigures(len(operators), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, operator in zip(parts, operators, strict=True):
        mine = [row for row in rows if row["operator"] == operator]
        for axes, kind in zip(part.subplots(1, 2, sharey=True), ("forward", "forward+backward"), strict=True):
            _times(axes, [row for row in mine if row["pass"] == kind], sizes[operator], colours)
            axes.set_title(kind, fontsize=10)
        part.suptitle(f"{operator}, {mine[0]['dtype']}", fontweight="bold", fontsize=11)
        part.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    write_picture(figure, out)


def _times(axes, rows: list[dict], sizes: list[str], colours: dict[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for impl in dict.fromkeys(row["impl"] for row in rows):
        mine = [row for row in rows if row["impl"] == impl]
        median, low, high = ([float(row[f"{name}_ms"]) for row in mine] for name in ("median", "min", "max"))
        spread = ([m - a for m, a in zip(median, low, strict=True)], [b - m for m, b in zip(median, high, strict=True)])
        places = [sizes.index(row["size"]) for row in mine]
        axes.errorbar(
            median, places, xerr=spread, fmt="o", markersize=4, elinewidth=1.5, color=colours[impl], label=impl
        )
    axes.set_xscale("log")
    decades = math.log10(axes.get_xlim()[1] / axes.get_xlim()[0])
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2.5 else (1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("ms")
    axes.set_yticks(range(len(sizes)), sizes, fontsize=8, family="monospace")
    axes.set_ylim(len(sizes) - 0.5, -0.5)  # the first on top
    axes.grid(alpha=0.4)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, copy bandwidth {bandwidth / 1e9:.1f} GB/s")
    rows, n_wrong = [], 0
    for op in args.ops:
        for case in cases(op, args.sizes, args.batch, args.state, device, dtype):
            of_case, wrong = rows_of(case, args, device, dtype, bandwidth)
            rows, n_wrong = rows + of_case, n_wrong + wrong
            write_csv(rows, COLUMNS, args.out)  # what is there stays, should the run be cut short
        draw(rows, args.out)
    print(f"wrote {args.out} and {args.out.with_suffix('.png')}")
    if n_wrong:
        sys.exit(f"{n_wrong} results were wrong, see WRONG above")


if __name__ == "__main__":
    main()
