"""The front end as an ASGI app: protocols mounted, faults answered in each protocol's shape."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tandem_runtime.frontend.contexts import Prefixes
from tandem_runtime.frontend.errors import ApiError, BadRequest, Internal
from tandem_runtime.frontend.oip import http as oip_http
from tandem_runtime.frontend.oip.service import InferenceService
from tandem_runtime.frontend.openai import contexts as openai_contexts
from tandem_runtime.frontend.openai import endpoints as openai_endpoints
from tandem_runtime.frontend.parameters import MAX_BODY_BYTES, sentence_of
from tandem_runtime.frontend.respond import (
    CLIENT_CLOSED_REQUEST,
    ErrorBody,
    error_body,
    error_response,
)

_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"description": "A parameter or body at fault; the sentence names it."},
    404: {"description": "An unknown model or path."},
    413: {"description": "A body too large."},
    500: {"description": "A fault of ours."},
    503: {"description": "Nobody can serve this now; Retry-After says when to ask again."},
}


class _FrontEnd(FastAPI):
    schemas: Mapping[str, Any] = MappingProxyType({})

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            document["components"]["schemas"].update(self.schemas)
            for operations in document["paths"].values():
                for operation in operations.values():
                    # FastAPI believes that it answers bad bodies; we do, with 400.
                    operation["responses"].pop("422", None)
        return super().openapi()


def create_app(
    inference: InferenceService,
    schemas: Mapping[str, Any] = MappingProxyType({}),
    *,
    resumable: bool = False,
) -> FastAPI:
    """Both protocols over HTTP; the service's observer is told of every stream of either.

    `resumable`: another process like this one can go on with an answer's stream.
    `schemas`: by name, of bodies that FastAPI does not read itself, for the OpenAPI document.
    """
    app = _FrontEnd(title="Tandem", docs_url=None, redoc_url=None, responses=_ERRORS)
    app.schemas = schemas
    app.add_middleware(_BodyLimit)
    prefixes = Prefixes()
    app.include_router(
        openai_endpoints.router(
            inference.backend, prefixes, inference.observer, resumable=resumable
        )
    )
    app.include_router(openai_contexts.router(inference.backend, prefixes))
    app.include_router(oip_http.router(inference))
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid_body)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_left)
    app.add_exception_handler(Exception, _fault)
    return app


class _BodyLimit:
    """Refuses larger bodies; FastAPI's own limit answers in plain text, whatever the protocol."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        known_bytes = int(announced) if announced.isdecimal() else 0
        read_bytes = 0

        async def limited() -> Message:
            nonlocal read_bytes
            if known_bytes <= MAX_BODY_BYTES:
                message = await receive()
                read_bytes += len(message.get("body", b""))
                if read_bytes <= MAX_BODY_BYTES:
                    return message
            told = f"the body is larger than {MAX_BODY_BYTES} bytes; send less at a time"
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, told)

        await self._app(scope, limited, send)


def _shape(request: Request) -> ErrorBody:
    return error_body(request.url.path)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error, _shape(request))


async def _invalid_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    told = sentence_of(list(error.errors()))
    if told.param is None and "json" not in request.headers.get("content-type", ""):
        told = BadRequest("Send JSON, with the header Content-Type: application/json.")
    return error_response(told, _shape(request))


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, bodies too large."""
    assert isinstance(error, HTTPException)
    known = ApiError(f"{request.method} {request.url.path}: {error.detail}.")
    known.status = HTTPStatus(error.status_code)
    known.kind = "invalid_request_error"
    return error_response(known, _shape(request), error.headers)


async def _client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _fault(request: Request, error: Exception) -> Response:
    # Starlette logs the traceback after this handler answered.
    return error_response(Internal("The server failed; its log has the details."), _shape(request))
