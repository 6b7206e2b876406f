"""The gateway's own endpoints beside the protocols of the front end."""

from __future__ import annotations

import hmac
from typing import TypeVar

import msgspec
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tandem_runtime import contract
from tandem_runtime.frontend.app import create_app
from tandem_runtime.frontend.errors import BadRequest, Forbidden
from tandem_runtime.frontend.oip.service import InferenceService
from tandem_runtime.frontend.openai import resumption
from tandem_runtime.gateway.backend import GatewayBackend
from tandem_runtime.gateway.discovery import Discovery
from tandem_runtime.gateway.lost_streams import LostStreams
from tandem_runtime.gateway.metrics import GatewayMetrics
from tandem_runtime.gateway.options import GatewayOptions
from tandem_runtime.gateway.waking import Waking
from tandem_runtime.protocol import Context, GatewayState, Wakeable

T = TypeVar("T")


def create_gateway_app(
    options: GatewayOptions,
    backend: GatewayBackend,
    inference: InferenceService,
    discovery: Discovery,
    metrics: GatewayMetrics,
    waking: Waking,
    streams: LostStreams,
    registry: CollectorRegistry,
) -> FastAPI:
    app = create_app(inference, resumable=options.resume)
    if options.resume:
        app.include_router(resumption.router(streams, inference.observer))

    def authorize(request: Request) -> None:
        """Raises `Forbidden` unless whoever asks, the operator, means this very gateway."""
        given = request.headers.get("authorization", "").encode()
        if not options.uid or not hmac.compare_digest(given, f"Bearer {options.uid}".encode()):
            raise Forbidden("The bearer token is not this gateway's uid.")

    @app.get(contract.PATH_HEALTH)
    async def health() -> Response:
        return JSONResponse({"healthy": True})

    @app.get(contract.PATH_READY)
    async def ready() -> Response:
        return JSONResponse({"ready": backend.ready}, 200 if backend.ready else 503)

    @app.get(contract.PATH_METRICS)
    async def scrape() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    def current() -> Response:
        content = GatewayState(
            pod=options.pod,
            ready=backend.ready,
            streams=backend.streams,
            api_view_age_s=round(discovery.age_s, 3),
            fleets=metrics.last_minute(),
            held=waking.held,
        )
        return _json(content)

    @app.get(contract.PATH_STATE)
    async def state() -> Response:
        return current()

    @app.post(contract.PATH_WAKEABLE, include_in_schema=False)
    async def wakeable(request: Request) -> Response:
        authorize(request)
        told = await _told(request, Wakeable)
        waking.tell(told.fleets)
        return current()

    @app.get(contract.PATH_CONTEXTS, include_in_schema=False)
    async def contexts(request: Request) -> Response:
        authorize(request)
        return _json(backend.contexts.states)

    @app.get(contract.PATH_CONTEXTS + "/{id}", include_in_schema=False)
    async def context(id: str, request: Request) -> Response:
        authorize(request)
        return _json(backend.contexts.state(id))

    @app.put(contract.PATH_CONTEXTS, include_in_schema=False)
    async def keep(request: Request) -> Response:
        authorize(request)
        return _json(await backend.contexts.put(await _told(request, Context)))

    return app


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


async def _told(request: Request, kind: type[T]) -> T:
    """What the operator says. Raises `BadRequest`."""
    try:
        return msgspec.json.decode(await request.body(), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadRequest(f"The body is no {kind.__name__}: {error}.") from None
