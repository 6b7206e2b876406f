"""The Open Inference Protocol over gRPC, on tritonclient's stubs.

Streaming is ModelStreamInfer with a decoupled model: a request with the input `stream` true gets
one response for each piece of text. The last response has the parameter `triton_final_response`
true; where the request sets `triton_enable_empty_final_response`, it is an extra, empty one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Final

import grpc
from google.protobuf.json_format import ParseDict
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)

from tandem_runtime import contract
from tandem_runtime.frontend.errors import ApiError, BadRequest, Internal
from tandem_runtime.frontend.oip.service import (
    OUTPUT,
    VERSION,
    Inference,
    InferenceService,
    read_inference,
)
from tandem_runtime.frontend.oip.tensors import Tensor, encode_bytes, tensor, tensor_from_raw
from tandem_runtime.frontend.parameters import MAX_BODY_BYTES

log = logging.getLogger(__name__)

_STREAM_REQUESTS: Final = 64
"""Requests of one ModelStreamInfer call that run at a time; the next one waits."""

Context = Any  # grpc.aio's generic ServicerContext
Reply = Any  # the generated classes carry no types


def create_server(service: InferenceService) -> grpc.aio.Server:
    """Not started, bound to no port."""
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MAX_BODY_BYTES),
            ("grpc.max_send_message_length", MAX_BODY_BYTES),
            ("grpc.so_reuseport", 0),
        ]
    )
    add_GRPCInferenceServiceServicer_to_server(_Servicer(service), server)
    return server


def bind(server: grpc.aio.Server, host: str, port: int) -> int:
    """Returns the port (`port` 0: any). Raises OSError."""
    address = f"[{host}]" if ":" in host else host
    try:
        bound: int = server.add_insecure_port(f"{address}:{port}")
    except RuntimeError as error:
        raise OSError(f"gRPC cannot listen on {address}:{port}: {error}") from error
    return bound


def _unsupported(what: str) -> Any:
    async def refuse(self: _Servicer, request: Any, context: Context) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{what} is not supported.")

    return refuse


class _Servicer(GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def ServerLive(self, request: Any, context: Context) -> Reply:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Context) -> Reply:
        return pb.ServerReadyResponse(ready=self._service.backend.ready)

    async def ModelReady(self, request: Any, context: Context) -> Reply:
        try:
            ready = await self._service.model_ready(request.name, request.version)
        except ApiError:
            ready = False
        return pb.ModelReadyResponse(ready=ready)

    async def ServerMetadata(self, request: Any, context: Context) -> Reply:
        return ParseDict(self._service.server_metadata(), pb.ServerMetadataResponse())

    async def ModelMetadata(self, request: Any, context: Context) -> Reply:
        await self._check(request.name, request.version, context)
        return ParseDict(self._service.metadata(request.name), pb.ModelMetadataResponse())

    async def ModelConfig(self, request: Any, context: Context) -> Reply:
        await self._check(request.name, request.version, context)
        config = {"config": self._service.config(request.name)}
        return ParseDict(config, pb.ModelConfigResponse())

    async def ModelStatistics(self, request: Any, context: Context) -> Reply:
        if request.name:
            await self._check(request.name, request.version, context)
        return ParseDict(self._service.statistics(request.name), pb.ModelStatisticsResponse())

    async def RepositoryIndex(self, request: Any, context: Context) -> Reply:
        models = await self._service.index(only_ready=request.ready)
        return ParseDict({"models": models}, pb.RepositoryIndexResponse())

    async def ModelInfer(self, request: Any, context: Context) -> Reply:
        try:
            self._service.check(request.model_name, request.model_version)
            inference = _read(request, _tenant(context))
            if inference.stream:
                raise BadRequest("ModelInfer answers once; for stream true use ModelStreamInfer.")
            return _response(request, await self._service.text(inference))
        except ApiError as error:
            await _abort(context, error)
            raise AssertionError("abort raises") from error

    async def ModelStreamInfer(
        self, requests: AsyncIterator[Any], context: Context
    ) -> AsyncGenerator[Reply, None]:
        replies: asyncio.Queue[Reply | None] = asyncio.Queue(maxsize=_STREAM_REQUESTS)
        reader = asyncio.create_task(self._read_stream(requests, _tenant(context), replies))
        try:
            while (reply := await replies.get()) is not None:
                yield reply
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    RepositoryModelLoad = _unsupported("Loading models through this protocol")
    RepositoryModelUnload = _unsupported("Unloading models through this protocol")
    SystemSharedMemoryStatus = _unsupported("Shared memory")
    SystemSharedMemoryRegister = _unsupported("Shared memory")
    SystemSharedMemoryUnregister = _unsupported("Shared memory")
    CudaSharedMemoryStatus = _unsupported("Shared memory")
    CudaSharedMemoryRegister = _unsupported("Shared memory")
    CudaSharedMemoryUnregister = _unsupported("Shared memory")
    TraceSetting = _unsupported("The trace extension")
    LogSettings = _unsupported("The logging extension")

    async def _check(self, model: str, version: str, context: Context) -> None:
        try:
            self._service.check(model, version)
        except ApiError as error:
            await _abort(context, error)

    async def _read_stream(
        self,
        requests: AsyncIterator[Any],
        tenant: str | None,
        replies: asyncio.Queue[Reply | None],
    ) -> None:
        """Runs each request of the call as it comes; None ends the replies."""
        room = asyncio.Semaphore(_STREAM_REQUESTS)

        async def serve(request: Any) -> None:
            try:
                async with aclosing(self._replies(request, tenant)) as own:
                    async for reply in own:
                        await replies.put(reply)
            finally:
                room.release()

        try:
            async with asyncio.TaskGroup() as group:
                async for request in requests:
                    await room.acquire()
                    group.create_task(serve(request))
        except Exception:
            log.exception("a ModelStreamInfer call failed")
        await replies.put(None)

    async def _replies(self, request: Any, tenant: str | None) -> AsyncGenerator[Reply, None]:
        """The replies to one request; a failure is a reply too, the call goes on."""
        parameter = request.parameters.get("triton_enable_empty_final_response")
        empty_final = parameter is not None and parameter.bool_param
        try:
            self._service.check(request.model_name, request.model_version)
            inference = _read(request, tenant)
            whole = ""
            async with aclosing(self._service.run(inference)) as pieces:
                async for piece in pieces:
                    final = piece.finish_reason is not None
                    whole += piece.text
                    if inference.stream or final:
                        text = piece.text if inference.stream else whole
                        marked = final and not empty_final
                        yield _streamed(_response(request, text, final=marked))
            if empty_final:
                yield _streamed(_empty_final(request))
        except ApiError as error:
            yield _failed(request, error)
        except Exception:
            log.exception("a request of ModelStreamInfer failed")
            yield _failed(request, Internal("The server failed; its log has the details."))


def _tenant(context: Context) -> str | None:
    metadata = {key: value for key, value in context.invocation_metadata() or ()}
    value = metadata.get(contract.HEADER_TENANT)
    return value.decode() if isinstance(value, bytes) else value


async def _abort(context: Context, error: ApiError) -> None:
    trailers = tuple((name, value) for name, value in error.headers.items())
    await context.abort(error.grpc_status, error.message, trailing_metadata=trailers)


def _read(request: Any, tenant: str | None) -> Inference:
    """Raises `BadRequest`."""
    for entry in (*request.inputs, *request.outputs):
        for name in entry.parameters:
            if name.startswith("shared_memory"):
                raise BadRequest(f"{entry.name}: shared memory is not supported; send it inline.")
    parameters = {name: _value(parameter) for name, parameter in request.parameters.items()}
    outputs = [output.name for output in request.outputs]
    return read_inference(request.model_name, _tensors(request), parameters, tenant, outputs)


def _value(parameter: Any) -> object:
    chosen = parameter.WhichOneof("parameter_choice")
    return None if chosen is None else getattr(parameter, chosen)


def _tensors(request: Any) -> Sequence[Tensor]:
    raw = request.raw_input_contents
    if raw:
        if len(raw) != len(request.inputs):
            raise BadRequest(
                f"The request has {len(request.inputs)} inputs and {len(raw)} raw_input_contents."
            )
        return [
            tensor_from_raw(entry.name, entry.datatype, entry.shape, memoryview(content))
            for entry, content in zip(request.inputs, raw, strict=True)
        ]
    return [
        tensor(
            entry.name,
            entry.datatype,
            entry.shape,
            [*entry.contents.bytes_contents, *entry.contents.bool_contents],
        )
        for entry in request.inputs
    ]


def _response(request: Any, text: str, *, final: bool | None = None) -> Reply:
    response = pb.ModelInferResponse(
        model_name=request.model_name, model_version=VERSION, id=request.id
    )
    response.outputs.add(name=OUTPUT, datatype="BYTES", shape=[1])
    response.raw_output_contents.append(encode_bytes([text.encode()]))
    if final is not None:
        response.parameters["triton_final_response"].bool_param = final
    return response


def _empty_final(request: Any) -> Any:
    response = pb.ModelInferResponse(
        model_name=request.model_name, model_version=VERSION, id=request.id
    )
    response.parameters["triton_final_response"].bool_param = True
    return response


def _streamed(response: Any) -> Reply:
    return pb.ModelStreamInferResponse(infer_response=response)


def _failed(request: Any, error: ApiError) -> Reply:
    named = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
    return pb.ModelStreamInferResponse(error_message=error.message, infer_response=named)
