"""Every public name is exported, documented, annotated, and says its Args and Returns."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import pkgutil

import pytest

import jaxcompress

PACKAGE = pathlib.Path(jaxcompress.__file__).parent
MODULES = sorted(f"jaxcompress.{info.name}" for info in pkgutil.iter_modules([str(PACKAGE)]))


def own_names(module):
    """Public names that a module defines or re-exports by `from ._x import y as y`."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__.startswith(module.__name__)
    }


PUBLIC = [
    pytest.param(value, id=f"{name}.{attribute}")
    for name in MODULES
    for attribute, value in sorted(own_names(importlib.import_module(name)).items())
]


def check_function(function, name):
    doc = inspect.getdoc(function)
    assert doc, f"{name} has no docstring"
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    if parameters:
        assert "Args:" in doc, f"{name}: no Args section"
    for parameter in parameters:
        assert parameter.annotation is not inspect.Parameter.empty, f"{name}: {parameter}"
        assert f"{parameter.name}:" in doc, f"{name}: {parameter.name} is not described"
    assert signature.return_annotation is not inspect.Signature.empty, f"{name}: no return type"
    if signature.return_annotation is not None:
        assert "Returns:" in doc or "Yields:" in doc, f"{name}: no Returns section"


@pytest.mark.parametrize("value", PUBLIC)
def test_documented(value):
    if inspect.isfunction(value):
        check_function(value, value.__qualname__)
        return
    doc = inspect.getdoc(value)
    assert doc and doc != inspect.getdoc(value.__mro__[1]), f"{value} has no docstring"
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    for name in [f.name for f in fields] or getattr(value, "_fields", ()):
        if not name.startswith("_"):
            assert f"{name}:" in doc, f"{value.__name__}.{name} is not described"
    for name, member in vars(value).items():
        if inspect.isfunction(member) and not name.startswith("_"):
            assert inspect.getdoc(member), f"{value.__name__}.{name} has no docstring"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda p: p.parent.name)
def test_init_files_only_export(path):
    """A package's `__init__` re-exports by `from jaxcompress.x._y import z as z`, nothing else."""
    for node in ast.parse(path.read_text()).body:
        assert isinstance(node, ast.Expr | ast.Import | ast.ImportFrom | ast.Assign), node.lineno
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert alias.asname == alias.name, f"{path}:{node.lineno} {alias.name}"


def test_the_top_level_stays_small():
    names = [name for name in vars(jaxcompress) if not name.startswith("_")]
    own = [n for n in names if not inspect.ismodule(getattr(jaxcompress, n))]
    assert len(own) <= 15
