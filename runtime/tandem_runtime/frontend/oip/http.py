"""The Open Inference Protocol's HTTP routes, and the generate extension."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from tandem_runtime import contract
from tandem_runtime.frontend.errors import ApiError, BadRequest
from tandem_runtime.frontend.oip import body as wire
from tandem_runtime.frontend.oip.service import (
    OUTPUT,
    VERSION,
    Inference,
    InferenceService,
    read_inference,
)
from tandem_runtime.frontend.respond import EventStream, unary

Json = dict[str, Any]
Handler = Callable[[str, str, Request], Awaitable[Response]]

_JSON_BODY: Final = {
    "requestBody": {"content": {"application/json": {"schema": {"type": "object"}}}}
}


def router(service: InferenceService) -> APIRouter:
    """Routes of /v2."""
    routes = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
    _server_routes(routes, service)
    _unsupported_routes(routes)
    _model_routes(routes, service)
    return routes


def _server_routes(routes: APIRouter, service: InferenceService) -> None:
    @routes.get("")
    async def server_metadata() -> Json:
        return service.server_metadata()

    @routes.get("/health/live")
    async def live() -> Json:
        return {"live": True}

    @routes.get("/health/ready")
    async def ready() -> Response:
        return _readiness(service.backend.ready)

    @routes.get("/models/stats")
    async def statistics() -> Json:
        return service.statistics()

    @routes.post("/repository/index", openapi_extra=_JSON_BODY)
    async def index(request: Request) -> Response:
        body = await wire.read_index_body(request)
        return JSONResponse(await service.index(only_ready=body.ready))


def _unsupported_routes(routes: APIRouter) -> None:
    """Extensions that we do not have; tritonclient shows their sentence."""

    async def repository(model: str) -> Response:
        raise BadRequest(
            f"Model '{model}': models are loaded and unloaded by applying and deleting "
            "InferenceFleets, not through this protocol."
        )

    routes.add_api_route("/repository/models/{model:path}/load", repository, methods=["POST"])
    routes.add_api_route("/repository/models/{model:path}/unload", repository, methods=["POST"])

    def refuse(path: str, what: str) -> None:
        async def refused() -> Response:
            raise BadRequest(f"{what} is not supported.")

        for method in ("GET", "POST"):
            routes.add_api_route(path, refused, methods=[method], include_in_schema=False)

    for kind in ("system", "cuda"):
        for action in ("status", "register", "unregister"):
            refuse(f"/{kind}sharedmemory/{action}", "Shared memory")
            refuse(f"/{kind}sharedmemory/region/{{region:path}}/{action}", "Shared memory")
    refuse("/trace/setting", "The trace extension")
    refuse("/models/{model:path}/trace/setting", "The trace extension")
    refuse("/logging", "The logging extension")


def _model_routes(routes: APIRouter, service: InferenceService) -> None:
    async def ready(model: str, version: str, request: Request) -> Response:
        return _readiness(await service.model_ready(model, version))

    async def config(model: str, version: str, request: Request) -> Response:
        service.check(model, version)
        return JSONResponse(service.config(model))

    async def statistics(model: str, version: str, request: Request) -> Response:
        service.check(model, version)
        return JSONResponse(service.statistics(model))

    async def metadata(model: str, version: str, request: Request) -> Response:
        service.check(model, version)
        return JSONResponse(service.metadata(model))

    async def infer(model: str, version: str, request: Request) -> Response:
        service.check(model, version)
        return await _infer(service, model, request)

    async def generate(model: str, version: str, request: Request) -> Response:
        service.check(model, version)
        return await _generate(service, model, request)

    async def generate_stream(model: str, version: str, request: Request) -> Response:
        service.check(model, version)
        inference = await _read_generate(model, request)
        return EventStream(_generated_pieces(service, inference), ApiError.oip)

    _both(routes, "GET", "/ready", ready)
    _both(routes, "GET", "/config", config)
    _both(routes, "GET", "/stats", statistics)
    _both(routes, "POST", "/infer", infer)
    _both(routes, "POST", "/generate", generate)
    _both(routes, "POST", "/generate_stream", generate_stream)
    _both(routes, "GET", "", metadata)  # last: a name may hold slashes


def _both(routes: APIRouter, method: str, suffix: str, handler: Handler) -> None:
    """The route with and without a version."""

    async def versioned(model: str, version: str, request: Request) -> Response:
        return await handler(model, version, request)

    async def plain(model: str, request: Request) -> Response:
        return await handler(model, "", request)

    extra = _JSON_BODY if method == "POST" else None
    for path, endpoint in (
        (f"/models/{{model:path}}/versions/{{version}}{suffix}", versioned),
        (f"/models/{{model:path}}{suffix}", plain),
    ):
        name = handler.__name__
        routes.add_api_route(path, endpoint, methods=[method], name=name, openapi_extra=extra)


def _readiness(ready: bool) -> Response:
    return JSONResponse({"ready": ready}, status_code=200 if ready else 503)


async def _infer(service: InferenceService, model: str, request: Request) -> Response:
    body = await wire.read_infer_body(request)
    inference = read_inference(
        model,
        body.tensors,
        body.parameters,
        request.headers.get(contract.HEADER_TENANT),
        [output.name for output in body.outputs],
    )
    if inference.stream:
        raise BadRequest(
            "infer answers once; for stream: true use generate_stream, or gRPC's ModelStreamInfer.",
            param="stream",
        )

    async def answer() -> Response:
        text = await service.text(inference)
        reply = {
            "model_name": model,
            "model_version": VERSION,
            **({"id": body.id} if body.id else {}),
        }
        return wire.infer_response(request, reply, text, binary=body.wants_binary(OUTPUT))

    return await unary(request, answer())


async def _read_generate(model: str, request: Request) -> Inference:
    text, parameters = await wire.read_generate_body(request)
    tensors = [wire.text_tensor(text)]
    return read_inference(model, tensors, parameters, request.headers.get(contract.HEADER_TENANT))


async def _generate(service: InferenceService, model: str, request: Request) -> Response:
    inference = await _read_generate(model, request)
    if inference.stream:
        raise BadRequest(
            "generate answers once; for stream: true use generate_stream.", param="stream"
        )

    async def answer() -> Response:
        return JSONResponse(_generated(model, await service.text(inference)))

    return await unary(request, answer())


async def _generated_pieces(
    service: InferenceService, inference: Inference
) -> AsyncGenerator[object, None]:
    if inference.stream is False:
        yield _generated(inference.model, await service.text(inference))
        return
    async with aclosing(service.run(inference)) as pieces:
        async for piece in pieces:
            yield _generated(inference.model, piece.text)


def _generated(model: str, text: str) -> Json:
    return {"model_name": model, "model_version": VERSION, OUTPUT: text}
