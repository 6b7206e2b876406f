"""Pages as they are stored and sent: bytes <-> values, pure.

A record is a fixed head, the token ids, a checksum of both, then the payload. The header's checksum
comes last, so a header that was torn or never written does not look like one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import xxhash

from tandem_runtime.kv.tiers.contract import Page

MAGIC: Final = b"tKVd"
VERSION: Final = 1
_HEAD: Final = struct.Struct("<4sHH32s16s16sIQQ")
"""magic, version, flags, layout hash, key, parent, tokens, payload bytes, payload's xxh3."""
_DECODED: Final = 1
"""A flag; no other is set."""
_CHECKSUM: Final = struct.Struct("<Q")


class NotARecord(ValueError):
    """Bytes that this version cannot read as a record's header."""


@dataclass(frozen=True)
class Header:
    layout_hash: bytes
    key: bytes
    parent: bytes
    tokens: bytes
    payload_bytes: int
    payload_checksum: int
    decoded: bool = False
    """See `Page`."""

    @property
    def record_bytes(self) -> int:
        return header_bytes(len(self.tokens) // 4) + self.payload_bytes


def header_bytes(tokens: int) -> int:
    return _HEAD.size + 4 * tokens + _CHECKSUM.size


def encode(header: Header) -> bytes:
    head = _HEAD.pack(
        MAGIC,
        VERSION,
        _DECODED * header.decoded,
        header.layout_hash,
        header.key,
        header.parent,
        len(header.tokens) // 4,
        header.payload_bytes,
        header.payload_checksum,
    )
    body = head + header.tokens
    return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def decode(data: bytes, page_tokens: int) -> Header:
    """The header at the start of `data`, which holds `header_bytes(page_tokens)` bytes.

    Raises:
        NotARecord: another format, another version, or damaged; the text says which.
    """
    if len(data) < header_bytes(page_tokens) or data[:4] != MAGIC:
        raise NotARecord("torn")
    head = _HEAD.unpack_from(data)
    _, version, flags, layout, key, parent, tokens, payload_bytes, checksum = head
    if version != VERSION:
        raise NotARecord("version")
    if tokens != page_tokens:
        raise NotARecord("layout")
    body = data[: _HEAD.size + 4 * tokens]
    if _CHECKSUM.unpack_from(data, len(body))[0] != xxhash.xxh3_64_intdigest(body):
        raise NotARecord("damaged")
    ids, decoded = body[_HEAD.size :], bool(flags & _DECODED)
    return Header(layout, key, parent, ids, payload_bytes, checksum, decoded)


def header_of(page: Page, layout_hash: bytes) -> Header:
    """What is said of a page before its payload."""
    size, checksum = memoryview(page.payload).nbytes, xxhash.xxh3_64_intdigest(page.payload)
    return Header(layout_hash, page.key, page.parent, page.tokens, size, checksum, page.decoded)


def page_of(
    record: bytes | bytearray, *, layout_hash: bytes, key: bytes, tokens: bytes, page_bytes: int
) -> Page:
    """The page of a whole record that is what it should be.

    Args:
        record: header and payload, and nothing else.
        layout_hash: `KvLayout.hash`.
        key: of the page.
        tokens: ids of its tokens (`prefix.token_bytes`).
        page_bytes: of the payload.

    Raises:
        NotARecord: it is not; the text says why, in a word.
    """
    page_tokens = len(tokens) // 4
    size = header_bytes(page_tokens)
    header, payload = decode(bytes(record[:size]), page_tokens), memoryview(record)[size:]
    if (header.layout_hash, header.key) != (layout_hash, key):
        raise NotARecord("damaged")
    if header.tokens != tokens:
        raise NotARecord("collision")
    whole = len(payload) == header.payload_bytes == page_bytes
    if not whole or xxhash.xxh3_64_intdigest(payload) != header.payload_checksum:
        raise NotARecord("damaged")
    return Page(key, header.parent, tokens, payload, header.decoded)
