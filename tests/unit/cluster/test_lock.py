from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from tandem.cluster.lock import lock

HOLD = """
import sys, time
from tandem.cluster.lock import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "tandem" / "clusters"


def holder(name: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, name, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.stdout.close()
    return process


def test_the_same_name_waits(home: Path) -> None:
    process = holder("a", 0.5)
    begun_s = time.monotonic()
    with lock("a"):
        assert time.monotonic() - begun_s > 0.2
    process.wait()


def test_another_name_does_not(home: Path) -> None:
    process = holder("a", 600)
    begun_s = time.monotonic()
    with lock("b"):
        assert time.monotonic() - begun_s < 60
    process.kill()
    process.wait()


def test_a_killed_holder_holds_nothing(home: Path) -> None:
    process = holder("a", 600)
    process.kill()
    process.wait()
    with lock("a"):
        pass
    assert [path.name for path in home.iterdir()] == [".lock"]
