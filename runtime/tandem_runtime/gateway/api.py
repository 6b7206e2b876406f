"""The gateway's own endpoints beside the protocols of the front end."""

from __future__ import annotations

import hmac

import msgspec
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tandem_runtime import contract
from tandem_runtime.frontend.app import create_app
from tandem_runtime.frontend.errors import BadRequest, Forbidden
from tandem_runtime.frontend.oip.service import InferenceService
from tandem_runtime.gateway.backend import GatewayBackend
from tandem_runtime.gateway.discovery import Discovery
from tandem_runtime.gateway.metrics import GatewayMetrics
from tandem_runtime.gateway.options import GatewayOptions
from tandem_runtime.gateway.waking import Waking
from tandem_runtime.protocol import GatewayState, Wakeable


def create_gateway_app(
    options: GatewayOptions,
    backend: GatewayBackend,
    inference: InferenceService,
    discovery: Discovery,
    metrics: GatewayMetrics,
    waking: Waking,
    registry: CollectorRegistry,
) -> FastAPI:
    app = create_app(inference)

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
        return Response(msgspec.json.encode(content), media_type="application/json")

    @app.get(contract.PATH_STATE)
    async def state() -> Response:
        return current()

    @app.post(contract.PATH_WAKEABLE, include_in_schema=False)
    async def wakeable(request: Request) -> Response:
        told = await _told(request, options.uid)
        waking.tell(told.fleets)
        return current()

    return app


async def _told(request: Request, uid: str) -> Wakeable:
    """What the operator says can be woken. Raises `ApiError`."""
    given = request.headers.get("authorization", "").encode()
    if not uid or not hmac.compare_digest(given, f"Bearer {uid}".encode()):
        raise Forbidden("The bearer token is not this gateway's uid.")
    try:
        return msgspec.json.decode(await request.body(), type=Wakeable)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadRequest(f"The body is no Wakeable: {error}.") from None
