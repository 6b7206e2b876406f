"""A pod of several ranks: processes that come, serve and go together."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from tandem_runtime import contract
from tandem_runtime.contract import Role

RANKS = 3
"""SmolLM2 has nine heads and three kv heads."""
LIVENESS_S = 60.0


def alive(pid: int) -> bool:
    """Whether the process runs, or sleeps, or is stopped; a zombie has ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rsplit(")", 1)[1].split()[0] not in "ZX"


def followers(pod: Any) -> list[int]:
    """Of ranks 1, 2, ... in order: they are started so."""
    pids: list[int] = []
    for task in Path(f"/proc/{pod.process.pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended
            pids += map(int, (task / "children").read_text().split())
    return sorted(pids)


def wait_gone(pids: list[int]) -> None:
    deadline_s = time.monotonic() + LIVENESS_S
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline_s, f"of {pids} some are left"
        time.sleep(0.05)


def start(start_pod: Any, *flags: str, wait: bool = True) -> Any:
    small = ("--max-batch-tokens", "32", "--max-running", "4")
    return start_pod(
        "both-0", Role.BOTH, "--tensor-parallel", str(RANKS), *small, *flags, wait=wait
    )


def test_ranks_answer_as_one_does_and_leave_no_process(
    start_pod: Any, both_pod: Any, traced_chat: Any
) -> None:
    pod = start(start_pod)
    pids = followers(pod)
    question = "What is the capital of France?"
    answers = [traced_chat(p.url, question, 8)["choices"] for p in (pod, both_pod)]
    assert answers[0] == answers[1]
    for pid in pids:  # as a terminal does: everybody hears of it, and rank 0 decides
        os.kill(pid, signal.SIGTERM)
    pod.process.send_signal(signal.SIGTERM)
    assert pod.process.wait(LIVENESS_S) == 0
    wait_gone(pids)
    assert not re.search("Traceback|ended with", pod.log.read_text())


def test_a_rank_that_dies_while_the_model_loads(start_pod: Any) -> None:
    pod = start(start_pod, wait=False)
    deadline_s = time.monotonic() + LIVENESS_S
    while len(pids := followers(pod)) < RANKS - 1:
        assert time.monotonic() < deadline_s, "no ranks were started"
        time.sleep(0.05)
    os.kill(pids[0], signal.SIGKILL)
    assert pod.process.wait(LIVENESS_S) == 1
    last = pod.log.read_text().strip().splitlines()[-1]
    assert last == "the engine failed: rank 1 of 3 ended with signal 9."
    wait_gone(pids)


class Stream:
    """A long answer, read in a thread."""

    def __init__(self, url: str) -> None:
        self.text = ""
        self.begun = threading.Event()
        self._url = f"{url}/v1/completions"
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        body = {"model": "smollm2-135m", "prompt": "One", "max_tokens": 2000, "ignore_eos": True}
        with httpx.stream("POST", self._url, json=body | {"stream": True}, timeout=300) as reply:
            for line in reply.iter_lines():
                self.text += line
                self.begun.set()

    def end(self) -> str:
        self._thread.join(LIVENESS_S)
        assert not self._thread.is_alive()
        return self.text


def test_a_rank_that_hangs_and_one_that_dies(start_pod: Any) -> None:
    """Unhealthy while a step hangs; down, with the culprit's name, when a rank is gone."""
    pod = start(start_pod, "--watchdog-seconds", "3")
    pids = followers(pod)
    stream = Stream(pod.url)
    assert stream.begun.wait(LIVENESS_S)
    os.kill(pids[0], signal.SIGSTOP)
    deadline_s = time.monotonic() + LIVENESS_S
    while httpx.get(pod.url + contract.PATH_HEALTH, timeout=20).status_code != 503:
        assert time.monotonic() < deadline_s, "a step hangs, and the pod says that it is healthy"
        time.sleep(0.2)
    os.kill(pids[1], signal.SIGKILL)
    assert pod.process.wait(LIVENESS_S) == 1
    answer = stream.end()
    assert "error" in answer
    assert "[DONE]" not in answer
    last = pod.log.read_text().strip().splitlines()[-1]
    assert last == "the engine failed: rank 2 of 3 ended with signal 9."
    wait_gone(pids)  # the stopped one too, which reads no channel that closes
