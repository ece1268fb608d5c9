"""Tables: alignment, units, differences, narrow terminals, JSON."""

import dataclasses
import io
import json
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from jaxcompress import report
from jaxcompress.errors import ArgumentError, ArgumentTypeError

ROWS = [
    {"model": "dense", "accuracy": 0.981, "nonzero": 40354, "bytes": 161416},
    {"model": "pruned 80 % and distilled", "accuracy": 0.97, "nonzero": 8071, "bytes": 41200},
    {"model": "int4", "accuracy": 0.981, "nonzero": 8071, "bytes": 9100},
]


def test_numbers_end_in_one_column_under_their_unit():
    lines = report.table(ROWS).text().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[-1] == "[kB]" and lines[1].split()[-2] == "nonzero"
    assert [line.split()[-1] for line in lines[3:]] == ["161.4", "41.2", "9.1"]
    assert [line.split()[-2] for line in lines[3:]] == ["40,354", "8,071", "8,071"]
    assert [line.split()[-3] for line in lines[3:]] == ["98.1", "97.0", "98.1"]


def test_differences_and_ratios_to_the_first_row():
    columns = [
        report.Column(key="accuracy", versus="difference"),
        report.Column(key="bytes", versus="ratio"),
    ]
    headers, rows, numeric = report.table(ROWS, columns=columns).cells()
    assert headers == ["accuracy [%]", "Δ", "bytes [kB]", "ratio"] and all(numeric)
    assert [row[1] for row in rows] == ["0.0", "\N{MINUS SIGN}1.1", "0.0"]
    assert [row[3] for row in rows] == ["1.0×", "3.9×", "17.7×"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_numbers_are_never_broken(width):
    wide = [row | {"cross_entropy": 0.07123, "agreement": 0.9912, "seconds": 1.5} for row in ROWS]
    text = report.table(wide).text(width=width)
    assert "40,354" in text and "0.0712" in text and "161.4" in text
    assert "pruned 80 %" in text and "distilled" in text
    assert max(map(len, text.splitlines())) <= max(width, 70)


@pytest.mark.parametrize(
    ("values", "unit", "shown"),
    [
        ([1_500, 3_000_000], report.BYTES, ["1.5", "3,000.0"]),
        ([5, 900], report.BYTES, ["5", "900"]),
        ([2_500_000_000], report.BYTES, ["2.5"]),
        ([0.00125, 0.01], report.MILLISECONDS, ["1.25", "10.00"]),
        ([0.981], report.PERCENT, ["98.1"]),
        ([12.3456, 0.001], None, ["12.35", "0.00"]),
        ([1, 1234567], None, ["1", "1,234,567"]),
        ([0.5, None], None, ["0.5000", "\N{EN DASH}"]),
        ([0.5, float("nan"), float("inf")], None, ["0.5000", "nan", "inf"]),
        ([-0.25, 0.0], None, ["\N{MINUS SIGN}0.2500", "0.0000"]),
        ([np.float32(0.5), jnp.float32(1.5)], None, ["0.500", "1.500"]),
        ([True, "text"], None, ["True", "text"]),
        ([(3, 4), ()], None, ["3×4", "scalar"]),
    ],
)
def test_cells(values, unit, shown):
    rows = [{"x": value} for value in values]
    _, cells, _ = report.table(rows, columns=[report.Column(key="x", unit=unit)]).cells()
    assert [cell for (cell,) in cells] == shown


def test_latencies_show_their_spread():
    taken = report.Latency(median=1.5e-3, low=1.4e-3, high=1.65e-3, repeats=10)
    _, cells, _ = report.table([{"latency": taken}]).cells()
    assert cells == [["1.500 ± 0.125"]]


class Named(NamedTuple):
    a: int
    b: str


@dataclasses.dataclass(frozen=True)
class Record:
    a: int
    b: str


@pytest.mark.parametrize("row", [{"a": 1, "b": "x"}, Named(1, "x"), Record(1, "x")], ids=str)
def test_rows_of_every_kind(row):
    assert report.table([row]).rows == ({"a": 1, "b": "x"},)


def test_rows_may_miss_keys_and_be_none():
    _, cells, _ = report.table([{"a": 1}, {"b": 2}]).cells()
    assert cells == [["1", "\N{EN DASH}"], ["\N{EN DASH}", "2"]]
    assert report.table([]).text() == ""
    assert report.table([], columns=["a"]).text().split() == ["a", "─"]


def test_json_is_unrounded(tmp_path):
    made = report.table(
        [{"x": jnp.float32(0.1), "y": np.int64(3), "z": Named(1, "q")}], title="Results"
    )
    text = made.to_json(tmp_path / "folder" / "table.json")
    assert json.loads(text) == {
        "title": "Results",
        "rows": [{"x": pytest.approx(0.1), "y": 3, "z": [1, "q"]}],
    }
    assert (tmp_path / "folder" / "table.json").read_text() == text + "\n"
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["table.json"]


def test_rich_prints_it():
    console = rich.console.Console(file=io.StringIO(), width=80)
    console.print(report.table(ROWS, title="A title"))
    assert "A title" in console.file.getvalue() and "161.4" in console.file.getvalue()


def test_markup_in_cells_is_text():
    assert "[bold]x[/bold]" in report.table([{"a": "[bold]x[/bold]"}], title="").text()


def test_bad_rows_and_columns():
    with pytest.raises(ArgumentTypeError, match="`rows`: expected mappings"):
        report.table([3])
    with pytest.raises(ArgumentTypeError, match="`rows`"):
        report.table([Record])
    with pytest.raises(ArgumentError, match=r"`columns`.*'model', 'accuracy'.*got 'acuracy'"):
        report.table(ROWS, columns=["acuracy"])
