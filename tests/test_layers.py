"""Imports go down the layers only, and siblings never import each other."""

import ast
import pathlib

import pytest

import jaxcompress

LEVELS = {
    0: {"tree", "errors", "files", "lazy", "adapters"},
    1: {"graph", "stats", "numerics", "linalg", "budget"},
    2: {"sparsity", "structured", "quantize", "lowrank", "distill", "transfer"},
    3: {"train", "search", "export", "report"},
    4: {"recipe", "cli"},
}
LEVEL_OF = {part: level for level, parts in LEVELS.items() for part in parts}
# Level 0 is a short chain rather than a row of siblings; statistics are collected through the
# graph.
ALLOWED = {
    ("tree", "errors"),
    ("adapters", "tree"),
    ("adapters", "errors"),
    ("adapters", "lazy"),
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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    relative = path.relative_to(PACKAGE)
    here = relative.parts[0].removesuffix(".py")
    for other in imported_parts(path) - {here}:
        assert LEVEL_OF[other] < LEVEL_OF[here] or (here, other) in ALLOWED, (
            f"{relative} (level {LEVEL_OF[here]}) imports {other} (level {LEVEL_OF[other]})"
        )


def test_the_checker_sees_upward_imports(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("from jaxcompress.train import fit\nimport jaxcompress.cli\n")
    assert imported_parts(bad) == {"train", "cli"}
