"""What a process loads is what it weighs: checked in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "triton", "transformers", "kopf", "gguf", "tandem_operator", "tandem")


@pytest.mark.parametrize(
    "module", ["tandem_runtime.gateway.__main__", "tandem_runtime.serve.__main__"]
)
def test_neither_torch_nor_kopf_is_loaded(module: str) -> None:
    """A pod loads torch only once it answers its probes."""
    program = (
        f"import json, sys, {module}; "
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(result.stdout) == []
