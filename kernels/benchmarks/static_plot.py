"""Draws the table of static.py."""

from __future__ import annotations

from pathlib import Path

from output import panels, write_png
from sass import CLASSES


def draw(rows: list[dict], table: Path) -> None:
    """A panel for each GPU's times of the scans, forward and backward, one for other kernels, one for instructions."""
    timed = [r for r in rows if r.get("gpu")]
    gpus = list(dict.fromkeys(r["gpu"] for r in timed))
    directions = {"forward": ("fwd", "forward"), "backward": ("bwd", "backward")}
    scans = [r for r in timed if r["operator"] == "selective_scan"]
    others = [r for r in timed if r["operator"] != "selective_scan"]
    kinds = [(gpu, d) for gpu in gpus for d in directions if scans] + [(gpu, None) for gpu in gpus if others]
    figure, axes = panels(len(kinds) + bool(scans), (13, 4.5 * (len(kinds) + bool(scans))))
    for axis, (gpu, direction) in zip(axes, kinds, strict=False):
        if direction is None:
            _bounds(axis, [r for r in others if r["gpu"] == gpu])
            axis.set_title(f"predicted, {gpu}: the other Triton kernels at their largest map, which bound is how long")
        else:
            mine = [r for r in scans if r["gpu"] == gpu and any(part in r["kernel"] for part in directions[direction])]
            _times(axis, mine)
            axis.set_title(f"predicted, {gpu}: selective_scan {direction}, {mine[0]['dtype']}, longest of all bounds")
    if scans:
        last = gpus[-1]
        _instructions(axes[-1], [r for r in scans if r["gpu"] == last])
        axes[-1].set_title(
            f"predicted, {last}: instructions of selective_scan per token, channel and state, first size"
        )
    figure.suptitle("Predicted from machine code and data sheets, not measured")
    write_png(figure, table)


def _times(axis, rows: list[dict]) -> None:
    for name in dict.fromkeys(r["implementation"] for r in rows):
        mine = [r for r in rows if r["implementation"] == name]
        axis.plot([r["size"] for r in mine], [float(r["predicted_us"]) for r in mine], "o", label=name)
        if name == "cuda":
            memory = [float(r["predicted_memory_us"]) for r in mine]
            axis.plot([r["size"] for r in mine], memory, "k_", label="bytes of cuda alone")
    axis.set(ylabel="predicted microseconds", yscale="log")
    axis.tick_params(axis="x", rotation=20, labelsize=7)
    axis.grid(True, which="both", alpha=0.3)
    axis.legend()


def _bounds(axis, rows: list[dict]) -> None:
    """Of every kernel's first size."""
    first = list({r["kernel"]: r for r in reversed(rows)}.values())[::-1]
    for i, bound in enumerate(("issue", "pipeline", "memory")):
        at = [n + 0.27 * (i - 1) for n in range(len(first))]
        axis.bar(at, [float(r[f"predicted_{bound}_us"]) for r in first], 0.25, label=bound)
    axis.set_xticks(range(len(first)), [r["kernel"].removesuffix("_kernel") for r in first], rotation=20, fontsize=7)
    axis.set(ylabel="predicted microseconds", yscale="log")
    axis.grid(True, axis="y", alpha=0.3)
    axis.legend()


def _instructions(axis, rows: list[dict]) -> None:
    """Of the hot loop by class, and what is around it, at the first size of every number of states and groups."""
    of_kind = {(r["implementation"], r["kernel"], r["size"].split(" N")[1]): r for r in reversed(rows)}
    first = list(of_kind.values())[::-1]
    floor = [0.0] * len(first)
    for name in (*CLASSES, "around"):
        if name == "around":
            parts = [float(r["predicted_instructions"]) - float(r["predicted_hot_instructions"]) for r in first]
        else:
            parts = [float(r[f"predicted_hot_{name}"]) for r in first]
        label = "around the hot loop" if name == "around" else name
        axis.bar(range(len(first)), parts, 0.6, bottom=floor, label=label)
        floor = [a + b for a, b in zip(floor, parts, strict=True)]
    labels = [f"{r['implementation']}\n{r['kernel']}\n{r['size'].split(' ', 1)[1]}" for r in first]
    axis.set_xticks(range(len(first)), labels, rotation=60, fontsize=6)
    axis.grid(True, axis="y", alpha=0.3)
    axis.legend(ncols=2)
