"""Connections and handshakes over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tandem_runtime.kv import wire
from tandem_runtime.kv.handoff import handshake
from tandem_runtime.kv.handoff.connection import Connection, ConnectionLost, connect
from tandem_runtime.kv.handoff.handshake import HandshakeFailed, Identity

PAGE_BYTES = 1 << 20
SECRET = b"a secret of thirty-two bytes...."
LAYOUT = wire.Layout(
    pod="",
    revision="r1",
    layout_hash=hashlib.sha256(b"model").digest(),
    dtype="float32",
    layers=2,
    kv_heads=1,
    head_dim=8,
    page_tokens=256,
)


def identity(pod: str, secret: bytes = SECRET, **changes: object) -> Identity:
    layout = msgspec.structs.replace(LAYOUT, pod=pod, **changes)
    return Identity(secret, layout, PAGE_BYTES, lambda: os.urandom(wire.NONCE_BYTES))


class Listener:
    """Accepts connections; each is given to `serve`."""

    def __init__(self) -> None:
        self.accepted: asyncio.Queue[Connection] = asyncio.Queue()
        self.port = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        def accept() -> Connection:
            connection = Connection()
            self.accepted.put_nowait(connection)
            return connection

        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        while not self.accepted.empty():
            self.accepted.get_nowait().abort("the test is over")


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    listener = Listener()
    await listener.start()
    yield listener
    await listener.stop()


@pytest.fixture
async def pair(listener: Listener) -> AsyncIterator[tuple[Connection, Connection]]:
    here = await connect("127.0.0.1", listener.port, 1)
    there = await listener.accepted.get()
    for end in (here, there):
        end.trust(PAGE_BYTES)
    yield here, there
    here.abort("the test is over")
    there.abort("the test is over")


Pair = tuple[Connection, Connection]


class TestConnection:
    async def test_frames_and_payloads_arrive_in_order(self, pair: Pair) -> None:
        here, there = pair
        payload = os.urandom(PAGE_BYTES)
        await here.send(wire.Ack("s", 1))
        await here.send(wire.Pages("s", 1, 0, 256, 9), memoryview(payload))
        await here.send(wire.Ack("s", 2))
        received = [await there.receive() for _ in range(3)]
        assert [r.frame for r in received] == [
            wire.Ack("s", 1),
            wire.Pages("s", 1, 0, 256, 9),
            wire.Ack("s", 2),
        ]
        assert received[1].payload == payload

    async def test_a_reader_that_stops_stops_the_writer(self, pair: Pair) -> None:
        here, there = pair
        payload = memoryview(bytes(PAGE_BYTES))
        sent = 0

        async def flood() -> None:
            nonlocal sent
            for n in range(500):
                await here.send(wire.Pages("s", 1, n, 1, 0), payload)
                sent += 1

        flooding = asyncio.create_task(flood())
        await asyncio.sleep(0.5)
        assert sent < 100, "half a gigabyte went into a socket that nobody reads"
        for n in range(500):
            assert (await there.receive()).frame == wire.Pages("s", 1, n, 1, 0)
        await flooding

    async def test_what_was_sent_before_closing_arrives(self, pair: Pair) -> None:
        here, there = pair
        await here.send(wire.Refused("no"))
        here.close()
        assert (await there.receive()).frame == wire.Refused("no")
        with pytest.raises(ConnectionLost, match="the peer closed"):
            await there.receive()
        with pytest.raises(ConnectionLost):
            await there.send(wire.Ack("s", 1))

    async def test_a_writer_that_waits_is_told_of_the_loss(self, pair: Pair) -> None:
        here, there = pair
        payload = memoryview(bytes(PAGE_BYTES))

        async def flood() -> None:
            while True:
                await here.send(wire.Pages("s", 1, 0, 1, 0), payload)

        flooding = asyncio.create_task(flood())
        await asyncio.sleep(0.2)
        there.abort("gone")
        with pytest.raises(ConnectionLost):
            await asyncio.wait_for(flooding, 20)

    async def test_nobody_there(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            port = unused.getsockname()[1]
        with pytest.raises(ConnectionLost, match=f"127.0.0.1:{port} cannot be reached"):
            await connect("127.0.0.1", port, 1)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_on_either_event_loop(run: Callable[..., None]) -> None:
    """Pods run on uvloop, whose transports are no subclasses of asyncio's."""

    async def scenario() -> None:
        listener = Listener()
        await listener.start()
        here = await connect("127.0.0.1", listener.port, 1)
        there = await listener.accepted.get()
        for end in (here, there):
            end.trust(PAGE_BYTES)
        payload = os.urandom(PAGE_BYTES)
        for n in range(50):
            await here.send(wire.Pages("s", 1, n, 1, 0), memoryview(payload))
            received = await there.receive()
            assert received.frame == wire.Pages("s", 1, n, 1, 0)
            assert received.payload == payload
        assert here.peer == f"127.0.0.1:{listener.port}"
        here.abort("done")
        with pytest.raises(ConnectionLost):
            await there.receive()
        await listener.stop()

    run(scenario())


