"""Parameters and multiply-accumulates (MACs, the "FLOPs" of the papers) of models, beside the published numbers.

python analyze/flops.py [--models NAME ...] [--size H [W]] [--csv flops.csv]
"""

import argparse
import csv
import sys
from pathlib import Path

import timm

from ssm_models.model_card import ModelCard, model_card, registered_models

LEGEND = """\
GMACs: 1e9 multiply-accumulates for one image, by the conventions of the papers' counter (fvcore).
hardware-aware, recurrence: everything, with scans counted as a prefix scan or as the plain recurrence.
official: what the family's own counter gives; published: the number its authors give, at 224x224. They may differ by up
to 3e-5, for that counter rounds some products to four digits."""


def count(names: list[str], size: list[int] | None) -> list[ModelCard]:
    """The cards, at (H, W) or H = W, or each model's own size. Raises ValueError with the offending name or size."""
    if size is not None and len(size) > 2:
        raise ValueError(f"--size {' '.join(map(str, size))} is not H or H W")
    unknown = [name for name in names if name not in registered_models()]
    if unknown:
        raise ValueError(f"--models {' '.join(unknown)}: not among {', '.join(registered_models())}")
    cards = []
    for name in names:
        height, width = timm.get_pretrained_cfg(name).input_size[1:] if size is None else (size[0], size[-1])
        try:
            cards.append(model_card(name, (3, height, width)))
        except (ValueError, RuntimeError) as error:  # the latter: PyTorch's, of a map smaller than a convolution
            raise ValueError(f"{name} on {height}x{width} pixels: {error}") from error
    return cards


def table(cards: list[ModelCard]) -> str:
    """One line per model, in aligned columns."""
    columns = ("model", "size", "parameters", "GMACs: hardware-aware", "recurrence", "official", "published")
    rows = [columns, *(_row(card) for card in cards)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    aligned = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(
        "  ".join([name.ljust(widths[0]), *cells[1:]]) for (name, *_), cells in zip(rows, aligned, strict=True)
    )


def _row(card: ModelCard) -> tuple[str, ...]:
    macs = (card.macs, card.macs_recurrence, card.macs_official, card.macs_published)
    size = "x".join(map(str, card.input_size[1:]))
    return card.name, size, f"{card.parameters:,}", *("-" if n is None else f"{n / 1e9:.6f}" for n in macs)


def write_csv(cards: list[ModelCard], path: Path) -> None:
    """Exact numbers; an empty cell where nothing is published."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        macs = ("macs", "macs_recurrence", "macs_official", "macs_published")
        writer.writerow(["model", "height", "width", "parameters", *macs])
        for card in cards:
            writer.writerow(
                [card.name, *card.input_size[1:], card.parameters, *(getattr(card, column) for column in macs)]
            )


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="analyze/flops.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", metavar="NAME", help="registered names (all)")
    parser.add_argument("--size", type=int, nargs="+", metavar="H [W]", help="of the images (each model's own)")
    parser.add_argument("--csv", type=Path, help="also write the exact numbers to this file")
    args = parser.parse_args(argv)
    try:
        cards = count(args.models or registered_models(), args.size)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(cards), LEGEND, sep="\n\n")
    if args.csv:
        write_csv(cards, args.csv)
        print(f"\n{args.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
