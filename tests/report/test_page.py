"""The page: self-contained, escaped, well formed, readable in the dark."""

import html.parser
import re
import sys

import numpy as np
import pytest

from jaxcompress import report
from jaxcompress.errors import ArgumentTypeError, MissingExtraError
from jaxcompress.report._plot import INK

POINT = report.Point(label="dense", bytes=1000, accuracy=0.9)
TABLE = report.table(
    [{"model": "<b>dense</b>", "path": "a/b", "bytes": 1000}, {"model": "total", "bytes": 2000}],
    title="Sizes",
)


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.words = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "wbr"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href"):
                self.links.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "folder" / "report.html"
    plots = (
        report.plot_tradeoff([POINT]),
        report.plot_leaves(report.leaves({"w": np.ones((4, 4), "f4")})),
    )
    sections = [
        report.Section(title="Numbers & such", parts=("Not <i>italic</i>.", TABLE)),
        report.Section(title="Plots", parts=plots),
        report.Section(title="Empty"),
    ]
    assert report.page(path, sections, title="A <report>", summary="In short.") == path
    text = path.read_text()
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return path, text, reader


def test_nothing_comes_from_elsewhere(made):
    _, text, reader = made
    assert "script" not in reader.tags and "link" not in reader.tags
    assert all(link.startswith("#") for link in reader.links)
    urls = re.findall(r"https?://[^\s\"'<]+", text)
    assert all(re.match(r"http://www\.w3\.org/", url) for url in urls)
    assert "@import" not in text and "url(http" not in text


def test_text_is_escaped(made):
    _, text, reader = made
    assert "<i>" not in text and "<b>" not in text
    assert "Not <i>italic</i>." in reader.words and "A <report>" in reader.words


def test_every_part_is_there(made):
    path, _, reader = made
    assert reader.tags.count("svg") == 2 and reader.tags.count("table") == 1
    assert reader.tags.count("h2") == 3
    words = " ".join(reader.words)
    assert "In short." in words and "bytes [kB]" in words and "Sizes" in words
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_plots_take_the_readers_colours_and_have_ids_of_their_own(made):
    _, text, reader = made
    assert INK not in text.split("</style>", 1)[1] and "currentColor" in text
    assert "prefers-color-scheme: dark" in text
    assert len(reader.ids) == len(set(reader.ids)) > 10
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | {link[1:] for link in reader.links}
    assert used <= set(reader.ids)


def test_bad_parts_and_missing_extra(tmp_path, monkeypatch):
    with pytest.raises(ArgumentTypeError, match="`parts`: expected text, a Table or a Plot"):
        report.page(tmp_path / "x.html", [report.Section(title="x", parts=(3,))], title="x")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match="jinja2"):
        report.page(tmp_path / "x.html", [], title="x")
    assert not list(tmp_path.iterdir())
