"""The HTTP server of gateway and pods: listens before there is an app, leaves signals alone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tandem_runtime import contract
from tandem_runtime.frontend.errors import Unavailable
from tandem_runtime.frontend.respond import error_body, error_response


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # SIGTERM means draining here, which is for the process to arrange.
        yield


class HttpServer:
    """While `app` is None it is alive and not ready: probes tell loading from dead."""

    def __init__(self, host: str, port: int) -> None:
        self.app: ASGIApp | None = None
        self.closing = False
        """Whether each connection ends with its next answer, so that clients go elsewhere."""
        self._host = host
        self._port = port
        config = uvicorn.Config(
            self._call,
            log_config=None,
            access_log=False,
            lifespan="off",
            interface="asgi3",
            server_header=False,
            timeout_keep_alive=75,
        )
        self._server = _Uvicorn(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Returns the port. Raises OSError."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.create_server((self._host, self._port), family=family, backlog=2048)
        loop = asyncio.get_running_loop()
        self._serving = loop.create_task(self._server.serve(sockets=[listener]))
        bound: int = listener.getsockname()[1]
        return bound

    async def stop(self) -> None:
        """Stops listening, lets running answers end."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start" and self.closing:
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        app = self.app or _loading
        await app(scope, receive, send_last)


async def _loading(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        return
    path = scope["path"]
    if path == contract.PATH_HEALTH:
        response: Response = JSONResponse({})
    else:
        response = error_response(Unavailable("Still loading.", retry_after_s=5), error_body(path))
    await response(scope, receive, send)
