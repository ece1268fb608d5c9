"""A pytest plugin that records which lines of the library each test executes.

`tests/mutants.py record` loads it by `-p executed_lines`. Python's own monitoring (3.12) reports a
line once and is then silent until the next test, so that recording costs little. Every process
appends to a file of its own one JSON object per test: its id, the seconds it took, whether it
passed, and the lines by file. What a shared fixture executed counts for each test that uses it.
"""

import collections
import json
import os
import pathlib
import sys
import types
from typing import Any

import jax
import pytest

FOLDER = "JAXCOMPRESS_EXECUTED_LINES"
"""The environment variable that names the folder to write to."""

Lines = dict[str, set[int]]


class Recorder:
    """The hooks: what runs between the start and the end of a test belongs to that test."""

    def __init__(self, folder: pathlib.Path, root: pathlib.Path) -> None:
        self.file = folder / f"lines-{os.getpid()}.jsonl"
        self.root = root
        self.monitoring: Any = vars(sys)["monitoring"]  # from Python 3.12 on
        self.library = str(root / "jaxcompress") + os.sep
        self.lines: Lines = collections.defaultdict(set)
        self.of_fixture: dict[tuple[str, str], Lines] = {}
        self.seconds, self.passed = 0.0, True
        self.test_file = None

    def start(self) -> None:
        """Listen to lines of code objects of the library, each from its first call on."""
        monitoring = self.monitoring
        tool = monitoring.COVERAGE_ID
        monitoring.use_tool_id(tool, "executed lines")

        def note_call(code: types.CodeType, _: int) -> object:
            if code.co_filename.startswith(self.library):
                monitoring.set_local_events(tool, code, monitoring.events.LINE)
            return monitoring.DISABLE

        def note_line(code: types.CodeType, line: int) -> object:
            self.lines[code.co_filename].add(line)
            return monitoring.DISABLE

        monitoring.register_callback(tool, monitoring.events.PY_START, note_call)
        monitoring.register_callback(tool, monitoring.events.LINE, note_line)
        monitoring.set_events(tool, monitoring.events.PY_START)

    def restart(self) -> None:
        self.lines = collections.defaultdict(set)
        self.monitoring.restart_events()

    def add(self, lines: Lines) -> None:
        for file, found in lines.items():
            self.lines[file] |= found

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        if item.path != self.test_file:  # jitted functions are traced anew in each file
            jax.clear_caches()
            self.test_file = item.path
        self.seconds, self.passed = 0.0, True
        self.restart()
        done = yield
        names = getattr(item, "fixturenames", ())
        for (folder, name), lines in self.of_fixture.items():
            if name in names and item.nodeid.startswith(folder):
                self.add(lines)
        self.write(item.nodeid)
        return done

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef):
        if fixturedef.scope == "function":
            return (yield)
        before = self.lines
        self.restart()
        try:
            return (yield)
        finally:
            where = fixturedef.baseid, fixturedef.argname
            own = self.of_fixture.setdefault(where, collections.defaultdict(set))
            for file, found in self.lines.items():
                own[file] |= found
            self.add(before)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        self.seconds += report.duration
        self.passed &= report.passed
        return report

    def write(self, test: str) -> None:
        lines = {
            str(pathlib.Path(file).relative_to(self.root)): sorted(found)
            for file, found in sorted(self.lines.items())
        }
        row = {"test": test, "seconds": self.seconds, "passed": self.passed, "lines": lines}
        with self.file.open("a") as out:
            out.write(json.dumps(row) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Record if a folder is named; the process that hands tests to workers has nothing to write."""
    if FOLDER in os.environ:
        recorder = Recorder(pathlib.Path(os.environ[FOLDER]), config.rootpath)
        recorder.start()
        config.pluginmanager.register(recorder)
