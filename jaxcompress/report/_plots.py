"""The plots: accuracy against bytes, sparsity and bits per leaf, training curves."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxcompress.errors import ArgumentError
from jaxcompress.report._leaves import Leaves
from jaxcompress.report._plot import COLORS, FAINT, INK, Plot, elide
from jaxcompress.report._units import abbreviate


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model in `plot_tradeoff`.

    Attributes:
        label: Its name.
        bytes: Its size, positive.
        accuracy: A fraction.
        interval: A confidence interval of the accuracy, as fractions, or `None`.
    """

    label: str
    bytes: int
    accuracy: float
    interval: tuple[float, float] | None = None


def plot_tradeoff(points: Sequence[Point], *, title: str = "Accuracy against size") -> Plot:
    """Plot accuracy against bytes (logarithmic), one labelled point per model.

    A thin line joins the models that no other beats in both.

    Args:
        points: The models.
        title: A heading.

    Returns:
        The plot; `save` writes it.

    Raises:
        ArgumentError: If there is no point, or one without bytes.

    Example:
        >>> plot = plot_tradeoff([Point(label="dense", bytes=161_416, accuracy=0.981)])
        >>> plot.data["points"][0]["accuracy"]
        0.981
    """
    if not points or min(p.bytes for p in points) <= 0:
        raise ArgumentError(
            "points",
            got=f"{len(points)} points, {sum(p.bytes <= 0 for p in points)} of them of 0 bytes",
            expected="at least one point, each of at least one byte",
            fix="Give every model the bytes of its file.",
        )

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        front = _front(points)
        axes.plot(
            [p.bytes for p in front], [100 * p.accuracy for p in front], color=FAINT, lw=1, ls="--"
        )
        for point in points:
            if point.interval is not None:
                low, high = (100 * end for end in point.interval)
                axes.plot([point.bytes] * 2, [low, high], color=COLORS[0], alpha=0.45, lw=2)
        axes.scatter(
            [p.bytes for p in points], [100 * p.accuracy for p in points], s=46, color=COLORS[0]
        )
        axes.set(title=title, xlabel="bytes (log scale)", ylabel="accuracy [%]")
        axes.margins(x=0.12, y=0.18)
        _log_bytes(axes, [p.bytes for p in points])
        _label(figure, axes, points)

    data = {"points": [asdict(point) for point in points]}
    return Plot(title=title, data=data, size=(7.2, 4.2), draw=draw)


def _front(points: Sequence[Point]) -> list[Point]:
    """List the points that no other beats in size and accuracy, smallest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes, -p.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def _log_bytes(axes: Any, values: Sequence[int]) -> None:
    """Make x logarithmic with round ticks: 1, 2 and 5 times a power of ten, as kB or MB."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    decades = math.log10(max(values) / min(values)) if len(values) > 1 else 0
    if decades < 0.1:  # one size only: give it room
        axes.set_xlim(min(values) / 2, max(values) * 2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: abbreviate(x, "B")))


def _label(figure: Any, axes: Any, points: Sequence[Point]) -> None:
    """Name the points, each on the side where its name covers least of what is drawn."""
    figure.draw_without_rendering()  # settles the layout, so that pixels mean something
    renderer = figure.canvas.get_renderer()
    frame, drawn = axes.get_window_extent(), _ink(axes, points)
    names: list[Any] = []
    for point in points:
        tried = []
        for right, up in _SIDES:
            text = axes.annotate(
                point.label,
                (point.bytes, 100 * point.accuracy),
                (8 * right, 8 * up),
                textcoords="offset points",
                ha=("right", "center", "left")[1 + (right > 0) - (right < 0)],
                va=("top", "center", "bottom")[1 + (up > 0) - (up < 0)],
                fontsize=9,
                color=INK,
            )
            box = text.get_window_extent(renderer)
            inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
            clashes = 10 * sum(box.overlaps(other) for other in names) + 20 * (not inside)
            clashes += sum(box.padded(2).contains(x, y) for x, y in drawn)
            tried.append((clashes, len(tried), text, box))
        _, best, _, box = min(tried[:], key=lambda one: one[:2])
        for _, i, text, _ in tried:
            if i != best:
                text.remove()
        names.append(box)


# Where a name may stand beside its point: to the right or left, above or below, near or far.
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_SIDES += ((1, 2), (1, -2), (-1, 2), (-1, -2), (0, 3), (0, -3))


