"""The GPU's benchmark is ready for the day a GPU is there: its dry run does all of its work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_dry_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "left out" not in done.stdout
    names = [target["name"] for target in json.loads(done.stdout.splitlines()[-1])["targets"]]
    for part in ("decode attention", "prefill attention", "decode step", "RMSNorm", "sampling"):
        assert any(name.startswith(part) for name in names), part


def test_without_a_gpu_it_says_what_to_do() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=Path(__file__).parents[2],
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "--dry-run" in done.stderr
