"""A Kubernetes API server played by hand: lists pods and sends the events it is given."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

from aiohttp import web
from tandem_runtime import contract


def pod(
    name: str,
    *,
    version: int = 1,
    ready: bool = True,
    ip: str = "127.0.0.1",
    role: str = "decode",
    served: str = "m",
    padding: int = 0,
) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "uid": f"uid-{name}",
            "resourceVersion": str(version),
            "creationTimestamp": "2026-11-23T20:00:00Z",
            "labels": {contract.LABEL_FLEET: "chat", contract.LABEL_ROLE: role},
            "annotations": {
                contract.ANNOTATION_SERVED_NAMES: served,
                "padding": "x" * padding,
            },
        },
        "status": {
            "phase": "Running",
            "podIP": ip,
            "conditions": [{"type": "Ready", "status": str(ready)}],
        },
    }


class PlayedApi:
    """Lists `pods` and sends what is put into `events`."""

    def __init__(self) -> None:
        self.pods: list[dict[str, Any]] = []
        self.version = 10
        self.events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.lists = 0
        self.watches: list[dict[str, str]] = []
        self.refuse: int | None = None
        self.port = 0
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/api/v1/namespaces/ns/pods", self._pods)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        assert site._server is not None
        self.port = site._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _pods(self, request: web.Request) -> web.StreamResponse:
        if self.refuse is not None:
            return web.json_response({"message": "no"}, status=self.refuse)
        assert request.query["labelSelector"] == contract.LABEL_FLEET
        if request.query.get("watch") != "true":
            self.lists += 1
            metadata = {"resourceVersion": str(self.version)}
            return web.json_response({"metadata": metadata, "items": self.pods})
        self.watches.append(dict(request.query))
        reply = web.StreamResponse()
        await reply.prepare(request)
        # As the real one: a watch ends when its time is over, whatever has happened.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(float(request.query["timeoutSeconds"])):
                while (event := await self.events.get()) is not None:
                    await reply.write(json.dumps(event).encode() + b"\n")
        return reply


def kubeconfig(port: int) -> str:
    """For a client of the played server."""
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
    )
