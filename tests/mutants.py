"""Do the tests notice when the library is wrong? A check that is run by hand, on Python 3.12.

    python tests/mutants.py record                # which test executes which line: the whole suite
    python tests/mutants.py record tests/linalg   # again, where tests are new
    python tests/mutants.py run --seed 0          # some 60 mutants, up to a few minutes each
    python tests/mutants.py run --seed 0 --again  # once more those that no test noticed

A mutant is the library with one small mistake: another operator, comparison, number or flag. They
are drawn by seed, at most one in a function, from each part of the library in proportion to what
could be mutated there; the same source and seed give the same mutants. For each, the tests that
execute the line run in a copy of the project until one fails; then those that execute its function
or its module, as long as the budget of seconds lasts. A mutant is noticed if a test fails that
passes without it. Results are appended to a file as they come, so a run that was stopped goes on.

What survives is either equivalent (no caller can tell it from the original) or lacks a test.
"""

import argparse
import collections
import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile

from mutations import Mutant, find_mutants

ROOT = pathlib.Path(__file__).parents[1]


def draw(mutants: list[Mutant], *, count: int, seed: int) -> list[Mutant]:
    """Draw about `count` mutants: from each part its share, at least one; one per function."""
    rng = random.Random(seed)
    parts = collections.defaultdict(list)
    for mutant in mutants:
        parts[mutant.part].append(mutant)
    drawn = []
    for found in parts.values():
        rng.shuffle(found)
        by_function = {(mutant.file, mutant.function): mutant for mutant in found}
        share = max(1, round(count * len(found) / len(mutants)))
        drawn += list(by_function.values())[:share]
    return drawn


@dataclasses.dataclass(frozen=True)
class Record:
    """What one test executed."""

    test: str
    seconds: float
    lines: dict[str, set[int]]


def read_record(folder: pathlib.Path) -> list[Record]:
    """Read what passing tests executed; of a test that was recorded twice, the latest."""
    rows = {}
    for file in sorted(folder.glob("lines-*.jsonl"), key=lambda file: file.stat().st_mtime):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            rows[row["test"]] = row
    return [
        Record(test, row["seconds"], {file: set(lines) for file, lines in row["lines"].items()})
        for test, row in rows.items()
        if row["passed"]
    ]


def find_lines(mutant: Mutant) -> set[int]:
    """The lines of which one is executed if the mutant matters to a test."""
    first, last = mutant.body
    return set(range(first, last + 1)) if mutant.at_import else {mutant.line}


def is_executed(mutant: Mutant, records: list[Record]) -> bool:
    return any(find_lines(mutant) & record.lines.get(mutant.file, set()) for record in records)


def choose_tests(mutant: Mutant, records: list[Record], *, budget: float) -> list[str]:
    """Choose tests that add up to at most `budget` seconds, the likeliest to fail first.

    Those that execute the line come before those that execute its function, then its module; among
    these, one from each test file in turn, the quickest first.
    """
    body = set(range(mutant.body[0], mutant.body[1] + 1))
    module = set[int]().union(*(record.lines.get(mutant.file, ()) for record in records))
    chosen: dict[str, float] = {}
    for wanted in (find_lines(mutant), body, module):
        by_file = collections.defaultdict(list)
        for record in records:
            if record.test not in chosen and wanted & record.lines.get(mutant.file, set()):
                by_file[record.test.partition("::")[0]].append(record)
        for rows in by_file.values():
            rows.sort(key=lambda record: record.seconds)
        for turn in itertools.zip_longest(*by_file.values()):
            for record in sorted(filter(None, turn), key=lambda record: record.seconds):
                if sum(chosen.values()) + record.seconds <= budget:
                    chosen[record.test] = record.seconds
    return list(chosen)


