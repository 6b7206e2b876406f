"""Pages as they are stored and sent: bytes <-> values, pure.

A record is a fixed head, the token ids, a checksum of both, then the payload. The header's checksum
comes last, so a header that was torn or never written does not look like one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import xxhash

from tandem_runtime.kv.layout import Payload
from tandem_runtime.kv.tiers.contract import Page

MAGIC: Final = b"tKVd"
VERSION: Final = 1
_HEAD: Final = struct.Struct("<4sHH32s16s16sIQQ")
"""magic, version, nothing, layout hash, key, parent, tokens, payload bytes, payload's xxh3."""
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

    @property
    def record_bytes(self) -> int:
        return header_bytes(len(self.tokens) // 4) + self.payload_bytes


def header_bytes(tokens: int) -> int:
    return _HEAD.size + 4 * tokens + _CHECKSUM.size


def encode(header: Header) -> bytes:
    head = _HEAD.pack(
        MAGIC,
        VERSION,
        0,
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
    _, version, _, layout, key, parent, tokens, payload_bytes, checksum = _HEAD.unpack_from(data)
    if version != VERSION:
        raise NotARecord("version")
    if tokens != page_tokens:
        raise NotARecord("layout")
    body = data[: _HEAD.size + 4 * tokens]
    if _CHECKSUM.unpack_from(data, len(body))[0] != xxhash.xxh3_64_intdigest(body):
        raise NotARecord("damaged")
    return Header(layout, key, parent, body[_HEAD.size :], payload_bytes, checksum)


def page_header(page: Page, layout_hash: bytes) -> bytes:
    """What goes before a page's payload."""
    size, checksum = memoryview(page.payload).nbytes, xxhash.xxh3_64_intdigest(page.payload)
    return encode(Header(layout_hash, page.key, page.parent, page.tokens, size, checksum))


def page_payload(
    record: bytes | bytearray, *, layout_hash: bytes, key: bytes, tokens: bytes, page_bytes: int
) -> Payload:
    """The payload of a whole record that is what it should be.

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
    return payload
