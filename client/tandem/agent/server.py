"""The node's HTTPS server: what the API server calls for `kubectl logs` and `kubectl exec`.

Only the API server may call: the client certificate must be signed by the cluster's CA and carry
its name. Everything else that a kubelet serves is refused with a sentence.
"""

from __future__ import annotations

import contextlib
import ssl
import time
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

from tandem.agent.api import Object
from tandem.agent.config import API_SERVER, AgentConfig
from tandem.agent.following import read_log
from tandem.agent.logs import LogOptions, LogOptionsError
from tandem.agent.pods import Pods
from tandem.agent.store import Store
from tandem.agent.streaming import ExecOptions, serve_exec


class NodeServer:
    """Serves the pods of one node."""

    def __init__(self, config: AgentConfig, pods: Pods) -> None:
        self._config = config
        self._pods = pods
        self._store = Store(Path(config.folder))

    async def start(self) -> web.AppRunner:
        """Listens on the node's address; the caller cleans the runner up."""
        app = web.Application(middlewares=[_only_the_api_server])
        app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._logs)
        for method in ("GET", "POST"):
            app.router.add_route(method, "/exec/{namespace}/{pod}/{container}", self._exec)
            app.router.add_route(method, "/attach/{tail:.*}", _refuse_attach)
            app.router.add_route(method, "/portForward/{tail:.*}", _refuse_port_forward)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self._config.ca)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self._config.server_certificate, self._config.server_key)
        site = web.TCPSite(runner, self._config.node_ip, self._config.port, ssl_context=context)
        await site.start()
        return runner

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        pod = self._find(request)
        container = request.match_info["container"]
        try:
            options = LogOptions.from_query(dict(request.query), time.time())
        except LogOptionsError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        number = _run_number(pod, container, previous=options.previous)
        run = self._store.pod(pod["metadata"]["uid"]).run(container, number)
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        left = options.limit_bytes
        with contextlib.suppress(ConnectionError):
            async for piece in read_log(run, options):
                piece = piece if left is None else piece[:left]
                await response.write(piece)
                if left is not None:
                    left -= len(piece)
                    if left <= 0:
                        break
            await response.write_eof()
        return response

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        pod = self._find(request)
        container = request.match_info["container"]
        if request.headers.get("Upgrade", "").lower() != "websocket":
            raise web.HTTPBadRequest(
                text="exec needs WebSocket: use kubectl 1.31 or newer without a proxy between"
            )
        number = _run_number(pod, container, previous=False)
        run = self._store.pod(pod["metadata"]["uid"]).run(container, number)
        if run.started() is None or run.ending() is not None:
            raise web.HTTPBadRequest(text=f'container "{container}" is not running')
        flags = {name: request.query.get(name) in ("1", "true") for name in ("input", "tty")}
        options = ExecOptions(request.query.getall("command", []), flags["input"], flags["tty"])
        return await serve_exec(request, run, options)

    def _find(self, request: web.Request) -> Object:
        namespace, name = request.match_info["namespace"], request.match_info["pod"]
        pod = self._pods.find(namespace, name)
        if pod is None:
            raise web.HTTPNotFound(text=f'pod "{namespace}/{name}" is not on this node')
        return pod


def _run_number(pod: Object, container: str, *, previous: bool) -> int:
    """Which run of the container is meant, by the status that the user sees.

    Raises:
        HTTPBadRequest: there is no such run; the text says why.
    """
    status = pod.get("status") or {}
    entries = [
        entry
        for kind in ("initContainerStatuses", "containerStatuses")
        for entry in status.get(kind) or []
        if entry["name"] == container
    ]
    entry = entries[0] if entries else {}
    terminated = (entry.get("lastState") or {}).get("terminated") or {}
    container_id = terminated.get("containerID") if previous else entry.get("containerID")
    if container_id:
        return int(str(container_id).rsplit("/", 1)[1])
    name = pod["metadata"]["name"]
    if previous:
        text = f'previous terminated container "{container}" in pod "{name}" not found'
        raise web.HTTPBadRequest(text=text)
    waiting = (entry.get("state") or {}).get("waiting") or {}
    why = waiting.get("reason") or "ContainerCreating"
    text = f'container "{container}" in pod "{name}" is waiting to start: {why}'
    raise web.HTTPBadRequest(text=text)


@web.middleware
async def _only_the_api_server(request: web.Request, handler: Handler) -> web.StreamResponse:
    certificate = request.get_extra_info("peercert") or {}
    names = [value for part in certificate.get("subject", ()) for key, value in part]
    if API_SERVER not in names:
        raise web.HTTPForbidden(text="only the API server may call a node")
    return await handler(request)


async def _refuse_attach(request: web.Request) -> web.StreamResponse:
    raise web.HTTPNotImplemented(
        text="a local cluster has no attach: use `kubectl logs -f` or `kubectl exec`"
    )


async def _refuse_port_forward(request: web.Request) -> web.StreamResponse:
    raise web.HTTPNotImplemented(
        text="a local cluster needs no port-forward: each pod listens on its own loopback address, "
        "see `kubectl get pods -o wide`"
    )
