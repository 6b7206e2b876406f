"""What loading the operator loads: never the runtime's weight."""

from __future__ import annotations

import subprocess
import sys


def loaded(module: str) -> set[str]:
    """Top-level modules after importing one in a fresh process."""
    code = f"import sys, {module}; print(*{{m.split('.')[0] for m in sys.modules}})"
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    return set(output.split())


def test_the_operator_loads_no_tensor_library() -> None:
    modules = loaded("tandem_operator.__main__")
    assert "kopf" in modules
    assert not modules & {"torch", "triton", "numpy", "gguf", "tokenizers", "fastapi"}


def test_of_the_runtime_the_operator_loads_the_contract_and_messages_alone() -> None:
    code = (
        "import sys, tandem_operator.__main__;"
        "print(*(m for m in sys.modules if m.startswith('tandem_runtime.')))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    messages = {"tandem_runtime.protocol", "tandem_runtime.device_report"}
    assert set(output.split()) == {"tandem_runtime.contract", *messages}
