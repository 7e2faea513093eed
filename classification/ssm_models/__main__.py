"""`python -m ssm_models`: the zoo, with what is published for it; downloads weights and checks those that are here."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from importlib.resources import files
from typing import Any

from .unpickle import CheckpointError
from .weights import Entry, fetch, find
from .weights import table as table_of_weights
from .weights.download import cached, verify


def describe(entry: Entry) -> dict[str, Any]:
    path = cached(entry)
    values = {field.name: getattr(entry, field.name) for field in fields(entry)}
    return {**values, "cached": str(path) if path else None}


def zoo() -> list[dict[str, Any]]:
    """A row per registered model: parameters, multiply-accumulates at its own size as `model_card` counts them, and
    published weights."""
    costs = json.loads(files("ssm_models.weights").joinpath("zoo.json").read_text())
    return [
        {"model": name, **cost, "weights": [describe(entry) for entry in table_of_weights.of_model(name).values()]}
        for name, cost in costs.items()
    ]


def _brief(weights: dict[str, Any], model: str) -> str:
    tag, licence = weights["name"].removeprefix(f"{model}."), weights["licence"] or "no licence stated"
    return f"{tag} ({weights['metrics']['top1']}, {licence}{', cached' if weights['cached'] else ''})"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'model':32} {'parameters':>12} {'GMACs':>7}  weights (top-1, licence, here?)"]
    for row in rows:
        published = ", ".join(_brief(weights, row["model"]) for weights in row["weights"]) or "none"
        lines.append(f"{row['model']:32} {row['parameters']:12,} {row['macs'] / 1e9:7.2f}  {published}")
    dense = [entry for entry in table_of_weights.entries().values() if entry.task != "classification"]
    lines.append(f"\n{'detectors and segmentors':74} {'AP box/mask, mIoU/tta':>21}")
    for entry in dense:
        numbers = " / ".join(str(value) for value in entry.metrics.values())
        here = "  cached" if cached(entry) else ""
        lines.append(f"{entry.name:74} {numbers:>21}{here}")
    return "\n".join(lines)


def markdown() -> str:
    """The table of weights, as docs/weights.md has it."""
    lines = ["| name | published | set | file | licence |", "|---|---|---|---|---|"]
    for entry in table_of_weights.entries().values():
        numbers = ", ".join(f"{table_of_weights.METRICS[metric]} {value}" for metric, value in entry.metrics.items())
        file = f"[{entry.filename}]({entry.url})"
        lines.append(f"| `{entry.name}` | {numbers} | {entry.entry} | {file} | {entry.licence or 'none stated'} |")
    return "\n".join(lines)


def download(name: str) -> None:
    for entry in table_of_weights.entries().values() if name == "all" else [find(name)]:
        print(f"{entry.name}: {fetch(entry)}")


def verify_cache() -> None:
    """Raises CheckpointError for the first file that is not what was published."""
    here = [(entry, path) for entry in table_of_weights.entries().values() if (path := cached(entry))]
    for entry, path in here:
        verify(entry, path)
        print(
            f"{entry.name}: {path} {'has the published sha256' if entry.sha256 else 'is whole; no sha256 is published'}"
        )
    print(f"{len(here)} of {len(table_of_weights.entries())} files are here")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ssm_models", description=__doc__.partition(": ")[2])
    parser.add_argument("--download", metavar="NAME", help="weights to bring here: a name of the list, or all")
    parser.add_argument("--verify", action="store_true", help="read the files that are here, and compare their sha256")
    parser.add_argument("--json", action="store_true", help="the list as JSON, with addresses and checksums")
    parser.add_argument("--markdown", action="store_true", help="the table of weights for a document")
    args = parser.parse_args(argv)
    try:
        if args.download:
            download(args.download)
        if args.verify:
            verify_cache()
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not (args.download or args.verify):
        rows = zoo()
        if args.markdown:
            print(markdown())
        elif args.json:
            dense = [describe(entry) for entry in table_of_weights.entries().values() if entry.task != "classification"]
            print(json.dumps({"models": rows, "detectors_and_segmentors": dense}, indent=1))
        else:
            print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
