"""The gateway's own endpoints beside the protocols of the front end."""

from __future__ import annotations

import msgspec
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.responses import JSONResponse, Response

from tandem_runtime import contract
from tandem_runtime.frontend.app import create_app
from tandem_runtime.frontend.oip.service import InferenceService
from tandem_runtime.gateway.backend import GatewayBackend
from tandem_runtime.gateway.discovery import Discovery
from tandem_runtime.gateway.metrics import GatewayMetrics
from tandem_runtime.protocol import GatewayState


def create_gateway_app(
    pod: str,
    backend: GatewayBackend,
    inference: InferenceService,
    discovery: Discovery,
    metrics: GatewayMetrics,
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

    @app.get(contract.PATH_STATE)
    async def state() -> Response:
        content = GatewayState(
            pod=pod,
            ready=backend.ready,
            streams=backend.streams,
            api_view_age_s=round(discovery.age_s, 3),
            fleets=metrics.last_minute(),
        )
        return Response(msgspec.json.encode(content), media_type="application/json")

    return app