class Runner:
    """Runs tests in a copy of the project, so that the working tree is never written to."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.copy = folder / "project" / ROOT.name
        shutil.rmtree(self.copy.parent, ignore_errors=True)
        skipped = shutil.ignore_patterns(".*", "__pycache__", "*.png")
        shutil.copytree(ROOT, self.copy, ignore=skipped)
        data = ROOT.parent / "shared" / "data"
        paths = [str(self.copy), str(self.copy / "tests")]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAXCOMPRESS_DATA": os.environ.get("JAXCOMPRESS_DATA", str(data)),
        }

    def run(self, arguments: list[str], *, limit: float | None) -> tuple[int | None, str]:
        """Run pytest; its exit status (None: out of time) and what it printed."""
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *arguments],
            cwd=self.copy,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return process.returncode, output

    def try_mutant(self, mutant: Mutant, tests: list[str], *, limit: float) -> str | None:
        """Name the test that fails on the mutant, or None if all pass."""
        if not tests:
            return None
        path = self.copy / mutant.file
        compiled = pathlib.Path(importlib.util.cache_from_source(str(path)))
        source = path.read_bytes()
        path.write_bytes(mutant.apply(source))
        compiled.unlink(missing_ok=True)  # times and sizes alone do not tell mutants apart
        try:
            status, output = self.run(["-x", "-rfE", "--tb=no", *tests], limit=limit)
        finally:
            path.write_bytes(source)
            compiled.unlink(missing_ok=True)
        if status == 0:
            return None
        failed = find_failures(output)
        if status is not None and not any("::" in test for test in failed):
            if status in (4, 5):  # usage error, no tests: the record is of other tests
                raise RuntimeError(f"Record the tests anew: {output}")
            return f"exit status {status}"
        return failed[0] if failed else "no end"

    def find_unsound(self, tests: list[str]) -> list[str]:
        """List the tests that fail without a mutant, too."""
        status, output = self.run(["-rfE", "--tb=no", *tests], limit=None)
        if status not in (0, 1):
            raise RuntimeError(output)
        return find_failures(output)


def find_failures(output: str) -> list[str]:
    return re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, flags=re.MULTILINE)


def read_results(file: pathlib.Path) -> dict[str, dict]:
    """Read the results so far by mutant; the latest of each."""
    if not file.exists():
        return {}
    rows = map(json.loads, file.read_text().splitlines())
    return {row["mutant"]: row for row in rows}


def record_lines(folder: pathlib.Path, arguments: list[str]) -> int:
    """Run the suite, or the tests that are named, and note what each test executes."""
    lines = folder / "lines"
    lines.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAXCOMPRESS_EXECUTED_LINES": str(lines),
    }
    command = [sys.executable, "-m", "pytest", "-p", "executed_lines", "-n", "2", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def run_mutants(options: argparse.Namespace) -> None:
    """Run the mutants that are drawn and have no result yet, and report on all of them."""
    file = options.folder / f"results-{options.seed}.jsonl"
    done = read_results(file)
    records = read_record(options.folder / "lines")
    runner = Runner(options.folder)
    names = []
    for mutant in draw(find_mutants(ROOT), count=options.count, seed=options.seed):
        name = mutant.describe((ROOT / mutant.file).read_bytes())
        names.append(name)
        if name in done and not (options.again and not done[name]["noticed_by"]):
            continue
        tests = choose_tests(mutant, records, budget=options.budget)
        noticed_by = runner.try_mutant(mutant, tests, limit=2 * options.budget + 60)
        said = f"{len(tests)} tests" if is_executed(mutant, records) else "no test executes it"
        done[name] = {"mutant": name, "tests": said, "noticed_by": noticed_by}
        with file.open("a") as out:
            out.write(json.dumps(done[name], ensure_ascii=False) + "\n")
        print(f"{name}\n    {noticed_by or 'NOT NOTICED'} ({said})", flush=True)
    report([done[name] for name in names], runner)


def report(rows: list[dict], runner: Runner) -> None:
    """Print the share that is noticed and list the rest."""
    noticed = [row for row in rows if row["noticed_by"]]
    tests = {row["noticed_by"] for row in noticed if "::" in row["noticed_by"]}
    print(f"\n{len(noticed)} of {len(rows)} mutants noticed ({len(noticed) / len(rows):.0%})")
    for row in rows:
        if not row["noticed_by"]:
            print(f"{row['mutant']} ({row['tests']})")
    for test in runner.find_unsound(sorted(tests)):
        print(f"fails without a mutant: {test}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["record", "list", "run"])
    parser.add_argument("tests", nargs="*", help="record: tests to record (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60, help="how many mutants")
    parser.add_argument("--budget", type=float, default=90, help="seconds of tests for a mutant")
    parser.add_argument("--again", action="store_true", help="run what was not noticed again")
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        default=pathlib.Path(tempfile.gettempdir()) / "jaxcompress-mutants",
        help="where records and results are kept",
    )
    options = parser.parse_intermixed_args()
    if options.command == "record":
        sys.exit(record_lines(options.folder, options.tests))
    if options.command == "list":
        for mutant in draw(find_mutants(ROOT), count=options.count, seed=options.seed):
            print(mutant.describe((ROOT / mutant.file).read_bytes()))
    else:
        run_mutants(options)


if __name__ == "__main__":
    main()
