"""The examples in docs/structured.md run and print what they say."""

import doctest
import pathlib

from jaxcompress.graph.dims import _rule as _dims_step

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "structured.md"


def test_the_page():
    text = PAGE.read_text()
    test = doctest.DocTestParser().get_doctest(text, {}, PAGE.name, str(PAGE), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    before = dict(_dims_step._RULES)
    try:
        runner.run(test)
    finally:  # take back the rule that the page registers
        _dims_step._RULES.clear()
        _dims_step._RULES.update(before)
    assert runner.tries > 20 and runner.failures == 0
