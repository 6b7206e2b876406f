"""`tandem demo`, as `make demo` runs it, and nothing left after `tandem down`."""

from __future__ import annotations

import re
import secrets
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from tandem.cluster.paths import ClusterDir


def tandem(*arguments: str, timeout_s: float = 400) -> str:
    answer = subprocess.run(
        [sys.executable, "-m", "tandem.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert answer.returncode == 0, answer.stderr + answer.stdout
    return answer.stdout


@pytest.fixture
def name() -> Iterator[str]:
    name = f"demo-{secrets.token_hex(3)}"
    yield name
    tandem("down", "--name", name)


@pytest.mark.timeout(900)
def test_from_nothing_to_an_answer_and_back(name: str) -> None:
    said = tandem("demo", "--name", name)
    assert "Paris" in said
    assert re.search(r"prefill pod +chat-prefill-\w+-0", said)
    assert re.search(r"decode pod +chat-decode-\w+-\d", said)
    moved = re.search(r"KV cache handed over +([\d,]+) bytes of (\d+) tokens", said)
    assert moved is not None
    # 30 layers, keys and values, 3 heads of 64 numbers of 2 bytes.
    assert int(moved[1].replace(",", "")) == int(moved[2]) * 30 * 2 * 3 * 64 * 2 > 0
    folder = ClusterDir.named(name).root
    assert f"export KUBECONFIG={folder}" in said
    tandem("down", "--name", name)
    left = [
        process.info
        for process in psutil.process_iter(["pid", "cmdline"])
        if any(str(folder) in word for word in process.info["cmdline"] or ())
    ]
    assert not left
    assert not folder.exists()
