import pathlib
import re
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).with_name("sigkill.py")


def test_a_killed_run_resumes_bit_for_bit():
    """One trial of the script; run it by itself for more."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--trials", "1", "--kills", "1", "--seed", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"killed after steps \[\d+\], bit for bit equal", done.stdout)
