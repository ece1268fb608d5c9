"""Rules by primitive: what is known of primitives is registered on their names."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Rule = TypeVar("Rule")
Given = TypeVar("Given")


class Rules(Generic[Rule]):
    """Rules by the name of a primitive; the last one that is registered counts.

    Args:
        make: Makes a rule of what is registered; that itself by default.

    Example:
        >>> rules = Rules()
        >>> @rules.register("sin", "cos")
        ... def rule(x):
        ...     return x
        >>> rules.get("cos") is rule, rules.get("tan")
        (True, None)
    """

    def __init__(self, make: Callable[..., Rule] = lambda rule: rule):
        self._make, self._rules = make, dict[str, Rule]()

    def register(self, *primitives: str) -> Callable[[Given], Given]:
        """Make a decorator that registers a rule for primitives, and returns what it got."""

        def register(given: Given) -> Given:
            for name in primitives:
                self._rules[name] = self._make(given)
            return given

        return register

    @contextmanager
    def isolate(self) -> Iterator[None]:
        """Take back, when the block ends, what is registered in it."""
        before = dict(self._rules)
        try:
            yield
        finally:
            self._rules = before

    def get(self, primitive: str) -> Rule | None:
        """Give the rule of a primitive, if there is one."""
        return self._rules.get(primitive)
