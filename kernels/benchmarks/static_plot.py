"""Draws the table of static.py."""

from __future__ import annotations

from pathlib import Path

from output import legend_beside, panels, write_picture
from sass import CLASSES


def draw(rows: list[dict], table: Path) -> None:
    """A panel for each GPU's times of the scans, forward and backward, one for other kernels, one for instructions."""
    timed = [r for r in rows if r.get("gpu")]
    gpus = list(dict.fromkeys(r["gpu"] for r in timed))
    directions = {"forward": ("fwd", "forward"), "backward": ("bwd", "backward")}
    scans = [r for r in timed if r["operator"] == "selective_scan"]
    others = [r for r in timed if r["operator"] != "selective_scan"]
    kinds = [(gpu, d) for gpu in gpus for d in directions if scans] + [(gpu, None) for gpu in gpus if others]
    figure, axes = panels(len(kinds) + bool(scans), (16, 4.5 * (len(kinds) + bool(scans))))
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
    write_picture(figure, table)


def _times(axis, rows: list[dict]) -> None:
    for name in dict.fromkeys(r["implementation"] for r in rows):
        mine = [r for r in rows if r["implementation"] == name]
        axis.plot([r["size"] for r in mine], [float(r["predicted_us"]) for r in mine], "o", label=name)
        if name == "cuda":
            memory = [float(r["predicted_memory_us"]) for r in mine]
            axis.plot([r["size"] for r in mine], memory, "k_", label="the bytes of\ncuda alone")
    axis.set(ylabel="predicted microseconds", yscale="log")
    sizes = list(dict.fromkeys(r["size"] for r in rows))
    axis.set_xticks(range(len(sizes)), [_in_lines(size) for size in sizes], fontsize=9)
    axis.grid(True, which="both", alpha=0.3)
    legend_beside(axis)


def _bounds(axis, rows: list[dict]) -> None:
    """Of every kernel's first size."""
    first = list({r["kernel"]: r for r in reversed(rows)}.values())[::-1]
    for i, bound in enumerate(("issue", "pipeline", "memory")):
        at = [n + 0.27 * (i - 1) for n in range(len(first))]
        axis.bar(at, [float(r[f"predicted_{bound}_us"]) for r in first], 0.25, label=bound)
    names = [r["kernel"].removesuffix("_kernel") for r in first]
    axis.set_xticks(range(len(first)), names, rotation=20, rotation_mode="anchor", ha="right", fontsize=9)
    axis.set(ylabel="predicted microseconds", yscale="log")
    axis.grid(True, axis="y", alpha=0.3)
    legend_beside(axis)


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
        axis.barh(range(len(first)), parts, 0.7, left=floor, label=label)
        floor = [a + b for a, b in zip(floor, parts, strict=True)]
    labels = [f"{r['implementation']} {r['kernel'].removesuffix('_kernel')}, {r['size']}" for r in first]
    axis.set_yticks(range(len(first)), labels, fontsize=8)
    axis.set_xlabel("instructions")
    axis.invert_yaxis()
    axis.grid(True, axis="x", alpha=0.3)
    legend_beside(axis)


def _in_lines(size: str) -> str:
    """VMamba-T B128 D384 L3136 N1 G4, of which two sizes stand on a line."""
    name, *sizes = size.split()
    return "\n".join([name, *(" ".join(sizes[i : i + 2]) for i in range(0, len(sizes), 2))])
