from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tandem.cluster.process import (
    ProcessId,
    end,
    identify,
    is_running,
    open_pidfd,
    send_signal,
    spawn_child,
    wait_gone,
)


def sleeper(*, stubborn: bool = False) -> tuple[subprocess.Popen[bytes], ProcessId]:
    script = "trap '' TERM; " if stubborn else ""
    process = subprocess.Popen(
        ["sh", "-c", f"{script}echo up; while :; do sleep 0.05; done"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    identity = identify(process.pid)
    assert identity is not None
    return process, identity


def test_a_process_is_its_pid_and_start_time() -> None:
    process, identity = sleeper()
    assert is_running(identity)
    impostor = ProcessId(identity.pid, identity.start_ticks + 1)
    assert not is_running(impostor)
    assert open_pidfd(impostor) is None
    assert not send_signal(impostor, signal.SIGKILL)
    assert process.poll() is None
    assert send_signal(identity, signal.SIGKILL)
    process.wait()
    assert not is_running(identity)


def test_a_zombie_does_not_run() -> None:
    process, identity = sleeper()
    process.kill()
    assert wait_gone([identity], 5) == []
    assert not is_running(identity)
    process.wait()


def test_a_name_with_parentheses_is_no_trap(tmp_path: Path) -> None:
    odd = tmp_path / "a) b (c"
    odd.symlink_to("/bin/sleep")
    process = subprocess.Popen([str(odd), "600"])
    time.sleep(0.05)
    identity = identify(process.pid)
    assert identity is not None
    assert identity.start_ticks > 0
    process.kill()
    process.wait()


def test_end_asks_first_and_insists_later() -> None:
    polite, polite_id = sleeper()
    stubborn, stubborn_id = sleeper(stubborn=True)
    begun_s = time.monotonic()
    end([polite_id, stubborn_id], grace_s=0.3)
    assert time.monotonic() - begun_s < 30
    assert polite.wait() == -signal.SIGTERM
    assert stubborn.wait() == -signal.SIGKILL


def test_wait_gone_tells_who_is_left() -> None:
    process, identity = sleeper()
    assert wait_gone([identity], 0.05) == [identity]
    process.kill()
    process.wait()
    assert wait_gone([identity], 0.05) == []


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    script = f"""
import os, time
from pathlib import Path
from tandem.cluster.process import spawn_child
child = spawn_child(["sleep", "600"], Path({str(tmp_path / "log")!r}), dict(os.environ))
print(child.pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = identify(int(parent.stdout.readline()))
    parent.stdout.close()
    assert child is not None
    parent.kill()
    parent.wait()
    assert wait_gone([child], 5) == []


def test_output_goes_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    environ = {**os.environ, "WORD": "hello"}
    child = spawn_child(["sh", "-c", "echo $WORD; echo err >&2"], log, environ)
    child.wait()
    assert log.read_text() == "hello\nerr\n"
