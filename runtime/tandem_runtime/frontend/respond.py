"""HTTP answers that take time: they end when the client leaves, and fail in the client's shape.

The status line waits for the first chunk: a stream that fails before it began is an HTTP error.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tandem_runtime.frontend.errors import ApiError, Internal

log = logging.getLogger(__name__)

ErrorBody = Callable[[ApiError], dict[str, object]]
"""An error as JSON, in the protocol's shape."""

T = TypeVar("T")


def error_body(path: str) -> ErrorBody:
    """Of the protocol that a path belongs to."""
    return ApiError.oip if path.startswith("/v2") else ApiError.openai


_ENCODE = msgspec.json.Encoder().encode
CLIENT_CLOSED_REQUEST: Final = 499
"""nginx's status for an answer that nobody waits for."""


class ClientLeft(Exception):
    """The client closed its connection; nobody reads the answer."""


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Runs `work`, cancelled when the client disconnects. Raises `ClientLeft` then.

    To be called after the request's body was read.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeft
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def error_response(
    error: ApiError, body: ErrorBody, headers: Mapping[str, str] | None = None
) -> Response:
    all_headers = {**error.headers, **(headers or {})}
    return JSONResponse(body(error), status_code=error.status, headers=all_headers)


async def unary(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """An answer of one body. Raises `ApiError`, for the app's handlers."""
    try:
        return await unless_client_leaves(request.receive, work)
    except ClientLeft:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


@dataclass(frozen=True)
class Event:
    """A message with an id, by which a client says how far it came."""

    message: object
    id: str


class Streamed(Response):
    """A body in pieces: one write for each message. Base of `EventStream`."""

    def __init__(
        self, messages: AsyncGenerator[object, None], error_body: ErrorBody, media_type: str
    ) -> None:
        super().__init__(media_type=media_type, headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._messages = messages
        self._error_body = error_body

    def encode(self, message: object) -> bytes:
        return _ENCODE(message) + b"\n"

    def ending(self) -> bytes:
        """What follows the last message of an answer that did not fail."""
        return b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_client_leaves(receive, self._run(scope, receive, send))
        except ClientLeft:
            log.debug("client left a stream")

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def write(data: bytes, *, more: bool = True) -> None:
            nonlocal started
            if not started:
                started = True
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            async with aclosing(self._messages):
                async for message in self._messages:
                    await write(self.encode(message))
            await write(self.ending(), more=False)
        except Exception as fault:
            error = _told(fault)
            if started:
                await write(self.encode(self._error_body(error)), more=False)
            else:
                await error_response(error, self._error_body)(scope, receive, send)


class EventStream(Streamed):
    """Server-sent events."""

    def __init__(
        self,
        messages: AsyncGenerator[object, None],
        error_body: ErrorBody,
        *,
        last: bytes = b"",
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(messages, error_body, "text/event-stream")
        self.headers.update(headers)
        self._last = last

    def encode(self, message: object) -> bytes:
        if isinstance(message, Event):
            return b"id: " + message.id.encode() + b"\n" + self.encode(message.message)
        return b"data: " + _ENCODE(message) + b"\n\n"

    def ending(self) -> bytes:
        return self._last


def _told(fault: Exception) -> ApiError:
    if isinstance(fault, ApiError):
        return fault
    log.error("a stream failed", exc_info=fault)
    return Internal("The server failed while it answered; its log has the details.")
