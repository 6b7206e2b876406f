"""Who may exchange KV: version, then proof of the handoff secret, then equal layouts.

    D -> P  Hello(version, nonce D)
    P -> D  Welcome(version, nonce P, HMAC(secret, "prefill" | nonce D | nonce P))
    D -> P  Proof(HMAC(secret, "decode" | nonce D | nonce P))
    P -> D  Layout
    D -> P  Layout

Each side's proof covers both nonces and its own role, so neither can be replayed or reflected.
Whoever fails gets `Refused` with a sentence, and learns nothing else. The secret is a namespace's;
its fleets are kept apart by what a `Layout` says, revision and weights, and by the pod's name.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec

from tandem_runtime.kv import wire
from tandem_runtime.kv.handoff.connection import Connection, ConnectionLost

TIMEOUT_S: Final = 5.0
_WRONG_SECRET: Final = "the handoff secrets of the two pods differ"

F = TypeVar("F", bound=wire.AnyFrame)


class HandshakeFailed(Exception):
    """The peers do not exchange KV; the message says why."""


@dataclass(frozen=True)
class Identity:
    """What a pod brings to a handshake."""

    secret: bytes
    layout: wire.Layout
    page_bytes: int
    """Of the largest payload it takes."""
    new_nonce: Callable[[], bytes]
    """Fresh random bytes of `wire.NONCE_BYTES`."""


async def greet(connection: Connection, mine: Identity, expected_pod: str) -> None:
    """The decode pod's side. Raises `HandshakeFailed`, `ConnectionLost`.

    `expected_pod`: addresses are reused; whoever answers must be the pod that was asked for.
    """
    async with _deadline():
        nonce = mine.new_nonce()
        await connection.send(wire.Hello(wire.VERSION, nonce))
        welcome = await _expect(connection, wire.Welcome)
        await _check_version(connection, welcome.version)
        both = nonce + welcome.nonce
        if not hmac.compare_digest(welcome.proof, _proof(mine.secret, b"prefill", both)):
            await _refuse(connection, _WRONG_SECRET)
        connection.trust(mine.page_bytes)
        await connection.send(wire.Proof(_proof(mine.secret, b"decode", both)))
        layout = await _expect(connection, wire.Layout)
        if layout.pod != expected_pod:
            await _refuse(connection, f"this is pod {layout.pod}, not {expected_pod}")
        await _check_layout(connection, mine.layout, layout)
        await connection.send(mine.layout)


async def welcome(connection: Connection, mine: Identity) -> str:
    """The prefill pod's side; returns the decode pod's name.

    Raises `HandshakeFailed`, `ConnectionLost`.
    """
    async with _deadline():
        hello = await _expect(connection, wire.Hello)
        await _check_version(connection, hello.version)
        if len(hello.nonce) != wire.NONCE_BYTES:
            await _refuse(connection, f"a nonce has {wire.NONCE_BYTES} bytes")
        nonce = mine.new_nonce()
        both = hello.nonce + nonce
        proof = _proof(mine.secret, b"prefill", both)
        await connection.send(wire.Welcome(wire.VERSION, nonce, proof))
        theirs = await _expect(connection, wire.Proof)
        if not hmac.compare_digest(theirs.proof, _proof(mine.secret, b"decode", both)):
            await _refuse(connection, _WRONG_SECRET)
        connection.trust(mine.page_bytes)
        await connection.send(mine.layout)
        layout = await _expect(connection, wire.Layout)
        await _check_layout(connection, mine.layout, layout)
        return layout.pod


def _proof(secret: bytes, role: bytes, nonces: bytes) -> bytes:
    return hmac.digest(secret, b"tandem/handoff/" + role + b"/" + nonces, "sha256")


def difference(mine: wire.Layout, theirs: wire.Layout) -> str | None:
    """A sentence about the first field that keeps the peers apart; None if there is none."""
    for field in msgspec.structs.fields(wire.Layout):
        a, b = getattr(mine, field.name), getattr(theirs, field.name)
        if field.name != "pod" and a != b:
            a, b = (v.hex()[:16] if isinstance(v, bytes) else v for v in (a, b))
            return f"KV caches differ in {field.name}: {mine.pod} has {a}, {theirs.pod} has {b}"
    return None


async def _check_layout(connection: Connection, mine: wire.Layout, theirs: wire.Layout) -> None:
    sentence = difference(mine, theirs)
    if sentence is not None:
        await _refuse(connection, sentence)


async def _check_version(connection: Connection, theirs: int) -> None:
    if theirs != wire.VERSION:
        await _refuse(
            connection, f"handoff version {theirs} does not fit this pod's {wire.VERSION}"
        )


async def _refuse(connection: Connection, reason: str) -> None:
    await connection.send(wire.Refused(reason))
    connection.close(reason)
    raise HandshakeFailed(reason)


async def _expect(connection: Connection, kind: type[F]) -> F:
    frame = (await connection.receive()).frame
    if isinstance(frame, wire.Refused):
        connection.close(frame.reason)
        raise HandshakeFailed(f"{connection.peer} refused: {frame.reason}")
    if not isinstance(frame, kind):
        reason = f"{type(frame).__name__} came where {kind.__name__} was due"
        await _refuse(connection, reason)
        raise AssertionError("refused")
    return frame


@asynccontextmanager
async def _deadline() -> AsyncIterator[None]:
    """A peer that dawdles is given up like one that is gone."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield
    except TimeoutError:
        raise ConnectionLost(f"no handshake within {TIMEOUT_S:g} s") from None
