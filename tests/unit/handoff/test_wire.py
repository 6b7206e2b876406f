from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem_runtime.kv import wire
from tandem_runtime.protocol import GenerateRequest, PrefillTarget, Sampling, TokenLogprob

LIMITS = wire.trusted(1 << 20)
names = st.text(max_size=20)
counts = st.integers(0, 2**31)
nonces = st.binary(min_size=32, max_size=32)
logprobs = st.floats(allow_nan=False, allow_infinity=False)
ids = st.lists(counts, max_size=20)
requests = st.builds(
    GenerateRequest,
    stream_id=names,
    epoch=counts,
    prompt_ids=ids,
    output_ids=ids,
    sampling=st.builds(Sampling, max_tokens=counts, seed=st.integers(0, 2**63 - 1)),
    prefill=st.none() | st.builds(PrefillTarget, pod=names, host=names, port=counts),
    tenant=names,
)
key: dict[str, Any] = {"stream": names, "epoch": counts}
frames = st.one_of(
    st.builds(wire.Hello, version=counts, nonce=nonces),
    st.builds(wire.Welcome, version=counts, nonce=nonces, proof=nonces),
    st.builds(wire.Proof, proof=nonces),
    st.builds(
        wire.Layout,
        pod=names,
        revision=names,
        layout_hash=nonces,
        dtype=names,
        layers=counts,
        kv_heads=counts,
        head_dim=counts,
        page_tokens=counts,
    ),
    st.builds(wire.Refused, reason=names),
    st.builds(wire.Request, request=requests),
    st.builds(wire.Offer, **key, known_tokens=counts, cached_tokens=counts, queue_s=logprobs),
    st.builds(wire.Grant, **key, have_tokens=counts, upto_tokens=counts),
    st.builds(
        wire.Pages,
        **key,
        first_token=counts,
        tokens=counts,
        checksum=st.integers(0, 2**64 - 1),
    ),
    st.builds(
        wire.Take,
        **key,
        known_tokens=counts,
        limit_tokens=counts,
        have_tokens=counts,
        upto_tokens=counts,
    ),
    st.builds(
        wire.News,
        **key,
        tokens=st.lists(
            st.builds(wire.Token, token_id=counts, logprob=st.none() | logprobs), max_size=5
        ).map(tuple),
    ),
    st.builds(wire.Frozen, **key),
    st.builds(
        wire.First,
        **key,
        token_id=counts,
        logprob=st.none() | logprobs,
        top_logprobs=st.lists(st.builds(TokenLogprob, counts, logprobs), max_size=3).map(tuple),
    ),
    st.builds(wire.Ack, **key),
    st.builds(wire.Abort, **key, code=names, reason=names, retryable=st.booleans()),
    st.builds(wire.Aborted, **key),
    st.builds(wire.Heartbeat, streams=st.lists(st.tuples(names, counts), max_size=5).map(tuple)),
)


def decode(data: bytes, limits: wire.Limits = LIMITS) -> tuple[wire.AnyFrame, int]:
    header_bytes, payload_bytes = wire.decode_prefix(data[: wire.PREFIX.size], limits)
    header = data[wire.PREFIX.size : wire.PREFIX.size + header_bytes]
    return wire.decode_header(header, payload_bytes, limits), payload_bytes


@given(frame=frames)
def test_frames_survive_the_wire(frame: wire.AnyFrame) -> None:
    assert decode(wire.encode(frame)) == (frame, 0)


def test_only_pages_carry_a_payload() -> None:
    pages = wire.Pages("s", 0, 0, 1, 7)
    assert decode(wire.encode(pages, 100)) == (pages, 100)
    with pytest.raises(wire.WireError, match="Ack came with a payload of 100 bytes"):
        decode(wire.encode(wire.Ack("s", 0), 100))


@given(data=st.binary(min_size=wire.PREFIX.size, max_size=200))
def test_garbage_is_refused_and_nothing_else_happens(data: bytes) -> None:
    with pytest.raises(wire.WireError):
        decode(data)


@given(frame=frames, at=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_flipped_byte_gives_a_frame_or_a_wire_error(
    frame: wire.AnyFrame, at: int, value: int
) -> None:
    data = bytearray(wire.encode(frame))
    data[at % len(data)] = value
    with contextlib.suppress(wire.WireError):
        decode(bytes(data))


def test_lengths_are_refused_before_memory_is_reserved() -> None:
    header = wire.PREFIX.pack(wire.MAGIC, 2**32 - 1, 0)
    with pytest.raises(wire.WireError, match=r"header has 4294967295 bytes; 1024 are allowed"):
        wire.decode_prefix(header, wire.STRANGER)
    payload = wire.PREFIX.pack(wire.MAGIC, 10, 1)
    with pytest.raises(wire.WireError, match=r"payload has 1 bytes; 0 are allowed"):
        wire.decode_prefix(payload, wire.STRANGER)


def test_every_handshake_frame_fits_a_strangers_limit() -> None:
    nonce = bytes(wire.NONCE_BYTES)
    for frame in (wire.Hello(1, nonce), wire.Welcome(1, nonce, nonce), wire.Proof(nonce)):
        decode(wire.encode(frame), wire.STRANGER)


def test_a_stranger_can_only_shake_hands() -> None:
    with pytest.raises(wire.WireError, match="Invalid value 'Ack'"):
        decode(wire.encode(wire.Ack("s", 0)), wire.STRANGER)


def test_deeply_nested_headers_are_refused() -> None:
    nested = b"\x91" * 100_000
    with pytest.raises(wire.WireError):
        wire.decode_header(nested, 0, LIMITS)


def test_unknown_fields_are_ignored() -> None:
    header = msgspec.msgpack.encode({"t": "Ack", "stream": "s", "epoch": 3, "later": 1})
    assert wire.decode_header(header, 0, LIMITS) == wire.Ack("s", 3)
