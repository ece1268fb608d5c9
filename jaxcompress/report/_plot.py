"""A plot as data and a way to draw it; matplotlib is imported only when one is drawn."""

import io
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxcompress import files
from jaxcompress.errors import ArgumentError, explain_missing
from jaxcompress.report._table import to_plain

INK, FAINT = "#24292f", "#8c959f"
"""Text and lines; the page replaces the ink by the reader's text colour."""
COLORS = ("#2f7fd1", "#e0762f", "#2a9d6f", "#a25ddc", "#d1495b", "#7a8793")
"""Series colours, of middling lightness: they stand out on white and on near-black."""

STYLE: Any = {
    "font.size": 10,
    "font.family": ["DejaVu Sans"],
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    # The same plot is the same file.
    "svg.hashsalt": "jaxcompress",
}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot: what it shows, and how to draw that.

    Attributes:
        title: What it shows, in words.
        data: What is drawn, as values that JSON knows.
        size: Width and height in inches.
        draw: Draws the data into an empty `matplotlib.figure.Figure`.
    """

    title: str
    data: Mapping[str, Any]
    size: tuple[float, float]
    draw: Callable[[Any], None]

    def save(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Write the plot, and its data as JSON beside it under the suffix `.json`.

        Args:
            path: A file ending in `.png` or `.svg`; missing folders are made.

        Returns:
            The path.

        Raises:
            ArgumentError: If the suffix is another.
            MissingExtraError: If matplotlib is not installed.
        """
        path = pathlib.Path(path)
        if path.suffix not in (".png", ".svg"):
            raise ArgumentError(
                "path",
                got=repr(str(path)),
                expected="a file name ending in .png or .svg",
                fix="For example 'tradeoff.png'.",
            )
        files.write(path, self.render(path.suffix[1:]))
        data = {"title": self.title, **self.data}
        files.write(path.with_suffix(".json"), json.dumps(data, default=to_plain, indent=1) + "\n")
        return path

    def render(self, suffix: str, *, transparent: bool = False) -> bytes:
        """Draw the plot.

        Args:
            suffix: `"png"` or `"svg"`.
            transparent: Leave the background out.

        Returns:
            The file's content.

        Raises:
            MissingExtraError: If matplotlib is not installed.
        """
        with explain_missing("Plotting", package="matplotlib", extra="report"):
            import matplotlib
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        # A Figure of its own, without pyplot: no global state, no backend, no window.
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=self.size, layout="constrained")
            FigureCanvasAgg(figure)  # measures text; `savefig` takes the one for its format
            self.draw(figure)
            out = io.BytesIO()
            metadata = {"Date": None} if suffix == "svg" else {}
            figure.savefig(out, format=suffix, dpi=160, transparent=transparent, metadata=metadata)
        return out.getvalue()


def elide(text: str, most: int) -> str:
    """Leave out the beginning of a text of more than so many characters."""
    return text if len(text) <= most else "…" + text[-most + 1 :]
