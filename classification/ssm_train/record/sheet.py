"""Sheets of pictures with captions."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure

from ssm_models.printable import printable

COLUMNS = 8


class Tile(NamedTuple):
    """A picture of a sheet."""

    image: torch.Tensor  # (3, H, W), or (1, H, W) in grey, from 0 to 1
    caption: str
    wrong: bool = False  # framed and written in red
    note: str = ""  # below the picture


def draw_sheet(tiles: list[Tile], title: str, columns: int = COLUMNS) -> Figure:
    """The pictures in rows of `columns`, captions above them."""
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    lines = max(tile.caption.count("\n") + 1 for tile in tiles)
    height = 1.35 + 0.13 * lines + (0.15 if any(tile.note for tile in tiles) else 0)
    figure = Figure(figsize=(1.35 * max(columns, 3), height * rows + 0.5), layout="constrained")
    for number, tile in enumerate(tiles):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.imshow(tile.image.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        # names of folders and files are shown as they are, not as formulas
        caption = "\n".join(map(printable, tile.caption.split("\n")))
        axes.set_title(caption, fontsize=8, color="red" if tile.wrong else "black", parse_math=False)
        axes.set_xlabel(printable(tile.note), fontsize=7, color="dimgray", labelpad=2, parse_math=False)
        for spine in axes.spines.values():
            spine.set(color="red" if tile.wrong else "silver", linewidth=3 if tile.wrong else 1)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def denormalise(image: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(C, H, W) as a model sees it -> from 0 to 1."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return image * std + mean
