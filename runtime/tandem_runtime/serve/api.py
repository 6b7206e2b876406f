"""The pod's own endpoints beside the protocols of the front end."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Final

import msgspec
from fastapi import FastAPI, Query, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response, StreamingResponse

from tandem_runtime import contract
from tandem_runtime.frontend.app import create_app
from tandem_runtime.frontend.errors import ApiError, BadRequest, Forbidden
from tandem_runtime.frontend.oip.service import InferenceService
from tandem_runtime.frontend.oip.statistics import Statistics
from tandem_runtime.frontend.respond import Streamed
from tandem_runtime.kv.tiers.peer import WantedPages
from tandem_runtime.protocol import (
    Context,
    ContextCopies,
    DrainRequest,
    FileText,
    GenerateRequest,
    HeldStreams,
)
from tandem_runtime.serve.files import claim_text
from tandem_runtime.serve.lender import pieces
from tandem_runtime.serve.pod import Pod

_SCHEMA: Final = "#/components/schemas/{name}"
_BODIES: Final = msgspec.json.schema_components(
    (GenerateRequest, DrainRequest, Context, WantedPages), ref_template=_SCHEMA
)[1]
_FORBIDDEN: Final[dict[int | str, dict[str, Any]]] = {403: {"description": "A wrong token."}}

_NOT_LENT: Final[dict[int | str, dict[str, Any]]] = {
    403: {"description": "A wrong token, or a pod that gives no pages to others."},
    409: {"description": "The KV cache here is of another model, or in another form."},
    503: {"description": "Not now."},
}
_BYTES: Final = "application/octet-stream"


def _body(kind: type[Any]) -> dict[str, Any]:
    """What an operation's document says of a body that is a msgspec struct."""
    schema = {"$ref": _SCHEMA.format(name=kind.__name__)}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}


def inference_service(pod: Pod) -> InferenceService:
    """For gRPC and HTTP alike. The pod counts its streams itself (serve/streams.py)."""
    statistics = Statistics()
    return InferenceService(pod.backend, statistics, statistics.observe)


def create_pod_app(pod: Pod, inference: InferenceService) -> FastAPI:
    app = create_app(inference, _BODIES)
    token = contract.pod_token(pod.options.secret) if pod.options.secret else ""

    def authorize(request: Request) -> None:
        """Raises `Forbidden` unless whoever asks, a gateway, knows the handoff secret."""
        if not token:
            raise Forbidden("This pod has no handoff secret; it serves its own front end only.")
        if not _bears(request, token):
            raise Forbidden("The bearer token does not fit this pod's handoff secret.")

    def authorize_drain(request: Request) -> None:
        """Raises `Forbidden` unless whoever asks, the operator, means this very pod."""
        if not _bears(request, pod.options.uid) and not _bears(request, token):
            raise Forbidden("The bearer token is not this pod's uid.")

    @app.get(contract.PATH_HEALTH)
    async def health() -> Response:
        return JSONResponse({"healthy": pod.healthy}, 200 if pod.healthy else 503)

    @app.get(contract.PATH_READY)
    async def ready() -> Response:
        return JSONResponse({"ready": pod.ready}, 200 if pod.ready else 503)

    @app.get(contract.PATH_METRICS)
    async def metrics() -> Response:
        return Response(generate_latest(pod.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get(contract.PATH_STATE)
    async def state() -> Response:
        return _json(pod.state())

    @app.post(contract.PATH_DRAIN, openapi_extra=_body(DrainRequest), responses=_FORBIDDEN)
    async def drain(request: Request) -> Response:
        authorize_drain(request)
        pod.drain(await _read(request, DrainRequest))
        return _json(pod.state())

    @app.get(contract.PATH_TOKENIZER, responses=_FORBIDDEN)
    async def tokenizer(request: Request) -> Response:
        authorize(request)
        return _json(pod.bundle)

    @app.get(contract.PATH_PAGES, responses=_FORBIDDEN)
    async def pages(
        request: Request, log: Annotated[str, Query(max_length=64)] = "", seq: int = 0
    ) -> Response:
        authorize(request)
        return _json(await pod.page_events(log, seq))

    @app.post(contract.PATH_PEER_PAGES, openapi_extra=_body(WantedPages), responses=_NOT_LENT)
    async def read_pages(request: Request) -> Response:
        authorize(request)
        records = pieces(await pod.lender.lend(await _read(request, WantedPages)))
        size = {"content-length": str(sum(map(len, records)))}
        return StreamingResponse(_each(records), media_type=_BYTES, headers=size)

    @app.get(contract.PATH_CONTEXTS, responses=_FORBIDDEN)
    async def contexts(request: Request) -> Response:
        authorize(request)
        return _json(ContextCopies(pod.contexts.copies))

    @app.get(contract.PATH_CONTEXTS + "/{id}", responses=_FORBIDDEN)
    async def context(id: str, request: Request) -> Response:
        authorize(request)
        return _json(pod.contexts.get(id))

    @app.get(contract.PATH_FILE, responses=_FORBIDDEN)
    async def file(uri: Annotated[str, Query(max_length=4096)], request: Request) -> Response:
        authorize(request)
        return _json(FileText(await asyncio.to_thread(claim_text, uri)))

    @app.put(contract.PATH_CONTEXTS, openapi_extra=_body(Context), responses=_FORBIDDEN)
    async def keep(request: Request) -> Response:
        authorize(request)
        return _json(pod.contexts.put(await _read(request, Context)))

    @app.post(contract.PATH_GENERATE, openapi_extra=_body(GenerateRequest), responses=_FORBIDDEN)
    async def generate(request: Request) -> Response:
        authorize(request)
        ask = await _read(request, GenerateRequest)
        return Streamed(pod.kept.generate(ask), ApiError.openai, "application/x-ndjson")

    @app.get(contract.PATH_STREAMS + "/{id}", responses=_FORBIDDEN)
    async def held(id: str, request: Request) -> Response:
        authorize(request)
        return _json(HeldStreams(tuple(pod.kept.find(id))))

    @app.delete(contract.PATH_STREAMS + "/{id}", status_code=204, responses=_FORBIDDEN)
    async def cancel(id: str, epoch: int, request: Request) -> Response:
        authorize(request)
        pod.kept.cancel(id, epoch)
        return Response(status_code=204)

    return app


def _bears(request: Request, token: str) -> bool:
    given = request.headers.get("authorization", "")
    return bool(token) and hmac.compare_digest(given.encode(), f"Bearer {token}".encode())


async def _each(pieces: list[memoryview]) -> AsyncGenerator[memoryview, None]:
    for piece in pieces:
        yield piece


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


async def _read(request: Request, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(await request.body(), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadRequest(f"The body is no {kind.__name__}: {error}.") from None
