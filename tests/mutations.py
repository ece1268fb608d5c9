"""The small mistakes that `tests/mutants.py` makes in the library: where, and what becomes of it.

Each is an edit of a few bytes, found by `ast`: another arithmetic operator or comparison, `and` for
`or`, no `not`, a small number plus one, an axis at the other end, the other flag, `max` for `min`.
Annotations, decorators, assertions, messages and the `__init__` files are left alone.
"""

import ast
import dataclasses
import itertools
import pathlib
import re

OPERATORS: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "%"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
}
COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
FUNCTIONS = {"min": "max", "maximum": "minimum", "argmin": "argmax"}
FUNCTIONS |= {other: name for name, other in FUNCTIONS.items()}
LARGEST = 16
"""Larger numbers are tuning, not axes or counts."""
UNINTERESTING = {"stacklevel", "maxsize", "indent"}
TEXT = ast.JoinedStr | ast.List | ast.Tuple | ast.ListComp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """One mistake: the bytes `start:end` of a file become `text`."""

    file: str
    start: int
    end: int
    text: str
    line: int
    function: str
    body: tuple[int, int]
    """First and last line of the function, class or module around it."""
    at_import: bool
    """Whether the line runs when the module is imported or the function is defined."""

    @property
    def part(self) -> str:
        """The subpackage, or the package for its own modules."""
        return pathlib.PurePath(self.file).parts[:-1][:2][-1]

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]

    def describe(self, source: bytes) -> str:
        """Give `file:line: before -> after`, the line in which the mistake is."""
        number = source.count(b"\n", 0, self.start) + 1
        first = source.rfind(b"\n", 0, self.start) + 1
        last = source.find(b"\n", self.end)
        before = source[first:last].decode().strip()
        changed = self.apply(source)
        after = changed[first : last + len(changed) - len(source)].decode().strip()
        return f"{self.file}:{number}: {before} -> {after}"


class Finder(ast.NodeVisitor):
    """Collects the mutants of one file; passes over annotations, decorators and messages.

    >>> source = b"y = x - k < x.max(axis=0) and not x[:, -1]\\n"
    >>> for mutant in Finder("some.py", source).found:
    ...     print(mutant.apply(source).decode(), end="")
    y = x - k < x.max(axis=0) or not x[:, -1]
    y = x - k <= x.max(axis=0) and not x[:, -1]
    y = x + k < x.max(axis=0) and not x[:, -1]
    y = x - k < x.min(axis=0) and not x[:, -1]
    y = x - k < x.max(axis=-1) and not x[:, -1]
    y = x - k < x.max(axis=0) and x[:, -1]
    y = x - k < x.max(axis=0) and not x[:, 0]
    """

    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source, self.found = file, source, list[Mutant]()
        lines = source.splitlines(keepends=True)
        self.offsets = [0, *itertools.accumulate(map(len, lines))]
        self.function, self.body, self.at_import = "", (1, len(lines)), True
        self.visit(ast.parse(source))

    def span(self, node: ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = self.offsets[node.lineno - 1] + node.col_offset
        return start, self.offsets[node.end_lineno - 1] + node.end_col_offset

    def add(self, line: int, start: int, end: int, text: str) -> None:
        where = {"function": self.function, "body": self.body, "at_import": self.at_import}
        self.found.append(
            Mutant(file=self.file, start=start, end=end, text=text, line=line, **where)
        )

    def swap_between(self, left: ast.expr, right: ast.expr, old: str, new: str) -> None:
        """Replace the operator that stands between two operands."""
        start, end = self.span(left)[1], self.span(right)[0]
        gap = self.source[start:end].decode()
        match = re.search(r"\s+".join(map(re.escape, old.split())), gap)
        if match and "#" not in gap:
            self.add(left.lineno, start + match.start(), start + match.end(), new)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = self.function, self.body, self.at_import
        self.function = f"{self.function}.{node.name}:{node.lineno}"
        self.body, self.at_import = (node.body[0].lineno, node.end_lineno or 0), True
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit_number(default)
            self.visit(default)
        self.at_import = False
        for statement in node.body:
            self.visit(statement)
        self.function, self.body, self.at_import = outer

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self.body = self.body, (node.lineno, node.end_lineno or 0)
        for statement in node.body:
            self.visit(statement)
        self.body = outer

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        """Leave messages alone."""

    def visit_Assert(self, node: ast.Assert) -> None:
        """Leave alone what holds in any case."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Leave texts alone."""

    def visit_BinOp(self, node: ast.BinOp) -> None:
        operands = (node.left, node.right)
        joins = any(
            isinstance(x, TEXT) or (isinstance(x, ast.Constant) and isinstance(x.value, str))
            for x in operands
        )
        if type(node.op) in OPERATORS and not joins:
            self.swap_between(*operands, *OPERATORS[type(node.op)])
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in OPERATORS and not isinstance(node.value, TEXT):
            old, new = OPERATORS[type(node.op)]
            self.swap_between(node.target, node.value, f"{old}=", f"{new}=")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, op, right in zip(
            [node.left, *node.comparators], node.ops, node.comparators, strict=False
        ):
            self.swap_between(left, right, *COMPARISONS[type(op)])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in itertools.pairwise(node.values):
            self.swap_between(left, right, old, new)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            start, end = self.span(node)
            gap = re.match(rb"not\s*", self.source[start:end])
            assert gap
            self.add(node.lineno, start, start + gap.end(), "")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name == "warn":
            return
        if name in FUNCTIONS:
            end = self.span(node.func)[1]
            self.add(node.func.end_lineno or 0, end - len(name), end, FUNCTIONS[name])
        for argument in node.args:
            self.visit_number(argument)
        for keyword in node.keywords if name != "zip" else ():  # its flag only asserts
            if keyword.arg not in UNINTERESTING:
                self.visit_number(keyword.value, is_axis=keyword.arg in ("axis", "axes"))
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit_number(node.slice)
        self.generic_visit(node)

    def visit_number(self, node: ast.expr, *, is_axis: bool = False) -> None:
        """Change a flag or a small number: -1 becomes 0, and n becomes n + 1 (the axis 0, -1)."""
        match node:
            case ast.Tuple():
                inner = node.elts
            case ast.Slice():
                inner = [x for x in (node.lower, node.upper, node.step) if x is not None]
            case ast.Constant(value=bool(value)):
                return self.add(node.lineno, *self.span(node), str(not value))
            case ast.Constant(value=int(value)) if value <= LARGEST:
                text = "-1" if is_axis and value == 0 else str(value + 1)
                return self.add(node.lineno, *self.span(node), text)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))):
                text = "0" if value == 1 else str(1 - value)
                return self.add(node.lineno, *self.span(node), text)
            case _:
                return None
        for element in inner:
            self.visit_number(element, is_axis=is_axis)
        return None


def find_mutants(root: pathlib.Path) -> list[Mutant]:
    """List all mutants, in the order of files and nodes."""
    files = sorted((root / "jaxcompress").rglob("*.py"))
    return [
        mutant
        for file in files
        if file.name != "__init__.py"
        for mutant in Finder(str(file.relative_to(root)), file.read_bytes()).found
    ]
