"""The short form of tests/campaign.py: some of its cases."""

import re
import subprocess
import sys

import toy


def test_campaign():
    """Nothing fails, each part ran, and every kind of outcome was seen."""
    flags = ["--short", "--kills", 1, "--datasets", 30, "--runs", 15]
    command = [sys.executable, toy.ROOT / "tests" / "campaign.py", *flags]
    result = subprocess.run([*map(str, command)], text=True, capture_output=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    outcomes = [
        "SIGKILL at a line that writes",
        "SIGKILL at an iteration",
        "SIGKILL at a random moment, twice",
        "SIGHUP at a random moment",
    ]
    outcomes += ["refused, called wrong by --check", "trained, not called wrong", "went on as if nothing was"]
    for outcome in outcomes:
        assert re.search(rf"{outcome}.* [1-9]", result.stdout), result.stdout
