"""Pods of both roles on real sockets; after each test they must be empty."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import pytest
from handoff_ends import (
    PATIENT,
    SECRET,
    DecodePod,
    LocalStream,
    Peer,
    PlayedPrefill,
    PrefillPod,
    identity,
)
from hash_engine import HashRunner, hash_engine
from small_vocabulary import byte_bundle
from tandem_runtime.engine.grammar import Grammars
from tandem_runtime.kv.handoff import handshake
from tandem_runtime.kv.handoff.connection import connect
from tandem_runtime.kv.handoff.exporter import Exporter, Refusal
from tandem_runtime.kv.handoff.importer import Importer
from tandem_runtime.kv.handoff.lease import Timing
from tandem_runtime.serve.worker import EngineWorker

Make = Callable[..., Any]


@pytest.fixture
def timing() -> Timing:
    return PATIENT


@pytest.fixture
async def make_prefill(timing: Timing) -> AsyncIterator[Make]:
    pods: list[PrefillPod] = []

    async def make(
        *, secret: bytes = SECRET, name: str = "prefill-0", layout: Any = None, **options: Any
    ) -> PrefillPod:
        blocks = options.pop("blocks", 64)
        runner = HashRunner(blocks + 1, options.pop("step_s", 0.0))
        worker = EngineWorker()
        refusal: list[Refusal] = []
        exporter = Exporter(
            worker,
            identity(name, secret, **(layout or {})),
            Grammars(byte_bundle().tokenizer_json, 256, ()),
            lambda: refusal[0] if refusal else None,
            timing,
        )
        await worker.start(partial(hash_engine, blocks=blocks, runner=runner, **options))
        port = await exporter.listen("127.0.0.1", 0)
        pods.append(PrefillPod(worker, runner, exporter, port, refusal))
        return pods[-1]

    yield make
    for pod in pods:
        await pod.exporter.close()
        await pod.empty()
        await pod.worker.stop()


@pytest.fixture
async def make_decode(timing: Timing) -> AsyncIterator[Make]:
    pods: list[DecodePod] = []

    async def make(
        *, secret: bytes = SECRET, name: str = "decode-0", layout: Any = None, **options: Any
    ) -> DecodePod:
        blocks = options.pop("blocks", 64)
        runner = HashRunner(blocks + 1, options.pop("step_s", 0.0))
        worker = EngineWorker()
        await worker.start(partial(hash_engine, blocks=blocks, runner=runner, **options))
        mine = identity(name, secret, **(layout or {}))
        running: dict[str, LocalStream] = {}
        pauses_s: list[float] = []
        exporter = Exporter(
            worker,
            mine,
            Grammars(byte_bundle().tokenizer_json, 256, ()),
            lambda: Refusal("bad_request", "this pod computes no prompts for others"),
            timing,
            find=lambda stream, epoch: running.get(stream) or Refusal("not_moved", "unknown here"),
            on_moved=pauses_s.append,
        )
        port = await exporter.listen("127.0.0.1", 0)
        importer = Importer(worker, mine, timing)
        pods.append(DecodePod(worker, runner, importer, exporter, port, running, pauses_s))
        return pods[-1]

    yield make
    for pod in pods:
        await pod.importer.close()
        await pod.exporter.close()
        await pod.empty()
        await pod.worker.stop()


@pytest.fixture
async def play_decode() -> AsyncIterator[Callable[[PrefillPod], Any]]:
    peers: list[Peer] = []

    async def play(pod: PrefillPod) -> Peer:
        connection = await connect("127.0.0.1", pod.port, 1)
        await handshake.greet(connection, identity("decode-9"), "prefill-0")
        peers.append(Peer(connection))
        return peers[-1]

    yield play
    for peer in peers:
        peer.connection.abort("the test is over")


@pytest.fixture
async def played_prefill() -> AsyncIterator[PlayedPrefill]:
    played = PlayedPrefill()
    await played.start()
    yield played
    played.stop()
