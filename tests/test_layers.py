"""Imports go down the layers only, through doors, and never in a circle."""

import ast
import pathlib

import pytest

import jaxcompress

LEVELS = {
    0: {"tree", "errors", "files", "lazy", "text", "adapters", "batches", "mappings", "meshes"},
    1: {"graph", "stats", "numerics", "linalg", "budget"},
    2: {"sparsity", "structured", "quantize", "lowrank", "distill"},
    3: {"train", "export", "report"},
    4: {"cli"},
}
INNER = {"program": 0, "sites": 1, "leaves": 2, "dims": 2, "affine": 2, "cost": 2}
"""The folders of `graph`: each imports from those below it only."""
LEVEL_OF = {part: level for level, parts in LEVELS.items() for part in parts}
# Level 0 is a short chain rather than a row of siblings; statistics are collected through the
# graph.
ALLOWED = {
    ("tree", "errors"),
    ("adapters", "tree"),
    ("adapters", "errors"),
    ("adapters", "lazy"),
    ("batches", "errors"),
    ("stats", "graph"),
}
PACKAGE = pathlib.Path(jaxcompress.__file__).parent
FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__"
)


def imported_parts(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import absolutely, line {node.lineno}"
            parts = (node.module or "").split(".")
            if parts[0] == "jaxcompress":
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("jaxcompress.")
            }
    return found


def imported_modules(path: pathlib.Path) -> set[str]:
    """List the modules of the library that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "jaxcompress"}


def name_of(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def crosses(module: str, other: str) -> bool:
    """Tell whether an import goes past the door of another package: to an underscore name."""
    private = any(part.startswith("_") for part in other.split("."))
    return private and module.split(".")[1:2] != other.split(".")[1:2]


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Find modules that import each other in a circle; empty if there are none."""
    left = {name: others & set(imports) - {name} for name, others in imports.items()}
    while leaves := [name for name, others in left.items() if not others]:
        left = {n: others - set(leaves) for n, others in left.items() if n not in leaves}
    return sorted(left)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    relative = path.relative_to(PACKAGE)
    here = relative.parts[0].removesuffix(".py")
    for other in imported_parts(path) - {here}:
        assert LEVEL_OF[other] < LEVEL_OF[here] or (here, other) in ALLOWED, (
            f"{relative} (level {LEVEL_OF[here]}) imports {other} (level {LEVEL_OF[other]})"
        )


def test_each_level_names_what_there_is():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert set(LEVEL_OF) == parts
    folders = {path.parent.name for path in (PACKAGE / "graph").glob("*/__init__.py")}
    assert set(INNER) == folders


def test_folders_of_graph_import_those_below():
    for name, path in MODULES.items():
        parts = name.split(".")
        if parts[:2] != ["jaxcompress", "graph"] or len(parts) < 4:
            continue
        for other in imported_modules(path):
            there = other.split(".")
            if there[:2] == parts[:2] and len(there) > 2 and there[2] in INNER:
                below = INNER[there[2]] < INNER[parts[2]] or there[2] == parts[2]
                assert below, f"{name} imports {other}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_other_packages_are_imported_by_their_doors(module):
    for other in imported_modules(MODULES[module]):
        assert not crosses(module, other), f"{module} imports {other}: export it by name"


def test_no_module_imports_itself_by_way_of_others():
    inner = {name: path for name, path in MODULES.items() if name != "jaxcompress"}
    assert not circle({name: imported_modules(path) for name, path in inner.items()})


def test_the_checkers_see_what_they_are_for(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("from jaxcompress.train import fit\nimport jaxcompress.cli\n")
    assert imported_parts(bad) == {"train", "cli"}
    bad.write_text("def f():\n    from jaxcompress.graph.sites import _walk\n")
    assert imported_modules(bad) == {"jaxcompress.graph.sites._walk"}
    assert crosses("jaxcompress.quantize._ptq", "jaxcompress.graph.sites._walk")
    assert not crosses("jaxcompress.graph.dims._walk", "jaxcompress.graph.sites._walk")
    assert not crosses("jaxcompress.quantize._ptq", "jaxcompress.graph.sites")
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "d"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})
