"""Pictures: no legend covers a curve, whole colours, and the same in three formats."""

import importlib
import itertools
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from PIL import Image

from analyze import figures, throughput_figure
from analyze.impl import erf, linear_probe, loss, scaleup
from analyze.logs import Log
from analyze.throughput import Result, Variant
from ssm_train.record import curves
from ssm_train.record.curves import Curves, Series
from ssm_train.step.evaluate import Accuracy

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "kernels" / "benchmarks"
TABLES = sorted((BENCHMARKS / "results").rglob("*.csv"))
OPERATORS = BENCHMARKS / "results" / "cpu-2-cores" / "operators.csv"
PICTURES = sorted([*(ROOT / "docs" / "gallery").rglob("*.png"), *(BENCHMARKS / "results").rglob("*.png")])


def throughput() -> Figure:
    """Curves that fill the panels, and one that failed."""
    variants = itertools.product(("vmamba_nano", "vim_nano", "a_model_with_a_very_long_name"), (32, 64), (False, True))
    results = [Result(Variant(name, size, 8, compiled=c), "ok", [9.0, size], 1.0 * size) for name, size, c in variants]
    results[0].status, results[0].samples = "out of memory", []
    return throughput_figure.draw(results, "CPU, 1 thread")


def resolutions() -> Figure:
    known = {"trained_size": 32, "device": "CPU, 1 thread", "batch": 8, "precision": "fp32"}
    known |= {"slowest": 1.0, "fastest": 99.0, "images_per_second": 50.0, "peak_mib": 9.0}
    models = itertools.product(("vmamba_nano", "vim_nano", "vssd_nano"), (16, 32))
    return scaleup.draw([scaleup._row(name, "runs/x", size) | known | {"top1": 3.0 * size} for name, size in models])


def training() -> dict[str, Series]:
    """Every curve that a run has."""
    keys = [f"{kind}/{key}" for kind, found in curves._DRAWN.items() for key in found]
    return dict.fromkeys([*keys, "epoch/train_loss"], Series([1.0, 2.0, 3.0], [3.0, 0.5, 3.0]))


def fields() -> Figure:
    names = ["vmamba_nano", "vim_nano", "resnet18"]
    values = np.random.default_rng(0).random((32, 32))
    return erf.draw([erf.Field(name, weights, values) for weights in (erf.RANDOM, "run") for name in names], names, 50)


def features() -> Figure:
    accuracy = Accuracy(top1=90.0, top5=100.0, loss=0.1, images=10)
    return linear_probe.draw("vmamba_nano", "lbfgs", accuracy, {1: accuracy, 100: accuracy}, 10)


def check_legends(figure: Figure, least: int = 1) -> None:
    """Every legend lies in the picture and outside of all panels, so over no curve of them."""
    FigureCanvasAgg(figure).draw()
    legends = figure.findobj(Legend)
    assert len(legends) >= least
    for legend in legends:
        box = legend.get_window_extent()
        for axes in figure.axes:
            panel = axes.get_window_extent()
            across = min(box.x1, panel.x1) - max(box.x0, panel.x0)
            down = min(box.y1, panel.y1) - max(box.y0, panel.y0)
            assert min(across, down) <= 1, (legend.get_texts(), axes.get_title())
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1


@pytest.mark.parametrize(
    "draw",
    [
        throughput,
        resolutions,
        fields,
        features,
        lambda: curves.draw(Curves("run", training())),
        lambda: loss.draw([Log(name, "epoch", training()) for name in ("one", "another", "a_third_of_a_long_name")]),
    ],
    ids=["tp", "scaleup", "erf", "linear_probe", "curves", "loss"],
)
def test_no_legend_covers_a_curve(draw):
    check_legends(draw())


def test_a_legend_over_a_curve_is_found():
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], label="a")
    axes.legend()
    with pytest.raises(AssertionError):
        check_legends(figure)


# ---- benchmarks ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def redraw():
    """kernels/benchmarks/redraw.py, which finds the scripts that lie beside it."""
    names = (
        "redraw",
        "run",
        "models",
        "cpu_models",
        "roofline",
        "runtimes",
        "static_plot",
        "cases",
        "output",
        "timing",
        "sass",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module("redraw")
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture
def drawn(redraw, monkeypatch):
    """Collects the figures that would be written."""
    found: list[Figure] = []
    for script in redraw.DRAWING.values():
        monkeypatch.setattr(script, "write_picture", lambda figure, _: found.append(figure))
    return found


@pytest.mark.parametrize(
    "table", [path for path in TABLES if path != OPERATORS], ids=lambda path: "/".join(path.parts[-2:])
)
def test_benchmarks_are_drawn_again_from_their_tables(table, redraw, drawn):
    """Every committed table; legends stand beside the panels, and where there is one colour there is none."""
    redraw.redraw(table)
    several = table.name == "static.csv" or table.parts[-2:] == ("cpu-2-cores", "cpu-models.csv")
    check_legends(*drawn, least=1 if several else 0)


def test_operators_have_a_legible_line_for_every_size(redraw, drawn):
    redraw.redraw(OPERATORS)
    rows, [figure] = redraw.read(OPERATORS), drawn
    check_legends(figure)
    operators = list(dict.fromkeys(row["operator"] for row in rows))
    assert len(figure.axes) == 2 * len(operators)
    for operator, axes in zip(operators, figure.axes[::2], strict=True):
        labels = axes.get_yticklabels()
        sizes = list(dict.fromkeys(row["size"] for row in rows if row["operator"] == operator))
        assert [label.get_text() for label in labels] == sizes and labels[0].get_fontsize() >= 8
        boxes = [label.get_window_extent() for label in labels]
        assert all(above.y0 >= below.y1 for above, below in itertools.pairwise(boxes))


def test_a_table_of_no_benchmark_is_named(redraw, tmp_path):
    table = tmp_path / "other.csv"
    table.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="other.csv has none of the columns impl, layout"):
        redraw.main([str(table)])


def test_benchmarks_write_three_formats(redraw, tmp_path):
    shutil.copy(BENCHMARKS / "results" / "cpu-2-cores" / "linear.csv", tmp_path)
    redraw.main([str(tmp_path / "linear.csv")])
    check_formats(tmp_path / "linear.png")


# ---- files -----------------------------------------------------------------------------------------------------------


def check_formats(png: Path) -> None:
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    for suffix, start in starts.items():
        assert png.with_suffix(suffix).read_bytes().startswith(start)


def test_pictures_are_written_in_three_formats_and_whole_colours(tmp_path):
    """A colour bar keeps all of its colours; the same picture gives the same bytes."""
    for folder in ("a", "b"):
        figure = Figure(figsize=(3, 4))
        figure.subplots().imshow(np.linspace(0, 1, 256)[:, None], aspect="auto")
        figures.save_figure(figure, tmp_path / folder / "map.png")
    check_formats(tmp_path / "a" / "map.png")
    for suffix in (".png", *figures.VECTOR):
        one, other = ((tmp_path / folder / f"map{suffix}").read_bytes() for folder in ("a", "b"))
        assert one == other
    with Image.open(tmp_path / "a" / "map.png") as image:
        middle = np.asarray(image.convert("RGB"))[:, image.width // 2]
    assert len(np.unique(middle, axis=0)) > 250


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: "/".join(path.parts[-2:]))
def test_committed_pictures_have_whole_colours(path):
    """A palette would leave 256 of them, too few for photographs and colour bars."""
    with Image.open(path) as image:
        assert image.mode in ("RGB", "RGBA")
