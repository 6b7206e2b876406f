"""What the Open Inference Protocol means here, apart from HTTP and gRPC.

A model takes `text_input` (BYTES [1]), optionally `stream` (BOOL [1]) and `sampling_parameters`
(BYTES [1], JSON), and answers `text_output` (BYTES [1]). Request parameters do what
`sampling_parameters` do. There is one version of each model, "1".
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from pydantic import ValidationError

from tandem_runtime import __version__
from tandem_runtime.frontend.backend import Backend
from tandem_runtime.frontend.encode import encode
from tandem_runtime.frontend.errors import ApiError, BadRequest, ModelNotFound
from tandem_runtime.frontend.generation import (
    Generation,
    Observer,
    Piece,
    fit_prompt,
    run,
    tenant_of,
)
from tandem_runtime.frontend.oip.statistics import Statistics
from tandem_runtime.frontend.oip.tensors import Tensor
from tandem_runtime.frontend.parameters import GenerationParameters, sentence_of
from tandem_runtime.frontend.record import StreamRecord
from tandem_runtime.frontend.structured import check_grammar

Json = dict[str, Any]

VERSION: Final = "1"
OUTPUT: Final = "text_output"
_MAX_TOKENS: Final = 16
_INPUTS: Final = (("text_input", "BYTES"), ("stream", "BOOL"), ("sampling_parameters", "BYTES"))
EXTENSIONS: Final = (
    "model_repository",
    "model_configuration",
    "statistics",
    "binary_tensor_data",
    "parameters",
    "generate",
)
_TRANSPORT_PARAMETERS: Final = frozenset(
    {"binary_data_output", "triton_enable_empty_final_response"}
)


@dataclass(frozen=True)
class Inference:
    """One request, read from either transport."""

    model: str
    text: str
    parameters: GenerationParameters
    stream: bool | None
    """None: the request leaves it open."""
    tenant: str


def read_inference(
    model: str,
    tensors: Sequence[Tensor],
    parameters: Mapping[str, Any],
    tenant: str | None,
    outputs: Sequence[str] = (),
) -> Inference:
    """Raises `BadRequest` that names the input, output or parameter at fault."""
    by_name = {tensor.name: tensor for tensor in tensors}
    known = dict(_INPUTS)
    for name, tensor in by_name.items():
        if name not in known:
            raise BadRequest(
                f"'{name}' is not an input of model '{model}'; its inputs are "
                + ", ".join(known)
                + ".",
                param=name,
            )
        if tensor.datatype != known[name] or len(tensor.values) != 1:
            raise BadRequest(
                f"input {name} must be one {known[name]} value of shape [1]; the request has "
                f"{tensor.datatype} {list(tensor.shape)}.",
                param=name,
            )
    if "text_input" not in by_name:
        raise BadRequest("The input text_input is missing.", param="text_input")
    for output in outputs:
        if output != OUTPUT:
            raise BadRequest(
                f"'{output}' is not an output of model '{model}'; its output is {OUTPUT}.",
                param=output,
            )
    merged = {n: v for n, v in parameters.items() if n not in _TRANSPORT_PARAMETERS}
    if "sampling_parameters" in by_name:
        merged |= _json_object(by_name["sampling_parameters"])
    # Triton takes what a model has as an input as a parameter, too.
    stream = merged.pop("stream", None)
    if "stream" in by_name:
        stream = by_name["stream"].values[0]
    if stream is not None and not isinstance(stream, bool):
        raise BadRequest("stream must be true or false.", param="stream")
    return Inference(
        model, _text(by_name["text_input"]), read_parameters(merged), stream, tenant_of(tenant)
    )


def read_parameters(parameters: Mapping[str, Any]) -> GenerationParameters:
    try:
        return GenerationParameters.model_validate(parameters)
    except ValidationError as error:
        raise sentence_of(list(error.errors())) from None  # type: ignore[arg-type]


def _text(tensor: Tensor) -> str:
    value = tensor.values[0]
    assert isinstance(value, bytes)
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"input {tensor.name} is not UTF-8: {error.reason} at byte {error.start}.",
            param=tensor.name,
        ) from None


def _json_object(tensor: Tensor) -> Json:
    try:
        return msgspec.json.decode(_text(tensor), type=Json)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadRequest(
            f"input {tensor.name} must be a JSON object: {error}.", param=tensor.name
        ) from None


class InferenceService:
    def __init__(self, backend: Backend, statistics: Statistics, observer: Observer) -> None:
        self.backend = backend
        self._statistics = statistics
        self.observer = observer

    async def run(self, inference: Inference) -> AsyncGenerator[Piece, None]:
        """The answer in pieces; the last one has a finish reason. Raises `ApiError`."""
        arrived_s = time.monotonic()
        model = await self.backend.resolve(inference.model)
        ids = await encode(model.tokenizer, inference.text)
        parameters = inference.parameters
        max_tokens = fit_prompt(model, ids, parameters.max_tokens or _MAX_TOKENS)
        grammar = await check_grammar(parameters.grammar())
        generation = Generation(
            model=model,
            prompt_ids=ids,
            sampling=parameters.sampling(model.tokenizer.bundle, max_tokens, None, grammar),
            stop=parameters.stops(),
            tenant=inference.tenant,
            cache_salt=parameters.cache_salt or "",
        )
        record = StreamRecord(model.card.name, model.card.fleet, arrived_s)
        pieces = run(self.backend, generation, record, self.observer)
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def text(self, inference: Inference) -> str:
        """The whole answer."""
        async with aclosing(self.run(inference)) as pieces:
            return "".join([piece.text async for piece in pieces])

    def check(self, model: str, version: str = "") -> None:
        """Raises `ModelNotFound`, or `BadRequest` for another version."""
        names = [card.name for card in self.backend.cards()]
        if model not in names:
            raise ModelNotFound(model, names)
        if version not in ("", VERSION):
            raise BadRequest(f"Model '{model}' has no version '{version}', only '{VERSION}'.")

    async def model_ready(self, model: str, version: str) -> bool:
        self.check(model, version)
        try:
            await self.backend.resolve(model)
        except ApiError:
            return False
        return self.backend.ready

    def server_metadata(self) -> Json:
        return {"name": "tandem", "version": __version__, "extensions": list(EXTENSIONS)}

    def metadata(self, model: str) -> Json:
        return {
            "name": model,
            "versions": [VERSION],
            "platform": "tandem",
            "inputs": [{"name": n, "datatype": t, "shape": [1]} for n, t in _INPUTS],
            "outputs": [{"name": OUTPUT, "datatype": "BYTES", "shape": [1]}],
        }

    def config(self, model: str) -> Json:
        data_types = {"BYTES": "TYPE_STRING", "BOOL": "TYPE_BOOL"}
        return {
            "name": model,
            "platform": "tandem",
            "backend": "tandem",
            "max_batch_size": 0,
            "input": [
                {"name": n, "data_type": data_types[t], "dims": [1], "optional": n != "text_input"}
                for n, t in _INPUTS
            ],
            "output": [{"name": OUTPUT, "data_type": "TYPE_STRING", "dims": [1]}],
            "model_transaction_policy": {"decoupled": True},
        }

    def statistics(self, model: str = "") -> Json:
        names = [model] if model else [card.name for card in self.backend.cards()]
        return {"model_stats": [self._statistics.of(name, VERSION) for name in names]}

    async def index(self, *, only_ready: bool) -> list[Json]:
        entries = []
        for card in self.backend.cards():
            ready = await self.model_ready(card.name, VERSION)
            state = "READY" if ready else "UNAVAILABLE"
            entries.append({"name": card.name, "version": VERSION, "state": state, "reason": ""})
        return [e for e in entries if e["state"] == "READY" or not only_ready]
