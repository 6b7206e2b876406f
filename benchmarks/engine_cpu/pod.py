"""A pod process that does both, and clients that stream from it over HTTP."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import aiohttp
from tandem_runtime import contract

from benchmarks.engine_cpu.players import PEERS, THREADS, Shape
from benchmarks.engine_cpu.prompts import prompts
from benchmarks.fleet import MODEL_URI, free_port

NAME = "smollm2"
READY_S = 240.0


@dataclass(frozen=True)
class PodProcess:
    """A pod that is ready."""

    name: str
    url: str
    handoff_port: int
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


@contextmanager
def pod(*flags: str, name: str = "local") -> Iterator[PodProcess]:
    """A pod with these flags; it ends with the context."""
    PEERS.mkdir(parents=True, exist_ok=True)
    ports = [free_port() for _ in range(3)]
    process = subprocess.Popen(
        [
            sys.executable, "-m", "tandem_runtime.serve", "--role=both", f"--model-uri={MODEL_URI}",
            f"--model-name={NAME}", "--dtype=bfloat16", f"--threads={THREADS}", "--host=127.0.0.1",
            f"--port={ports[0]}", f"--grpc-port={ports[1]}", f"--handoff-port={ports[2]}", *flags,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", contract.ENV_POD_NAME: name},
        stdout=(PEERS / f"pod-{name}.log").open("w"),
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{ports[0]}"
        asyncio.run(_wait_ready(url, process, name))
        yield PodProcess(name, url, ports[2], process)
    finally:
        process.terminate()
        process.wait()


async def _wait_ready(url: str, process: subprocess.Popen[bytes], name: str) -> None:
    deadline_s = time.monotonic() + READY_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline_s and process.poll() is None:
            try:
                async with session.get(url + contract.PATH_READY) as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.3)
    raise RuntimeError(f"the pod is not ready; {PEERS / f'pod-{name}.log'} may say why")


def play(url: str, shape: Shape, seed: int) -> float:
    """Seconds until the last stream has ended."""
    return asyncio.run(_play(url, shape, seed))


async def _play(url: str, shape: Shape, seed: int) -> float:
    async with aiohttp.ClientSession() as session:
        begun_s = time.perf_counter()
        await asyncio.gather(
            *(
                _stream(session, url, ids, shape.output_tokens)
                for ids in prompts(shape.requests, shape.prompt_tokens, seed)
            )
        )
        return time.perf_counter() - begun_s


async def _stream(
    session: aiohttp.ClientSession, url: str, ids: list[int], output_tokens: int
) -> None:
    body = {
        "model": NAME,
        "prompt": ids,
        "max_tokens": output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
    }
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        last = b""
        async for line in answer.content:
            last = line.strip() or last
        assert last == b"data: [DONE]", f"the stream ended with {last!r}"