class TestGarbage:
    @given(data=st.binary(min_size=1, max_size=300))
    @settings(
        max_examples=50,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    async def test_a_stranger_cannot_make_a_pod_hang_or_reserve_memory(
        self, listener: Listener, data: bytes
    ) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        served = asyncio.create_task(
            handshake.welcome(await listener.accepted.get(), identity("prefill-0"))
        )
        writer.write(data)
        writer.write_eof()
        with pytest.raises((HandshakeFailed, ConnectionLost)):
            await asyncio.wait_for(served, 20)
        with contextlib.suppress(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 20)
        writer.close()

    async def test_an_announced_length_reserves_nothing(self, pair: Pair) -> None:
        here, there = pair
        there._limits = wire.STRANGER
        assert here._transport is not None
        here._transport.write(wire.PREFIX.pack(wire.MAGIC, 2**31, 2**31))
        with pytest.raises(ConnectionLost, match=r"2147483648 bytes; 1024 are allowed"):
            await there.receive()


Outcome = str | Exception


async def shake(listener: Listener, decode: Identity, prefill: Identity) -> list[Outcome]:
    """Both sides' outcomes: the prefill side's peer, or why it failed."""
    connection = await connect("127.0.0.1", listener.port, 1)
    accepted = await listener.accepted.get()
    results: list[Outcome] = []
    sides: list[Awaitable[str | None]] = [
        handshake.greet(connection, decode, "prefill-0"),
        handshake.welcome(accepted, prefill),
    ]
    for outcome in await asyncio.gather(*sides, return_exceptions=True):
        assert outcome is None or isinstance(outcome, str | Exception)
        results.append(outcome or "")
    connection.close()
    accepted.close()
    return results


class TestHandshake:
    async def test_equal_pods(self, listener: Listener) -> None:
        outcomes = await shake(listener, identity("decode-0"), identity("prefill-0"))
        assert outcomes == ["", "decode-0"]

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"revision": "r2"}, "KV caches differ in revision: decode-0 has r1, prefill-0 has r2"),
            ({"dtype": "bfloat16"}, "differ in dtype: decode-0 has float32"),
            ({"layout_hash": b"x" * 32}, "differ in layout_hash"),
            ({"page_tokens": 512}, "differ in page_tokens: decode-0 has 256, prefill-0 has 512"),
        ],
    )
    async def test_unequal_layouts(
        self, listener: Listener, change: dict[str, object], sentence: str
    ) -> None:
        decode, prefill = await shake(
            listener, identity("decode-0"), identity("prefill-0", **change)
        )
        assert isinstance(decode, HandshakeFailed)
        assert isinstance(prefill, HandshakeFailed)
        assert sentence in str(decode)
        assert sentence in str(prefill)

    async def test_another_pod_at_the_address(self, listener: Listener) -> None:
        outcomes = await shake(listener, identity("decode-0"), identity("prefill-9"))
        assert all("this is pod prefill-9, not prefill-0" in str(outcome) for outcome in outcomes)

    @pytest.mark.parametrize("wrong", [b"", b"another secret"])
    async def test_a_wrong_secret_on_either_side(self, listener: Listener, wrong: bytes) -> None:
        for outcomes in (
            await shake(listener, identity("decode-0", wrong), identity("prefill-0")),
            await shake(listener, identity("decode-0"), identity("prefill-0", wrong)),
        ):
            assert all(isinstance(outcome, HandshakeFailed) for outcome in outcomes)
            assert all("secrets of the two pods differ" in str(outcome) for outcome in outcomes)

    async def test_a_prefill_pod_tells_a_stranger_nothing(self, listener: Listener) -> None:
        """One who cannot prove the secret sees a nonce, a proof and a refusal; no layout."""
        connection = await connect("127.0.0.1", listener.port, 1)
        served = asyncio.create_task(
            handshake.welcome(await listener.accepted.get(), identity("prefill-0"))
        )
        await connection.send(wire.Hello(wire.VERSION, bytes(32)))
        assert isinstance((await connection.receive()).frame, wire.Welcome)
        await connection.send(wire.Proof(bytes(32)))
        assert isinstance((await connection.receive()).frame, wire.Refused)
        with pytest.raises(ConnectionLost):
            await connection.receive()
        with pytest.raises(HandshakeFailed):
            await served

    async def test_a_proof_cannot_be_reflected(self, listener: Listener) -> None:
        """An attacker in the middle returns the prefill pod's own proof as his."""
        connection = await connect("127.0.0.1", listener.port, 1)
        served = asyncio.create_task(
            handshake.welcome(await listener.accepted.get(), identity("prefill-0"))
        )
        await connection.send(wire.Hello(wire.VERSION, bytes(32)))
        welcome = (await connection.receive()).frame
        assert isinstance(welcome, wire.Welcome)
        await connection.send(wire.Proof(welcome.proof))
        assert isinstance((await connection.receive()).frame, wire.Refused)
        with pytest.raises(HandshakeFailed):
            await served
        connection.close()

    async def test_another_version(self, listener: Listener) -> None:
        connection = await connect("127.0.0.1", listener.port, 1)
        served = asyncio.create_task(
            handshake.welcome(await listener.accepted.get(), identity("prefill-0"))
        )
        await connection.send(wire.Hello(wire.VERSION + 1, bytes(32)))
        refused = (await connection.receive()).frame
        assert isinstance(refused, wire.Refused)
        assert f"handoff version {wire.VERSION + 1} does not fit this pod" in refused.reason
        with pytest.raises(HandshakeFailed):
            await served
        connection.close()

    @pytest.mark.parametrize("side", ["greet", "welcome"])
    async def test_a_silent_peer_is_given_up(
        self, listener: Listener, side: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(handshake, "TIMEOUT_S", 0.1)
        connection = await connect("127.0.0.1", listener.port, 1)
        accepted = await listener.accepted.get()
        sides: dict[str, Callable[[], Awaitable[object]]] = {
            "greet": lambda: handshake.greet(connection, identity("decode-0"), "prefill-0"),
            "welcome": lambda: handshake.welcome(accepted, identity("prefill-0")),
        }
        with pytest.raises(ConnectionLost, match=r"no handshake within 0\.1 s"):
            await sides[side]()
        connection.close()
        accepted.close()
