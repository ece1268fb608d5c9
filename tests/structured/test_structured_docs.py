"""The examples in docs/structured.md run and print what they say."""

import doctest
import pathlib

from jaxcompress.graph.dims import _rule

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "structured.md"


def test_the_page():
    text = PAGE.read_text()
    test = doctest.DocTestParser().get_doctest(text, {}, PAGE.name, str(PAGE), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    with _rule._RULES.isolate():  # take back the rule that the page registers
        runner.run(test)
    assert runner.tries > 20 and runner.failures == 0
