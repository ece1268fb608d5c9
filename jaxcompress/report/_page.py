"""One HTML page that holds everything: no scripts, no fonts, no pictures from elsewhere."""

import importlib.resources
import os
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from jaxcompress import files
from jaxcompress.errors import ArgumentTypeError, explain_missing
from jaxcompress.report._plot import INK, Plot
from jaxcompress.report._table import Table

Part: TypeAlias = str | Table | Plot
"""What a section is made of; text is a paragraph, and is escaped."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with what stands under it.

    Attributes:
        title: The heading.
        parts: Paragraphs, tables and plots, in order.
    """

    title: str
    parts: tuple[Part, ...] = ()


def page(
    path: str | os.PathLike[str], sections: Sequence[Section], *, title: str, summary: str = ""
) -> pathlib.Path:
    """Write one self-contained HTML page of tables and plots, readable in light and dark.

    The file is written beside its place and renamed there.

    Args:
        path: Where to; missing folders are made.
        sections: What the page holds.
        title: Its title.
        summary: A sentence or two below the title.

    Returns:
        The path.

    Raises:
        ArgumentTypeError: If a part is no text, table or plot.
        MissingExtraError: If jinja2 or matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> from jaxcompress.report import table
        >>> result = Section(title="Result", parts=(table([{"model": "dense", "accuracy": 0.98}]),))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page(f"{folder}/report.html", [result], title="Digits").name
        'report.html'
    """
    with explain_missing("The HTML page", package="jinja2", extra="report"):
        import jinja2
    source = importlib.resources.files("jaxcompress.report").joinpath("page.html.jinja").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    drawn, plots = [], 0
    for section in sections:
        parts = []
        for part in section.parts:
            plots += isinstance(part, Plot)
            parts.append(_part(part, prefix=f"plot{plots}-"))
        drawn.append({"title": section.title, "parts": parts})
    html = environment.from_string(source).render(title=title, summary=summary, sections=drawn)
    files.write(path, html)
    return pathlib.Path(path)


def _part(part: Part, *, prefix: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"text": part}
    if isinstance(part, Plot):
        return {"svg": _inline_svg(part, prefix=prefix), "title": part.title}
    if isinstance(part, Table):
        headers, rows, numeric = part.cells()
        return {
            "headers": list(zip(headers, numeric, strict=True)),
            "rows": [list(zip(row, numeric, strict=True)) for row in rows],
            "title": part.title,
            "total": part.total,
        }
    raise ArgumentTypeError(
        "parts",
        got=type(part).__name__,
        expected="text, a Table or a Plot",
        fix="Make tables with report.table and plots with report.plot_*.",
    )


def _inline_svg(plot: Plot, *, prefix: str) -> str:
    """Draw a plot for the page: text in the reader's colour, ids of its own."""
    svg = plot.render("svg", transparent=True).decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    return svg.replace(INK, "currentColor")
