"""Gateways as processes, over a Kubernetes API server that is played."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from played_api import PlayedApi, kubeconfig
from tandem_runtime import contract


async def _cancel_all() -> None:
    """Watches of gateways that are gone."""
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)


class ApiThread:
    """A played API server in a thread of its own."""

    def __init__(self) -> None:
        self.api = PlayedApi()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.call(self.api.start())

    def call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def send(self, kind: str, shown: dict[str, Any]) -> None:
        self.api.events.put_nowait({"type": kind, "object": shown})

    def close(self) -> None:
        self.api.events.put_nowait(None)
        with contextlib.suppress(Exception):
            self.call(self.api.stop())
        self.call(_cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def start_gateway(folder: Path, api: ApiThread, port: int) -> subprocess.Popen[bytes]:
    (folder / "config").write_text(kubeconfig(api.api.port))
    arguments = ["--namespace", "ns", "--kubeconfig", str(folder / "config"), "--port", str(port)]
    arguments += ["--grpc-port", "0", "--handoff-secret-file", str(folder / "secret")]
    return subprocess.Popen([sys.executable, "-m", "tandem_runtime.gateway", *arguments])


def ready(url: str) -> int | None:
    try:
        return httpx.get(url + contract.PATH_READY, timeout=5).status_code
    except httpx.TransportError:
        return None


def until(condition: Any, within_s: float = 60) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
