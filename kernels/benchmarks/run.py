"""Times the operators: python kernels/benchmarks/run.py --device cpu --ops selective_scan ss2d_scan --out results.csv

First the numbers of every implementation are compared with the first one's; one that differs is not timed but reported,
and the exit status is 1.
Then all ways to compute a case are timed, forward and forward + backward (see timing.py), and the table shows medians
with the fastest and slowest run, the bytes that must move, and their rate as a share of the copy bandwidth measured
here; a share above 1 has a note. On a GPU the time that a call takes of the host stands apart (host_ms). Beside the csv
comes a PNG of the curves.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch
from cases import MAKERS, Case, cases
from output import panels, write_csv, write_png
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
    """One panel per operator and pass: milliseconds over the sizes, a line per way."""
    kinds = sorted({(r["operator"], r["pass"]) for r in rows})
    figure, axes = panels(len(kinds), (12, 4 * len(kinds)))
    for axis, (operator, label) in zip(axes, kinds, strict=True):
        mine = [r for r in rows if (r["operator"], r["pass"]) == (operator, label)]
        for impl in dict.fromkeys(r["impl"] for r in mine):
            points = [r for r in mine if r["impl"] == impl]
            axis.plot([r["size"] for r in points], [r["median_ms"] for r in points], "o-", label=impl)
        axis.set(title=f"{operator}, {label}", ylabel="ms", yscale="log")
        axis.tick_params(axis="x", rotation=60, labelsize=7)
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    write_png(figure, out)


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
