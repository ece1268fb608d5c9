"""The pages of docs that have no test of their own: design, extending and the API reference."""

import contextlib
import importlib.util
import pathlib
import pkgutil
import re
import sys
import types

import pytest

import jaxcompress
from jaxcompress.export import _formats
from jaxcompress.graph.dims import _rule
from jaxcompress.graph.program import _constructs
from jaxcompress.graph.sites import _sites, _views

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = pathlib.Path(jaxcompress.__file__).parent
EXTENDING = (ROOT / "docs" / "extending.md").read_text()
DESIGN = (ROOT / "docs" / "design.md").read_text()
BLOCKS = re.findall(r"^### ([^\n]+)\n(?:(?!^#).)*?```python\n(.*?)```", EXTENDING, re.DOTALL | re.M)


@pytest.fixture
def isolated(monkeypatch):
    """Take back the rules and classes that a block registers, and its module."""
    monkeypatch.setattr(_formats, "_CLASSES", dict(_formats._CLASSES))
    module = types.ModuleType("block")
    monkeypatch.setitem(sys.modules, "block", module)
    with contextlib.ExitStack() as stack:
        for table in (_views, _sites, _constructs, _rule):
            rules = getattr(table, "_RULES", None) or table._CONSTRUCTS
            stack.enter_context(rules.isolate())
        yield module


@pytest.mark.parametrize(("title", "block"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_each_example_runs_on_its_own(title, block, isolated):
    exec(compile(block, f"docs/extending.md, {title}", "exec"), vars(isolated))


def test_what_examples_register_is_taken_back():
    assert _views.view_rule("halve") is None and _sites.site_rule("transposed_dot") is None
    assert _constructs.construct("custom_vmap_call") is None
    assert _rule.dims_rule("add_ramp") is None
    assert "Deviations" not in _formats._CLASSES


def test_every_example_is_found_and_in_the_table():
    assert len(BLOCKS) == EXTENDING.count("```python") >= 15
    links = re.findall(r"\]\(#([^)]+)\)", EXTENDING)
    assert sorted(links) == sorted(title.lower().replace(" ", "-") for title, _ in BLOCKS)


def test_every_way_to_register_has_an_example():
    doors = [name for name in dir(jaxcompress.graph) if name.startswith("register_")]
    code = "".join(block for _, block in BLOCKS)
    assert all(f"graph.{name}(" in code for name in doors) and len(doors) == 4


def test_the_api_page_is_what_the_script_writes():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text() == script.write_page(), "run python docs/make_api.py"
    assert set(script.PARTS) == {info.name for info in pkgutil.iter_modules([str(PACKAGE)])}


def test_files_that_the_design_names_exist():
    files = re.findall(r"`((?:\w+/)*\w+\.py)`", DESIGN)
    missing = [name for name in files if not ((PACKAGE / name).exists() or (ROOT / name).exists())]
    assert len(files) > 40 and not missing


def test_words_of_the_inside_stand_where_the_design_says():
    table = DESIGN.split("## Words of the inside")[1]
    rows = re.findall(r"^\| ([a-z ]+) \|.*\| `([^`]+)` \|$", table, re.M)
    assert len(rows) > 40
    for word, name in rows:
        source, class_name = (PACKAGE / name).read_text(), word.title().replace(" ", "")
        assert re.search(rf"\b({word}|{class_name})s?\b", source, re.I), (word, name)


def test_names_of_domains_and_doors_exist():
    rows = re.findall(r"^\| `(\w+)` \|.*\| `([^`]+\.py)` \|$", DESIGN, re.M)
    assert len(rows) == 5
    for name, file in rows:
        assert re.search(rf"^class {name}\(Domain\[", (PACKAGE / file).read_text(), re.M), name
    doors = re.findall(r"^\| `graph/(\w+)` \|[^|]*\| ([^|]*) \|$", DESIGN, re.M)
    for folder, text in doors:
        module = importlib.import_module(f"jaxcompress.graph.{folder}")
        names = [] if text.startswith("nothing") else re.findall(r"`(\w+)`", text)
        assert all(hasattr(module, name) for name in names), folder
    folders = {path.parent.name for path in (PACKAGE / "graph").glob("*/__init__.py")}
    assert {folder for folder, _ in doors} == folders


def test_parts_in_the_design_are_those_that_there_are():
    rows = re.findall(r"^\| \d \| (.*?) \|", DESIGN, re.M)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(info.name for info in pkgutil.iter_modules([str(PACKAGE)]))


def test_pages_link_to_pages_that_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", prose):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
