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
    """Public names that a module defines or re-exports, those that load on first use included."""
    return {
        name: value
        for name, value in ((name, getattr(module, name)) for name in dir(module))
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


INITS = pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda p: p.parent.name
)
# What a package needs to export names that load on first use.
TOOLS = {("typing", "TYPE_CHECKING"), ("jaxcompress", "lazy")}


def exports(nodes):
    """List what `from x import y as y` statements export, as `(x, y)`; refuse anything else."""
    found = []
    for node in nodes:
        assert isinstance(node, ast.ImportFrom), ast.unparse(node)
        for alias in node.names:
            assert alias.asname == alias.name, ast.unparse(node)
            found.append((node.module, alias.name))
    return found


def attached(package, node):
    """List what `__getattr__, __dir__ = lazy.attach(...)` exports, as `(module, name)`."""
    assert isinstance(node, ast.Assign) and isinstance(node.value, ast.Call), ast.unparse(node)
    assert ast.unparse(node.targets[0]) == "(__getattr__, __dir__)"
    assert ast.unparse(node.value.func) == "lazy.attach"
    assert [ast.unparse(argument) for argument in node.value.args] == ["__name__"]
    keywords = {k.arg: ast.literal_eval(k.value) for k in node.value.keywords}
    assert keywords.keys() <= {"submodules", "names"}
    found = [(package, name) for name in keywords.get("submodules", [])]
    for module, names in keywords.get("names", {}).items():
        found += [(f"{package}.{module}", name) for name in names]
    return found


@INITS
def test_init_files_only_export(path):
    """A package's `__init__` re-exports, at once or on first use, and does nothing else."""
    package = ".".join(("jaxcompress", *path.parent.relative_to(PACKAGE).parts))
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "TYPE_CHECKING"
            (assignment,) = node.orelse
            # Type checkers and programs see the same names, from the same places.
            assert sorted(exports(node.body)) == sorted(attached(package, assignment))
            continue
        assert isinstance(node, ast.Expr | ast.Import | ast.ImportFrom | ast.Assign), node.lineno
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), node.lineno
        if isinstance(node, ast.Assign):
            assert ast.unparse(node.targets[0]) == "__version__", node.lineno
        if isinstance(node, ast.ImportFrom):
            pairs = {(node.module, alias.name) for alias in node.names}
            if not pairs <= TOOLS:
                exports([node])


@INITS
def test_every_export_is_there(path):
    package = ".".join(("jaxcompress", *path.parent.relative_to(PACKAGE).parts))
    module = importlib.import_module(package)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert hasattr(module, alias.name), f"{package}.{alias.name}"
                assert alias.name in dir(module)
    assert not hasattr(module, "no_such_name")


def test_a_wrong_name_is_an_attribute_error_that_knows_the_right_one():
    with pytest.raises(AttributeError, match="module 'jaxcompress' has no attribute 'grahp'") as e:
        _ = jaxcompress.grahp
    assert e.value.obj is jaxcompress and e.value.name == "grahp"
    with pytest.raises(ImportError, match="cannot import name 'from_torch'"):
        from jaxcompress.adapters import from_torch  # noqa: F401


def test_the_top_level_stays_small():
    names = [name for name in dir(jaxcompress) if not name.startswith("_")]
    own = [n for n in names if not inspect.ismodule(getattr(jaxcompress, n))]
    assert len(own) <= 15


DOORS = sorted(
    "jaxcompress." + ".".join(path.parent.relative_to(PACKAGE).parts)
    for path in PACKAGE.glob("*/*/__init__.py")
)


@pytest.mark.parametrize("name", DOORS)
def test_doors_say_what_they_give(name):
    """What a folder inside a package exports to other packages has a docstring."""
    for attribute, value in vars(importlib.import_module(name)).items():
        ours = getattr(value, "__module__", "").startswith("jaxcompress")
        if not attribute.startswith("_") and ours and callable(value):
            assert inspect.getdoc(value), f"{name}.{attribute}"
