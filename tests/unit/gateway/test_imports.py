"""What a process loads is what it weighs: checked in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "triton", "transformers", "kopf", "tandem_operator", "tandem")


@pytest.mark.parametrize(
    ("process", "also"), [("gateway", ("gguf", "safetensors")), ("serve", ("kubernetes",))]
)
def test_neither_torch_nor_kopf_is_loaded(process: str, also: tuple[str, ...]) -> None:
    """A pod loads torch only once it answers its probes."""
    program = (
        f"import json, sys, tandem_runtime.{process}.__main__; "
        f"print(json.dumps([m for m in {HEAVY + also!r} if m in sys.modules]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(result.stdout) == []
