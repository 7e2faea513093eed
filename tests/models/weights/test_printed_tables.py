"""The accuracies that docs/models.md and the READMEs print are those of the table of weights, row by row."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ssm_models.weights import entries

ROOT = Path(__file__).parents[3]


def printed(readme: str) -> dict[str, list[str]]:
    """The cells behind the name of every row that begins with a name in backticks."""
    rows = re.findall(r"^\| `([\w-]+)` \| (.*) \|$", (ROOT / readme).read_text(), flags=re.MULTILINE)
    assert len(dict(rows)) == len(rows)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", cell)]


def accuracy(name: str, *metrics: str) -> list[float]:
    """The table's, in the order of `metrics`; nothing where nothing was published."""
    entry = entries().get(name)
    return [] if entry is None else [entry.metrics[metric] for metric in metrics]


def test_classification():
    """Plain training, and in brackets MESA's."""
    plain = {
        entry.model: entry.metrics["top1"] for name, entry in entries().items() if re.search(r"\.(ft_)?in1k$", name)
    }
    rows = {name: cells for name, cells in printed("docs/models.md").items() if len(cells) == 4}
    for name, (_, _, top1, _) in rows.items():
        expected = [plain[name]] if name in plain else []
        assert numbers(top1) == expected + accuracy(f"{name}.mesa_in1k", "top1"), name
    published = {entry.model for entry in entries().values() if entry.task == "classification" and entry.model}
    assert published <= set(rows)


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        (
            "detection",
            {
                "mask-rcnn_{}_fpn_1x_coco": (0, "box_ap", "mask_ap"),
                "mask-rcnn_{}_fpn_ms-crop-3x_coco": (1, "box_ap", "mask_ap"),
            },
        ),
        ("segmentation", {"upernet_{}_160k_ade20k-512x512": (slice(0, 2), "miou", "miou_tta")}),
    ],
)
def test_dense_tasks(task, columns):
    """Vim's rows have no published weights: those numbers are the paper's."""
    rows = {name: cells for name, cells in printed(f"configs/{task}/README.md").items() if not name.startswith("vim")}
    seen = set()
    for model, cells in rows.items():
        for pattern, (column, *metrics) in columns.items():
            name = pattern.format(model)
            shown = cells[column]
            assert numbers(" ".join(shown) if isinstance(shown, list) else shown) == accuracy(name, *metrics), name
            seen.add(name)
    usual = {
        name for name, entry in entries().items() if entry.task == task and "." not in name and "640x640" not in name
    }
    assert usual <= seen
