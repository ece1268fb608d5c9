"""Write `docs/api.md`: every public name, with the first line of its docstring.

Run it by hand after a change of public names or their docstrings:

    python docs/make_api.py
"""

import ast
import importlib
import inspect
import pathlib
import types
from collections.abc import Iterator
from typing import Any

PAGE = pathlib.Path(__file__).with_name("api.md")
PARTS = (
    "tree", "adapters", "graph", "stats", "numerics", "linalg", "budget", "sparsity", "structured",
    "quantize", "lowrank", "distill", "train", "export", "report", "errors", "cli",
    "batches", "files", "lazy", "mappings", "meshes", "text",
)  # fmt: skip
HEAD = """# API reference

Every public name, by package, with the first line of its docstring; `help(jaxcompress.graph.trace)`
has the rest: formulas, shapes, arguments, errors, an example. `python docs/make_api.py` writes this
page.
"""


def write_page() -> str:
    """Write the whole page."""
    sections = [HEAD]
    for part in PARTS:
        module = importlib.import_module(f"jaxcompress.{part}")
        sections.append(write_section(part, module))
        for name, inner in list_submodules(module):
            sections.append(write_section(f"{part}.{name}", inner))
    return "\n".join(sections)


def write_section(title: str, module: types.ModuleType) -> str:
    """Write the table of one module."""
    rows = [f"| `{show_name(name, value)}` | {line} |" for name, value, line in list_names(module)]
    head = [
        f"## `{title}`",
        "",
        first_line(module.__doc__),
        "",
        "| name | what it is |",
        "|---|---|",
    ]
    return "\n".join([*head, *rows, ""])


def list_submodules(module: types.ModuleType) -> Iterator[tuple[str, types.ModuleType]]:
    """Iterate over the modules that a package exports, such as `quantize.presets`."""
    for name in sorted(dir(module)):
        value = getattr(module, name)
        exported = inspect.ismodule(value) and not name.startswith("_")
        if exported and value.__name__ == f"{module.__name__}.{name}" and not is_folder(value):
            yield name, value


def is_folder(module: types.ModuleType) -> bool:
    """Tell whether a module is a folder: its names are exported by the package around it."""
    return hasattr(module, "__path__")


def list_names(module: types.ModuleType) -> Iterator[tuple[str, Any, str]]:
    """Iterate over public names with their values and the first lines of their docstrings."""
    home = "jaxcompress" if is_folder(module) else module.__name__  # a file may import others
    for name in sorted(dir(module), key=lambda name: (name.lower(), name)):
        value = getattr(module, name)
        if name.startswith("_") or inspect.ismodule(value):
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            if value.__module__.startswith(home):
                yield name, value, first_line(inspect.getdoc(value))
        elif (line := find_constant(module, name)) is not None:
            yield name, value, line


def first_line(doc: str | None) -> str:
    """Give the first line of a docstring, fit for a table."""
    line = (doc or "").strip().split("\n")[0]
    return line.replace("\\|", "\\Vert ").replace("|", "\\|")  # a norm, then any other bar


def show_name(name: str, value: Any) -> str:
    """Write a function with its arguments, anything else by its name."""
    if not inspect.isfunction(value):
        return name
    words, starred = [], False
    for parameter in inspect.signature(value).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words.append("*")
            starred = True
        starred = starred or parameter.kind is parameter.VAR_POSITIONAL
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        words.append(stars.get(parameter.kind, "") + parameter.name)
    return f"{name}({', '.join(words)})"


def find_constant(module: types.ModuleType, name: str) -> str | None:
    """Find what the source says below the assignment of a name; `None` if it is imported."""
    source = find_source(module, name)
    body = ast.parse(pathlib.Path(source.__file__ or "").read_text()).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if name in list_assigned(node):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            return first_line(str(after.value.value)) if documented else ""
    return None


def list_assigned(statement: ast.stmt) -> list[str]:
    """List the names that a statement of a module assigns."""
    if not isinstance(statement, ast.Assign | ast.AnnAssign):
        return []
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return [
        node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)
    ]


def find_source(module: types.ModuleType, name: str) -> types.ModuleType:
    """Find the module that assigns a name which a package re-exports."""
    if not is_folder(module):
        return module
    for node in ast.parse(pathlib.Path(module.__file__ or "").read_text()).body:
        imports = node.names if isinstance(node, ast.ImportFrom) else []
        if any(alias.asname == name for alias in imports):
            return find_source(importlib.import_module(node.module), name)
    return module


if __name__ == "__main__":
    PAGE.write_text(write_page())
