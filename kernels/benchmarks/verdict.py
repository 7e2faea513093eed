"""One page of what gpu_suite.sh found: python kernels/benchmarks/verdict.py OUT_FOLDER

Reads what the suite has written there (parts.csv, environment.txt, check.txt, operators.csv, models-*.csv; what is
missing is named as such) and writes verdict.md. Prints it, too.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path


def read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def parts(folder: Path) -> Iterator[str]:
    yield "| part | result | seconds | limit |"
    yield "|---|---|---|---|"
    for row in read(folder / "parts.csv"):
        yield f"| {row['part']} | {row['result']} | {row['seconds']} | {row['limit']} |"


def self_check(folder: Path) -> Iterator[str]:
    """The last line of the check, and every line that is not right."""
    path = folder / "check.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    yield f"Self-check: {lines[-1] if lines else 'not done'}"
    yield from (f"* {line}" for line in lines[:-1] if not line.endswith(" right"))


def operators(folder: Path) -> Iterator[str]:
    """Per operator, pass and way, over its sizes: speed over the slowest way, share of the copy bandwidth, and where
    the host takes longer than the GPU."""
    rows = read(folder / "operators.csv")
    if not rows:
        yield "Operators: not timed"
        return
    yield f"Operators, {rows[0]['dtype']}: ranges over {len({row['size'] for row in rows})} sizes"
    yield ""
    yield "| operator | pass | way | times the slowest | share of copy | host sets the pace |"
    yield "|---|---|---|---|---|---|"
    for operator, label, impl in dict.fromkeys((row["operator"], row["pass"], row["impl"]) for row in rows):
        mine = [row for row in rows if (row["operator"], row["pass"], row["impl"]) == (operator, label, impl)]
        speed = span([float(row["speedup"]) for row in mine], "{:.1f}")
        share = span([float(row["copy_share"]) for row in mine], "{:.0%}") + (
            "*" if any(r["note"] for r in mine) else ""
        )
        paced = sum(float(row["host_ms"] or 0) > float(row["median_ms"]) for row in mine)
        yield f"| {operator} | {label} | {impl} | {speed} | {share} | {paced} of {len(mine)} |"
    if any(row["note"] for row in rows):
        yield ""
        yield "\\* above 100 %: part of the bytes stays in a cache, so this is no measure of memory"


def span(values: list[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}..{high}"


def models(folder: Path) -> Iterator[str]:
    """Speed of every model as a ratio to the last one of the same table, pass and layout."""
    for how in ("eager", "compiled"):
        rows = read(folder / f"models-{how}.csv")
        if not rows:
            yield f"Models, {how}: not timed"
            continue
        last = rows[-1]["model"]
        speeds = {(row["model"], row["pass"], row["layout"]): float(row["images_per_second"]) for row in rows}
        yield f"Models, {how}, batch {rows[0]['batch']}, {rows[0]['dtype']}: images/s as a ratio to {last}"
        for (model, label, layout), speed in speeds.items():
            base = speeds.get((last, label, layout))
            if model != last and base is not None:
                yield f"* {model}, {label}, {layout}: {speed / base:.2f}"


def page(folder: Path) -> str:
    environment = folder / "environment.txt"
    known = environment.read_text().splitlines() if environment.is_file() else ["environment: not written"]
    sections = [["# Verdict of the GPU suite"], [f"* {line}" for line in known if line]]
    sections += [list(section(folder)) for section in (parts, self_check, operators, models)]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def main(argv: list[str]) -> None:
    folder = Path(argv[0])
    text = page(folder)
    (folder / "verdict.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
