"""Bodies of the Open Inference Protocol over HTTP: JSON, raw tensors behind it, compression."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tandem_runtime.frontend.errors import BadRequest
from tandem_runtime.frontend.oip.service import OUTPUT
from tandem_runtime.frontend.oip.tensors import (
    Tensor,
    encode_bytes,
    tensor,
    tensor_from_json,
    tensor_from_raw,
)
from tandem_runtime.frontend.parameters import MAX_BODY_BYTES

Json = dict[str, Any]
_HEADER_LENGTH: Final = "Inference-Header-Content-Length"


class _Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: Json = {}
    data: Any = None


class _Output(msgspec.Struct):
    name: str
    parameters: Json = {}


class _InferBody(msgspec.Struct):
    inputs: list[_Input]
    id: str = ""
    parameters: Json = {}
    outputs: list[_Output] = []


class _GenerateBody(msgspec.Struct):
    text_input: str
    parameters: Json = {}


class IndexBody(msgspec.Struct):
    ready: bool = False


class InferBody(msgspec.Struct):
    """An infer request, its tensors read."""

    id: str
    tensors: list[Tensor]
    parameters: Json
    outputs: list[_Output]

    def wants_binary(self, output: str) -> bool:
        for asked in self.outputs:
            if asked.name == output and "binary_data" in asked.parameters:
                return asked.parameters["binary_data"] is True
        return self.parameters.get("binary_data_output") is True


async def read_infer_body(request: Request) -> InferBody:
    """Raises `BadRequest`."""
    body = memoryview(_decompressed(await request.body(), request))
    length = request.headers.get(_HEADER_LENGTH)
    if length is None:
        json_bytes = len(body)
    elif length.isdecimal() and int(length) <= len(body):
        json_bytes = int(length)
    else:
        raise BadRequest(f"{_HEADER_LENGTH} is {length}; the body has {len(body)} bytes.")
    message = _decode(body[:json_bytes], _InferBody)
    tensors = []
    at = json_bytes
    for entry in message.inputs:
        size = entry.parameters.get("binary_data_size")
        _refuse_parameters(f"input {entry.name}", entry.parameters, {"binary_data_size"})
        if size is None:
            tensors.append(tensor_from_json(entry.name, entry.datatype, entry.shape, entry.data))
            continue
        if not isinstance(size, int) or size < 0 or at + size > len(body):
            raise BadRequest(
                f"input {entry.name}: binary_data_size is {size}, {len(body) - at} bytes are left."
            )
        raw = body[at : at + size]
        tensors.append(tensor_from_raw(entry.name, entry.datatype, entry.shape, raw))
        at += size
    if at != len(body):
        raise BadRequest(f"The body has {len(body) - at} bytes that belong to no input.")
    for output in message.outputs:
        _refuse_parameters(f"output {output.name}", output.parameters, {"binary_data"})
    return InferBody(message.id, tensors, message.parameters, message.outputs)


def _refuse_parameters(whose: str, parameters: Mapping[str, Any], known: set[str]) -> None:
    for name, value in parameters.items():
        if name.startswith("shared_memory"):
            raise BadRequest(f"{whose}: shared memory is not supported; send the data inline.")
        if name not in known and value:  # tritonclient sends classification: 0
            raise BadRequest(f"{whose}: parameter {name} is not supported.", param=name)


async def read_generate_body(request: Request) -> tuple[str, Json]:
    """The text and the parameters; keys beside `parameters` are parameters too."""
    raw = _decompressed(await request.body(), request)
    message = _decode(raw, _GenerateBody)
    others = _decode(raw, Json)
    extra = {n: v for n, v in others.items() if n not in ("text_input", "parameters", "id")}
    return message.text_input, {**extra, **message.parameters}


async def read_index_body(request: Request) -> IndexBody:
    raw = _decompressed(await request.body(), request)
    return _decode(raw, IndexBody) if raw else IndexBody()


def text_tensor(text: str) -> Tensor:
    return tensor("text_input", "BYTES", [1], [text.encode()])


def infer_response(request: Request, reply: Json, text: str, *, binary: bool) -> Response:
    """The reply with its one output, raw if asked, compressed if accepted."""
    output: Json = {"name": OUTPUT, "datatype": "BYTES", "shape": [1]}
    headers = {}
    raw = b""
    if binary:
        raw = encode_bytes([text.encode()])
        output["parameters"] = {"binary_data_size": len(raw)}
    else:
        output["data"] = [text]
    body = msgspec.json.encode({**reply, "outputs": [output]})
    if binary:
        headers[_HEADER_LENGTH] = str(len(body))
    content, encoding = _compressed(body + raw, request.headers.get("accept-encoding", ""))
    if encoding:
        headers["content-encoding"] = encoding
    media_type = "application/octet-stream" if binary else "application/json"
    return Response(content, headers=headers, media_type=media_type)


def _compressed(body: bytes, accepted: str) -> tuple[bytes, str]:
    wanted = {entry.split(";")[0].strip() for entry in accepted.lower().split(",")}
    if "gzip" in wanted:
        return gzip.compress(body, compresslevel=1), "gzip"
    if "deflate" in wanted:
        return zlib.compress(body, level=1), "deflate"
    return body, ""


def _decompressed(body: bytes, request: Request) -> bytes:
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise BadRequest(f"Content-Encoding {encoding} is not supported; use gzip or deflate.")
    # 32: gzip or zlib header, whichever is there.
    decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    try:
        plain = decompressor.decompress(body, MAX_BODY_BYTES + 1)
    except zlib.error as error:
        raise BadRequest(f"The body is not {encoding}: {error}.") from None
    if len(plain) > MAX_BODY_BYTES:
        raise BadRequest(f"The body is larger than {MAX_BODY_BYTES} bytes when decompressed.")
    if not decompressor.eof:
        raise BadRequest(f"The body is not {encoding}: it is cut off.")
    return plain


def _decode(raw: bytes | memoryview, kind: Any) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise BadRequest(f"The body is not what this endpoint takes: {error}.") from None
