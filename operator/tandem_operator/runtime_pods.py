"""HTTP to the pods of the data plane: their state, their drain hook, the gateways' latencies."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
from tandem_runtime.contract import HTTP_PORT, PATH_CONTEXTS, PATH_DRAIN, PATH_STATE, PATH_WAKEABLE
from tandem_runtime.protocol import (
    Context,
    ContextState,
    DrainRequest,
    GatewayState,
    PodState,
    Wakeable,
)

TIMEOUT_S = 3.0
MAX_BYTES = 1 << 20
"""Of an answer. Whoever may make pods in a namespace chooses what answers here."""
T = TypeVar("T")


class RuntimePods:
    """The data plane's pods, by address. One session for all of them."""

    def __init__(self, port: int = HTTP_PORT) -> None:
        self._port = port
        # No limit: the time that waiting for a connection takes would count as a pod's silence.
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S), connector=aiohttp.TCPConnector(limit=0)
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def drain(self, host: str, uid: str, request: DrainRequest) -> PodState:
        """POST to the drain hook of the pod that has this uid.

        Raises OSError with a sentence when it does not answer, or another pod does.
        """
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {uid}"}
        body = msgspec.json.encode(request)
        return await self._call("POST", host, PATH_DRAIN, PodState, data=body, headers=headers)

    async def state(self, host: str) -> PodState:
        """What a runtime pod says of itself. Raises OSError."""
        return await self._call("GET", host, PATH_STATE, PodState)

    async def gateway(self, host: str) -> GatewayState:
        """What a gateway says of itself. Raises OSError."""
        return await self._call("GET", host, PATH_STATE, GatewayState)

    async def wakeable(self, host: str, uid: str, told: Wakeable) -> GatewayState:
        """Tell the gateway that has this uid which fleets are woken. Raises OSError."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {uid}"}
        body = msgspec.json.encode(told)
        return await self._call(
            "POST", host, PATH_WAKEABLE, GatewayState, data=body, headers=headers
        )

    async def context(self, host: str, uid: str, name: str) -> ContextState | None:
        """What the gateway that has this uid knows of a context. Raises OSError."""
        headers = {"Authorization": f"Bearer {uid}"}
        path = f"{PATH_CONTEXTS}/{quote(name, safe='')}"
        return await self._call("GET", host, path, ContextState | None, headers=headers)  # type: ignore[arg-type]

    async def put_context(self, host: str, uid: str, context: Context) -> ContextState:
        """Tell the gateway that has this uid of a context. Raises OSError."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {uid}"}
        body = msgspec.json.encode(context)
        return await self._call(
            "PUT", host, PATH_CONTEXTS, ContextState, data=body, headers=headers
        )

    async def _call(self, method: str, host: str, path: str, answer: type[T], **request: Any) -> T:
        url = f"http://{host}:{self._port}{path}"
        try:
            async with self._session.request(
                method, url, allow_redirects=False, **request
            ) as response:
                content = await _read(response)
                if response.status != 200:
                    text = content.decode(errors="replace")[:200]
                    raise OSError(f"{url} answered {response.status}: {text}")
                return msgspec.json.decode(content, type=answer)
        except (aiohttp.ClientError, TimeoutError, ValueError, RecursionError) as error:
            # msgspec's errors are ValueErrors; text that is no UTF-8 and depth have others.
            raise OSError(f"{url}: {type(error).__name__} {error}") from error


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body. Raises OSError when it is larger than any honest one."""
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > MAX_BYTES:
            raise OSError(f"{response.url} answered more than {MAX_BYTES} bytes")
    return bytes(content)