def _ink(axes: Any, points: Sequence[Point]) -> list[tuple[float, float]]:
    """Sample, in pixels, what a name should not cover: points, intervals and the front."""
    ends = [(point, *(point.interval or (point.accuracy,) * 2)) for point in points]
    lines = [[(p.bytes, 100 * low), (p.bytes, 100 * high)] for p, low, high in ends]
    front = [(p.bytes, 100 * p.accuracy) for p in _front(points)]
    lines += [list(pair) for pair in itertools.pairwise(front)]
    samples = []
    for line in lines:
        (x0, y0), (x1, y1) = axes.transData.transform(line)
        samples += [(x0 + (x1 - x0) * t / 40, y0 + (y1 - y0) * t / 40) for t in range(41)]
    return samples


def plot_leaves(
    leaves: Leaves, *, title: str = "Sparsity and bits per leaf", most: int = 40
) -> Plot:
    """Plot each leaf's sparsity and bits per entry as horizontal bars, the total last.

    Args:
        leaves: What `leaves` gave.
        title: A heading.
        most: Show the leaves with the most bytes, at most so many; the JSON holds all.

    Returns:
        The plot; `save` writes it.

    Raises:
        ArgumentError: If there is no leaf.

    Example:
        >>> import numpy as np
        >>> from jaxcompress.report import leaves
        >>> plot_leaves(leaves({"kernel": np.ones((4, 4), "f4")})).data["total"]["bits"]
        32.0
    """
    rows = [row for row in leaves.rows if row.shape is not None]
    if not rows:
        raise ArgumentError(
            "leaves", got="no leaves", expected="at least one", fix="Pass params with arrays."
        )
    threshold = sorted((row.bytes for row in rows), reverse=True)[:most][-1]
    largest = [row for row in rows if row.bytes >= threshold][:most]
    shown = [*largest, leaves.total]
    if len(largest) < len(rows):
        title += f" (largest {len(largest)} of {len(rows)})"

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        places = list(range(len(shown)))
        columns = [
            (left, "sparsity [%]", [100 * row.sparsity for row in shown], COLORS[0], "{:.1f}"),
            (right, "bits per entry", [row.bits for row in shown], COLORS[1], "{:.3g}"),
        ]
        for axes, label, values, color, text in columns:
            bars = axes.barh(places, values, height=0.68, color=color)
            bars[-1].set_alpha(0.6)
            axes.bar_label(bars, [text.format(v) for v in values], padding=4, fontsize=8, color=INK)
            axes.set_xlabel(label)
            axes.set_xlim(0, 1.18 * max(max(values), 1))
            axes.grid(visible=False, axis="y")
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
        left.set_xlim(0, 118)
        left.set_xticks(range(0, 101, 20))
        left.set_yticks(places, [elide(row.path, 40) for row in shown], fontsize=8.5)
        left.get_yticklabels()[-1].set_fontweight("bold")
        left.invert_yaxis()
        left.set_ylim(len(shown) - 0.4, -0.6)
        figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold", color=INK)

    data = {
        "leaves": [row.as_dict() for row in leaves.rows],
        "total": leaves.total.as_dict(),
    }
    return Plot(title=title, data=data, size=(8.4, 1.5 + 0.27 * len(shown)), draw=draw)


def plot_curves(
    history: Sequence[Mapping[str, Any]],
    *,
    keys: Sequence[str],
    x: str = "step",
    title: str = "Training",
) -> Plot:
    """Plot training curves, one panel per key below another, on a common x axis.

    Args:
        history: One mapping per logged step; a key may be missing from some.
        keys: What to plot, for example `["loss", "sparsity"]`.
        x: The key of the x axis.
        title: A heading.

    Returns:
        The plot; `save` writes it.

    Raises:
        ArgumentError: If a key is in no row.

    Example:
        >>> history = [{"step": 0, "loss": 2.3}, {"step": 10, "loss": 1.1}]
        >>> plot_curves(history, keys=["loss"]).data["series"]
        {'loss': [(0.0, 2.3), (10.0, 1.1)]}
    """
    for key in (x, *keys):
        if not any(key in row for row in history):
            known = sorted({k for row in history for k in row})
            raise ArgumentError(
                "keys",
                got=repr(key),
                expected=f"keys of the history {known}",
                fix="Choose one of these keys.",
            )
    series = {
        key: [(float(row[x]), float(row[key])) for row in history if key in row and x in row]
        for key in keys
    }

    def draw(figure: Any) -> None:
        panels = figure.subplots(len(keys), 1, sharex=True, squeeze=False)[:, 0]
        for i, (axes, key) in enumerate(zip(panels, keys, strict=True)):
            axes.plot(*zip(*series[key], strict=True), color=COLORS[i % len(COLORS)], lw=1.6)
            axes.set_ylabel(key.replace("_", " "))
            axes.margins(x=0.01)
        panels[0].set_title(title)
        panels[-1].set_xlabel(x)
        figure.align_ylabels()

    data = {"x": x, "series": series}
    return Plot(title=title, data=data, size=(7.2, 0.9 + 1.8 * len(keys)), draw=draw)
