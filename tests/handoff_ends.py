"""Both ends of the handoff with hash engines behind real sockets, and either end played by hand."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import pytest
from hash_engine import LAYOUT, HashRunner
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request, SampledToken, StreamOutput
from tandem_runtime.engine.stats import EngineStats
from tandem_runtime.kv import wire
from tandem_runtime.kv.handoff import handshake
from tandem_runtime.kv.handoff.connection import Connection
from tandem_runtime.kv.handoff.exporter import Exporter, Refusal
from tandem_runtime.kv.handoff.handshake import Identity
from tandem_runtime.kv.handoff.importer import Importer
from tandem_runtime.kv.handoff.lease import Timing
from tandem_runtime.protocol import GenerateRequest, PrefillTarget, Sampling
from tandem_runtime.serve.worker import EngineWorker

F = TypeVar("F")

SECRET = b"a secret of thirty-two bytes...."
PAGE_TOKENS = 32
PAGE_BYTES = PAGE_TOKENS * LAYOUT.token_bytes
PATIENT = Timing(lease_s=60.0, heartbeat_s=2.0, connect_s=20.0, grant_s=60.0)
"""Where nobody is to be given up, however busy the machine is."""
QUICK = Timing(lease_s=2.0, heartbeat_s=0.5, connect_s=2.0, grant_s=1.0)
"""Where somebody is; tests ask for it with `quick`."""
quick = pytest.mark.parametrize("timing", [QUICK])


def identity(pod: str, secret: bytes = SECRET, **changes: Any) -> Identity:
    layout = wire.Layout(
        pod=pod,
        revision="r1",
        layout_hash=hashlib.sha256(b"model").digest(),
        dtype=LAYOUT.dtype,
        layers=LAYOUT.layers,
        kv_heads=LAYOUT.kv_heads,
        head_dim=LAYOUT.head_dim,
        page_tokens=PAGE_TOKENS,
    )
    layout = msgspec.structs.replace(layout, **changes)
    return Identity(secret, layout, PAGE_BYTES, lambda: os.urandom(wire.NONCE_BYTES))


@dataclass
class Pod:
    """An engine in its thread; after a test it must be as empty as before."""

    worker: EngineWorker
    runner: HashRunner

    async def stats(self) -> EngineStats:
        return await self.worker.call(lambda engine: engine.stats())

    async def empty(self) -> None:
        """Waits until no stream is left, then checks that no block is missing."""

        def nothing_left(engine: Engine) -> bool | None:
            s = engine.stats()
            return s.running + s.waiting + s.receiving + s.held == 0 or None

        await asyncio.wait_for(self.worker.until(nothing_left), 20)
        assert (await self.stats()).held_blocks == 0
        await self.worker.call(lambda engine: engine.check_integrity())


@dataclass
class PrefillPod(Pod):
    exporter: Exporter
    port: int
    refusal: list[Refusal] = field(default_factory=list)

    @property
    def target(self) -> PrefillTarget:
        return PrefillTarget("prefill-0", "127.0.0.1", self.port)


@dataclass
class DecodePod(Pod):
    importer: Importer
    exporter: Exporter
    port: int
    running: dict[str, LocalStream]
    pauses_s: list[float]

    @property
    def target(self) -> PrefillTarget:
        return PrefillTarget(self.exporter.identity.layout.pod, "127.0.0.1", self.port)

    async def begin(self, ask: GenerateRequest) -> LocalStream:
        """A stream that is decoded here, prompt and all."""
        stream = self.running[ask.stream_id] = LocalStream(self, ask)
        request = Request(stream.request_id, ask.prompt_ids, ask.sampling, ask.output_ids)
        await self.worker.call(lambda engine: engine.add(request))
        return stream

    async def take_over(self, stream: LocalStream, source: PrefillTarget) -> LocalStream:
        """The stream as it goes on here, from what a gateway may know of it."""
        ask = msgspec.structs.replace(
            stream.ask,
            epoch=stream.ask.epoch + 1,
            output_ids=[*stream.ask.output_ids, *stream.ids],
            take_from=source,
        )
        mine = LocalStream(self, ask)
        request = Request(mine.request_id, ask.prompt_ids, ask.sampling, ask.output_ids)
        taken = await self.importer.take_over(request, ask)
        told = [SampledToken(t.token_id, t.logprob, t.top_logprobs) for t in taken.tokens]
        mine.tokens[:0] = told
        self.running[ask.stream_id] = mine
        return mine

    async def generate(self, ask: GenerateRequest) -> list[StreamOutput]:
        """All outputs of a stream, from its first token on."""
        request_id = f"{ask.stream_id}#{ask.epoch}"
        request = Request(request_id, ask.prompt_ids, ask.sampling, ask.output_ids)
        later: asyncio.Queue[StreamOutput] = asyncio.Queue()
        self.worker.route(request_id, lambda output, began_s: later.put_nowait(output))
        imported = await self.importer.receive(request, ask)
        assert not isinstance(imported, str)
        outputs = [imported.first]
        while outputs[-1].finish_reason is None:
            outputs.append(await asyncio.wait_for(later.get(), 20))
        return outputs


class LocalStream:
    """A stream that a pod decodes, with its tokens; `Running` to the handoff."""

    def __init__(self, pod: DecodePod, ask: GenerateRequest) -> None:
        self.ask = ask
        self.request_id = f"{ask.stream_id}#{ask.epoch}"
        self.tokens: list[SampledToken] = []
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """The finish reason, or the pod that it moved to."""
        self._pod = pod
        pod.worker.route(self.request_id, self._take)

    @property
    def known_tokens(self) -> int:
        return len(self.ask.prompt_ids) + len(self.ask.output_ids) + len(self.tokens)

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    def tokens_from(self, position: int) -> list[SampledToken]:
        begun = len(self.ask.prompt_ids) + len(self.ask.output_ids)
        return self.tokens[position - begun :]

    def moved(self, pod: str) -> None:
        self.ended.set_result(pod)

    def _take(self, output: StreamOutput, began_s: float) -> None:
        assert not self.ended.done(), "a token after the end"
        if output.token is not None:
            self.tokens.append(output.token)
        if output.finish_reason is not None:
            self.ended.set_result(output.finish_reason)


def ask(
    prompt_ids: list[int],
    target: PrefillTarget | None,
    *,
    stream: str = "s",
    epoch: int = 0,
    max_tokens: int = 5,
    **fields: Any,
) -> GenerateRequest:
    logprobs = fields.pop("logprobs", None)
    return GenerateRequest(
        stream_id=stream,
        epoch=epoch,
        prompt_ids=prompt_ids,
        sampling=Sampling(max_tokens=max_tokens, logprobs=logprobs),
        prefill=target,
        **fields,
    )


def ids(outputs: list[StreamOutput]) -> list[int]:
    return [output.token.token_id for output in outputs if output.token is not None]


async def eventually(condition: Callable[[], bool], within_s: float = 60) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - what is awaited here has no event
            await asyncio.sleep(0.005)


class Peer:
    """One end played by hand, past its handshake."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    async def send(self, frame: wire.AnyFrame, payload: bytes | None = None) -> None:
        view = None if payload is None else memoryview(payload)
        await self.connection.send(frame, view)

    async def expect(self, kind: type[F]) -> F:
        """The next frame that is no heartbeat."""
        while True:
            frame = (await asyncio.wait_for(self.connection.receive(), 20)).frame
            if not isinstance(frame, wire.Heartbeat) or kind is wire.Heartbeat:
                assert isinstance(frame, kind), frame
                return frame


class PlayedPrefill:
    """A listening prefill pod played by hand."""

    def __init__(self) -> None:
        self._accepted: asyncio.Queue[Connection] = asyncio.Queue()
        self._server: asyncio.Server | None = None
        self.target = PrefillTarget("prefill-0", "127.0.0.1", 0)

    async def start(self) -> None:
        def accept() -> Connection:
            connection = Connection()
            self._accepted.put_nowait(connection)
            return connection

        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.target = PrefillTarget("prefill-0", "127.0.0.1", port)

    async def peer(self) -> Peer:
        """The next decode pod that connects."""
        connection = await asyncio.wait_for(self._accepted.get(), 20)
        await handshake.welcome(connection, identity("prefill-0"))
        return Peer(connection)

    def stop(self) -> None:
        assert self._server is not None
        self._server.close()
