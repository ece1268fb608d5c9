"""The code of docs/graph.md runs as it is written, from top to bottom in one session."""

import contextlib
import doctest
import pathlib
import re

import pytest

from jaxcompress.graph.program import _constructs
from jaxcompress.graph.sites import _sites, _views

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "graph.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def session():
    """Run every block; doctests are only parsed and run where they have prompts."""
    scope, examples, failures = {}, 0, []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
    with contextlib.ExitStack() as stack:  # take back what the page registers
        for rules in (_views._RULES, _sites._RULES, _constructs._CONSTRUCTS):
            stack.enter_context(rules.isolate())
        for number, block in enumerate(BLOCKS):
            if not block.startswith(">>>"):
                exec(compile(block, f"docs/graph.md, block {number}", "exec"), scope)
                continue
            test = doctest.DocTestParser().get_doctest(block, {}, f"block {number}", None, None)
            test.globs = scope
            runner.run(test, out=failures.append, clear_globs=False)
            examples += len(test.examples)
    return scope, examples, failures


def test_the_page_runs(session):
    _, examples, failures = session
    assert not failures, "".join(failures)
    assert examples >= 15


def test_each_kind_of_rule_has_an_example(session):
    scope, _, _ = session
    assert {"follow_qr", "contract_fast_dot", "CustomVmap"} <= set(scope)
    assert _views.view_rule("qr") is not scope["follow_qr"]
    assert _sites.site_rule("fast_dot") is None
