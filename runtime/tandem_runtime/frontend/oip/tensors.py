"""Tensors of the Open Inference Protocol, as far as text generation has any.

HTTP carries a tensor as JSON or as raw bytes behind the JSON; a raw BYTES tensor is, for each
element, a 4-byte little-endian length and the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from tandem_runtime.frontend.errors import BadRequest

VALUE_TYPES: Final = {"BYTES": bytes, "BOOL": bool}


@dataclass(frozen=True)
class Tensor:
    name: str
    datatype: str
    shape: tuple[int, ...]
    values: tuple[bytes | bool, ...]
    """In row-major order; bytes for BYTES, bool for BOOL."""


def tensor(name: str, datatype: str, shape: Sequence[int], values: Sequence[Any]) -> Tensor:
    """Raises `BadRequest` unless type and number of the values fit."""
    if any(size < 0 for size in shape):
        raise BadRequest(f"input {name}: shape {list(shape)} has a negative size.", param=name)
    if prod(shape) != len(values):
        raise BadRequest(
            f"input {name}: shape {list(shape)} asks for {prod(shape)} values, "
            f"the request has {len(values)}.",
            param=name,
        )
    expected = _value_type(name, datatype)
    if not all(isinstance(value, expected) for value in values):
        raise BadRequest(f"input {name}: its values are not of type {datatype}.", param=name)
    return Tensor(name, datatype, tuple(shape), tuple(values))


def tensor_from_json(name: str, datatype: str, shape: Sequence[int], data: Any) -> Tensor:
    values = _flat(data)
    if datatype == "BYTES":
        values = [v.encode() if isinstance(v, str) else v for v in values]
    return tensor(name, datatype, shape, values)


def tensor_from_raw(name: str, datatype: str, shape: Sequence[int], raw: memoryview) -> Tensor:
    if _value_type(name, datatype) is bool:
        return tensor(name, datatype, shape, [bool(byte) for byte in raw])
    return tensor(name, datatype, shape, decode_bytes(name, raw))


def _value_type(name: str, datatype: str) -> type:
    if datatype not in VALUE_TYPES:
        raise BadRequest(
            f"input {name}: datatype {datatype} is not taken here; text generation has "
            "BYTES and BOOL inputs.",
            param=name,
        )
    return VALUE_TYPES[datatype]


def _flat(data: Any) -> list[Any]:
    if not isinstance(data, list):
        return [data]
    return [value for item in data for value in _flat(item)]


def decode_bytes(name: str, raw: memoryview) -> list[bytes]:
    values = []
    at = 0
    while at < len(raw):
        if at + 4 > len(raw):
            raise BadRequest(f"input {name}: a length prefix is cut off.", param=name)
        (size,) = struct.unpack_from("<I", raw, at)
        at += 4
        if at + size > len(raw):
            raise BadRequest(
                f"input {name}: a value of {size} bytes was announced, "
                f"{len(raw) - at} bytes are left.",
                param=name,
            )
        values.append(bytes(raw[at : at + size]))
        at += size
    return values


def encode_bytes(values: Sequence[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)
