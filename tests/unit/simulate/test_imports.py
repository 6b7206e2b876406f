"""`tandem plan` and `tandem simulate` need the client's packages alone."""

from __future__ import annotations

import subprocess
import sys


def test_plan_and_simulate_load_neither_half_whole() -> None:
    program = (
        "import sys, tandem.plan.commands, tandem.simulate.commands;"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(answer.stdout.split())
    assert "tandem" in loaded
    assert not loaded & {"torch", "kopf", "kubernetes", "numpy", "matplotlib", "fastapi", "aiohttp"}
