"""Plots: what is drawn, what is written, and labels that do not collide."""

import itertools
import json
import struct
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from jaxcompress import report
from jaxcompress.errors import ArgumentError, MissingExtraError
from jaxcompress.report._units import abbreviate

POINTS = [
    report.Point(label="dense", bytes=161_416, accuracy=0.981, interval=(0.97, 0.99)),
    report.Point(label="pruned 80 %", bytes=41_200, accuracy=0.962),
    report.Point(label="pruned 80 % + distilled", bytes=41_200, accuracy=0.978),
    report.Point(label="int8", bytes=13_400, accuracy=0.978),
    report.Point(label="int4", bytes=12_900, accuracy=0.9775),
]
HISTORY = [
    {"step": i, "loss": 1 / (i + 1)} | ({"sparsity": 0.8} if i % 2 else {}) for i in range(6)
]


def some_leaves(count=3):
    params = {f"layer_{i:02}/kernel": np.ones((4, i + 1), "f4") for i in range(count)}
    return report.leaves(
        params, mask={k: np.arange(v.size).reshape(v.shape) % 2 == 0 for k, v in params.items()}
    )


PLOTS = {
    "tradeoff": lambda: report.plot_tradeoff(POINTS),
    "leaves": lambda: report.plot_leaves(some_leaves()),
    "curves": lambda: report.plot_curves(HISTORY, keys=["loss", "sparsity"]),
}


def drawn(plot):
    """Draw a plot into a figure that the test can look at."""
    figure = Figure(figsize=plot.size, layout="constrained")
    FigureCanvasAgg(figure)
    plot.draw(figure)
    figure.draw_without_rendering()
    return figure


@pytest.mark.parametrize("make", PLOTS.values(), ids=PLOTS.keys())
def test_files_and_their_data(make, tmp_path):
    plot = make()
    before = dict(matplotlib.rcParams)
    path = plot.save(tmp_path / "plots" / "plot.png")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == tuple(int(160 * side) for side in plot.size)
    data = json.loads(path.with_suffix(".json").read_text())
    assert data.pop("title") == plot.title
    assert data == json.loads(json.dumps(plot.data))
    assert {p.name for p in path.parent.iterdir()} == {"plot.png", "plot.json"}
    assert dict(matplotlib.rcParams) == before


def test_svg_is_the_same_file_every_time(tmp_path):
    make = PLOTS["leaves"]
    first = make().save(tmp_path / "a.svg").read_bytes()
    assert first == make().save(tmp_path / "b.svg").read_bytes() and b"<svg" in first


def test_labels_cover_neither_each_other_nor_points():
    figure = drawn(report.plot_tradeoff(POINTS))
    (axes,) = figure.axes
    renderer = figure.canvas.get_renderer()
    names = [text for text in axes.texts if isinstance(text, Annotation)]
    assert sorted(text.get_text() for text in names) == sorted(p.label for p in POINTS)
    boxes = [text.get_window_extent(renderer) for text in names]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    pixels = axes.transData.transform([(p.bytes, 100 * p.accuracy) for p in POINTS])
    assert not any(box.contains(*pixel) for box in boxes for pixel in pixels)
    frame = axes.get_window_extent()
    assert all(frame.contains(b.x0, b.y0) and frame.contains(b.x1, b.y1) for b in boxes)


def test_labels_leave_the_front_and_the_intervals_to_be_seen():
    points = [
        report.Point(label=f"{k} bits", bytes=10_000 * k, accuracy=y, interval=(y - 0.02, y + 0.02))
        for k, y in ((2, 0.70), (3, 0.82), (4, 0.85), (8, 0.86))
    ]
    figure = drawn(report.plot_tradeoff(points))
    (axes,) = figure.axes
    at = [(p.bytes, 100 * p.accuracy) for p in points]
    lines = [*itertools.pairwise(at), *([(x, y - 2), (x, y + 2)] for x, y in at)]
    ends = [axes.transData.transform(line) for line in lines]
    seen = [pixel for a, b in ends for pixel in np.linspace(a, b, 100)]
    renderer = figure.canvas.get_renderer()
    names = [text for text in axes.texts if isinstance(text, Annotation)]
    boxes = [text.get_window_extent(renderer) for text in names]
    assert len(boxes) == 4 and not any(box.contains(*pixel) for box in boxes for pixel in seen)


def test_the_front_joins_what_nothing_beats():
    figure = drawn(report.plot_tradeoff(POINTS))
    front = next(line for line in figure.axes[0].lines if line.get_linestyle() == "--")
    assert list(front.get_xdata()) == [12_900, 13_400, 161_416]
    assert figure.axes[0].get_xscale() == "log"


def test_one_point_is_a_plot():
    figure = drawn(report.plot_tradeoff(POINTS[:1]))
    low, high = figure.axes[0].get_xlim()
    assert low < 161_416 < high


def test_bars_are_the_leaves_and_their_total():
    figure = drawn(report.plot_leaves(some_leaves()))
    left, right = figure.axes
    assert [bar.get_width() for bar in left.patches] == pytest.approx([50.0] * 4)
    assert [bar.get_width() for bar in right.patches] == pytest.approx([32.0] * 4)
    assert [t.get_text() for t in left.get_yticklabels()][-1] == "total"


def test_many_leaves_are_cut_and_said_to_be():
    plot = report.plot_leaves(some_leaves(12), most=5)
    figure = drawn(plot)
    assert len(figure.axes[0].patches) == 6 and "largest 5 of 12" in plot.title
    assert figure.axes[0].get_yticklabels()[0].get_text() == "layer_07/kernel"
    assert len(plot.data["leaves"]) == 12


def test_curves_skip_what_was_not_logged():
    figure = drawn(report.plot_curves(HISTORY, keys=["loss", "sparsity"]))
    assert [len(axes.lines[0].get_xdata()) for axes in figure.axes] == [6, 3]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (999.7, "1 kB"),
        (1000, "1 kB"),
        (20_000, "20 kB"),
        (999_600, "1 MB"),
        (2.5e6, "2.5 MB"),
        (5e9, "5 GB"),
    ],
)
def test_abbreviate(count, text):
    assert abbreviate(count, "B") == text


def test_bad_input(tmp_path):
    with pytest.raises(ArgumentError, match="`points`.*got 0 points"):
        report.plot_tradeoff([])
    with pytest.raises(ArgumentError, match="1 of them of 0 bytes"):
        report.plot_tradeoff([report.Point(label="x", bytes=0, accuracy=1.0)])
    with pytest.raises(ArgumentError, match="`leaves`"):
        report.plot_leaves(report.leaves({}))
    with pytest.raises(ArgumentError, match=r"`keys`.*\['loss', 'sparsity', 'step'\], got 'lost'"):
        report.plot_curves(HISTORY, keys=["lost"])
    with pytest.raises(ArgumentError, match=r"ending in \.png or \.svg"):
        report.plot_tradeoff(POINTS).save(tmp_path / "plot.pdf")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'jaxcompress\[report\]'"):
        report.plot_tradeoff(POINTS).save(tmp_path / "plot.png")
