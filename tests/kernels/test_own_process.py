"""Runs the other tests of this folder in a process whose Triton interprets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def test_kernels_equal_their_references_in_the_interpreter() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(Path(__file__).parent),
            "-q",
            "-p",
            "no:cacheprovider",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 50, "most of the tests were not collected"
    assert "skipped" not in done.stdout
