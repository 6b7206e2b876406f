"""The Kubernetes API over HTTP, when the connection breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from kubernetes.aio.client import ApiClient, Configuration
from tandem_operator.kube.client import ApiKube
from tandem_operator.resources import FLEETS, Ref

CHAT = Ref(FLEETS, "team", "chat")


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """Of a server that takes the request and closes the connection, as one that restarts does."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def test_a_connection_that_breaks_is_an_oserror(port: int) -> None:
    """What is no OSError ends the loop that renews the lease, and with it the operator."""
    kube = ApiKube(ApiClient(Configuration(host=f"http://127.0.0.1:{port}")))
    try:
        with pytest.raises(OSError, match="ServerDisconnectedError"):
            await kube.delete(CHAT)
    finally:
        await kube.close()
