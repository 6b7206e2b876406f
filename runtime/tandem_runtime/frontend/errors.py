"""What a client can be told: one exception, rendered by each protocol in its own shape."""

from __future__ import annotations

from http import HTTPStatus

import grpc


class ApiError(Exception):
    """An answer that is not the one asked for. `message` is a sentence for the user."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    kind = "server_error"
    """OpenAI's `error.type`."""
    code: str | None = None
    grpc_status = grpc.StatusCode.INTERNAL

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        # What it quotes from the request may hold half a surrogate pair.
        self.message = message.encode(errors="replace").decode()
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}

    def openai(self) -> dict[str, object]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def oip(self) -> dict[str, object]:
        return {"error": self.message}


class BadRequest(ApiError):
    """The request cannot be served as it is: the message says what to write instead."""

    status = HTTPStatus.BAD_REQUEST
    kind = "invalid_request_error"
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT


class ContextTooLong(BadRequest):
    code = "context_length_exceeded"


class Forbidden(ApiError):
    status = HTTPStatus.FORBIDDEN
    kind = "permission_error"


class ModelNotFound(ApiError):
    status = HTTPStatus.NOT_FOUND
    kind = "invalid_request_error"
    code = "model_not_found"
    grpc_status = grpc.StatusCode.NOT_FOUND

    def __init__(self, name: str, served: list[str]) -> None:
        known = ", ".join(sorted(served)) or "none"
        super().__init__(
            f"The model '{name}' is not served here; served models: {known}.", param="model"
        )


class ContextNotFound(ApiError):
    """Never was, has expired, or is somebody else's: whoever asks is told the same."""

    status = HTTPStatus.NOT_FOUND
    kind = "invalid_request_error"
    code = "context_not_found"
    grpc_status = grpc.StatusCode.NOT_FOUND

    def __init__(self, id_: str) -> None:
        super().__init__(
            f"There is no context '{id_}' for this tenant and cache_salt: it may have expired; "
            "create it again.",
            param="context",
        )


class StreamNotFound(ApiError):
    """Never was, is kept no longer, or is somebody else's: whoever asks is told the same."""

    status = HTTPStatus.NOT_FOUND
    kind = "invalid_request_error"
    code = "stream_not_found"
    grpc_status = grpc.StatusCode.NOT_FOUND

    def __init__(self, id_: str) -> None:
        super().__init__(
            f"There is no stream '{id_}' to go on with for this tenant: it was lost, or has been "
            "without a client for too long. Send the request again."
        )


class Superseded(ApiError):
    """Another gateway has the stream, for the same client."""

    status = HTTPStatus.CONFLICT
    code = "stream_superseded"
    grpc_status = grpc.StatusCode.ABORTED


class Unavailable(ApiError):
    """Nobody can serve this now; the same request may succeed later."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    kind = "service_unavailable"
    code = "unavailable"
    grpc_status = grpc.StatusCode.UNAVAILABLE

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


class Internal(ApiError):
    """A fault of ours."""


class Poisonous(Internal):
    """Several pods failed of this one request: whoever repeats it spreads the damage."""

    @property
    def headers(self) -> dict[str, str]:
        # OpenAI's clients repeat what ended with a 500, unless they are told not to.
        return {**super().headers, "x-should-retry": "false"}
