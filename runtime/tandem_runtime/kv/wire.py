"""Frames of the KV handoff: bytes <-> values, pure.

A frame is a prefix (magic, header bytes, payload bytes), a msgpack header and a raw payload. Only
`Pages` has a payload. A receiver checks the prefix's lengths before it reserves memory: before the
peer has proved the handoff secret, `STRANGER` allows one small header and no payload.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

import msgspec

from tandem_runtime.protocol import GenerateRequest, TokenLogprob

VERSION: Final = 3
"""Of the frames; peers of different versions do not exchange KV."""
MAGIC: Final = b"tKVh"
PREFIX: Final = struct.Struct("<4sII")
NONCE_BYTES: Final = 32


class WireError(ValueError):
    """Bytes that are no frame of this protocol; the connection cannot go on."""


class Frame(msgspec.Struct, frozen=True, tag_field="t", omit_defaults=True):
    """Base of all frames; the class name travels as the tag."""


class StreamFrame(Frame, frozen=True):
    """A frame of one attempt of one stream."""

    stream: str
    epoch: int

    @property
    def key(self) -> StreamKey:
        return StreamKey(self.stream, self.epoch)


class StreamKey(NamedTuple):
    """One attempt; also the name of its sequence in the engines."""

    stream: str
    epoch: int

    def __str__(self) -> str:
        return f"{self.stream}#{self.epoch}"


# -- handshake ------------------------------------------------------------------------------------
class Hello(Frame, frozen=True, tag=True):
    """The decode pod's first frame."""

    version: int
    nonce: bytes


class Welcome(Frame, frozen=True, tag=True):
    """The prefill pod's answer, with its proof of the secret."""

    version: int
    nonce: bytes
    proof: bytes


class Proof(Frame, frozen=True, tag=True):
    """The decode pod's proof."""

    proof: bytes


class Layout(Frame, frozen=True, tag=True):
    """What a pod's KV cache is; peers exchange KV only where all but `pod` are equal."""

    pod: str
    revision: str
    layout_hash: bytes
    """Covers the weights' digest, shape and dtype (kv/layout.py)."""
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    page_tokens: int


class Refused(Frame, frozen=True, tag=True):
    """The connection closes; `reason` is a sentence."""

    reason: str


# -- streams --------------------------------------------------------------------------------------
class Request(Frame, frozen=True, tag=True):
    """Please prefill this; its stream and epoch name all frames that follow."""

    request: GenerateRequest


class Offer(StreamFrame, frozen=True, tag=True):
    """The prefill pod computed the first chunk."""

    known_tokens: int
    """Tokens whose KV will come: the prompt and the output of earlier attempts."""
    cached_tokens: int
    """Of the prompt, found in the prefill pod's prefix cache."""
    queue_s: float


class Grant(StreamFrame, frozen=True, tag=True):
    """The decode pod has blocks for tokens [have, upto)."""

    have_tokens: int
    """Held already: do not send. Later grants for a stream that moves: stored by now."""
    upto_tokens: int
    """Credit; a later grant raises it."""


class Pages(StreamFrame, frozen=True, tag=True):
    """KV of tokens [first, first + tokens), canonical (kv/layout.py), as the frame's payload."""

    first_token: int
    tokens: int
    checksum: int
    """xxh3-64 of the payload."""


class First(StreamFrame, frozen=True, tag=True):
    """The first generated token; sent after the last page."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


class Ack(StreamFrame, frozen=True, tag=True):
    """All pages are in the receiver's cache; it goes on from here."""


# -- streams that move while they run (docs/design/migration.md) ----------------------------------
class Take(StreamFrame, frozen=True, tag=True):
    """Let me go on with a stream that you decode; `epoch` is that of the attempt to come."""

    known_tokens: int
    """That the asker knows: the prompt and the output so far."""
    limit_tokens: int
    """The stream is to be frozen before it has more."""
    have_tokens: int
    """Held already: do not send."""
    upto_tokens: int
    """Credit; a later grant raises it."""


class Token(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


class News(StreamFrame, frozen=True, tag=True):
    """Tokens that were chosen since; they come before the pages that hold their KV."""

    tokens: tuple[Token, ...]


class Frozen(StreamFrame, frozen=True, tag=True):
    """The stream stands still, and all of it was sent."""


class Abort(StreamFrame, frozen=True, tag=True):
    """The sender gave the stream up; the receiver frees it and confirms."""

    code: str
    """An error code of `protocol.GenerateEvent`."""
    reason: str
    retryable: bool = True


class Aborted(StreamFrame, frozen=True, tag=True):
    """Confirms an `Abort`: nothing of the stream is left here."""


class Heartbeat(Frame, frozen=True, tag=True):
    """The streams of this connection that the sender still works on or waits for."""

    streams: tuple[tuple[str, int], ...]


StrangerFrame = Hello | Welcome | Proof | Refused
StreamFrames = Offer | Grant | Pages | First | Ack | Abort | Aborted | Take | News | Frozen
AnyFrame = StrangerFrame | Layout | Request | StreamFrames | Heartbeat

_ENCODER: Final = msgspec.msgpack.Encoder()


@dataclass(frozen=True)
class Limits:
    """What a receiver accepts of its peer."""

    header_bytes: int
    payload_bytes: int
    frames: msgspec.msgpack.Decoder[AnyFrame]


_ANY_FRAME: Final = msgspec.msgpack.Decoder(AnyFrame)
MAX_HEADER_BYTES: Final = 32 << 20
"""Room for the ids of a prompt of several million tokens."""
STRANGER: Final = Limits(1024, 0, msgspec.msgpack.Decoder(StrangerFrame))


def trusted(payload_bytes: int) -> Limits:
    """Limits for a peer that proved the secret; `payload_bytes` are those of one page."""
    return Limits(MAX_HEADER_BYTES, payload_bytes, _ANY_FRAME)


def encode(frame: AnyFrame, payload_bytes: int = 0) -> bytes:
    """Prefix and header; the payload follows as it is."""
    header = _ENCODER.encode(frame)
    return PREFIX.pack(MAGIC, len(header), payload_bytes) + header


def decode_prefix(prefix: bytes | bytearray | memoryview, limits: Limits) -> tuple[int, int]:
    """(header bytes, payload bytes). Raises `WireError`."""
    magic, header_bytes, payload_bytes = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise WireError(f"the peer speaks another protocol: it began a frame with {magic!r}")
    if header_bytes == 0:
        raise WireError("a frame has no header")
    if header_bytes > limits.header_bytes:
        raise WireError(
            f"a frame's header has {header_bytes} bytes; {limits.header_bytes} are allowed"
        )
    if payload_bytes > limits.payload_bytes:
        raise WireError(
            f"a frame's payload has {payload_bytes} bytes; {limits.payload_bytes} are allowed"
        )
    return header_bytes, payload_bytes


def decode_header(
    header: bytes | bytearray | memoryview, payload_bytes: int, limits: Limits
) -> AnyFrame:
    """Raises `WireError`."""
    try:
        frame = limits.frames.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"a frame's header cannot be read: {error}") from None
    if payload_bytes and not isinstance(frame, Pages):
        raise WireError(f"{type(frame).__name__} came with a payload of {payload_bytes} bytes")
    return frame
