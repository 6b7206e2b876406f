"""Parameters of a generation that all protocols share, checked once."""

from __future__ import annotations

import random
from hashlib import blake2b
from typing import Annotated, Final

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tandem_runtime.frontend.errors import BadRequest
from tandem_runtime.frontend.structured import StructuredOutputs
from tandem_runtime.protocol import Sampling, TokenizerBundle

MAX_BODY_BYTES: Final = 64 << 20
"""The largest request that is read into memory, HTTP or gRPC."""


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair; no tokenizer can read it.
        raise ValueError(f"half a surrogate pair at character {error.start}") from None
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
"""Limits on its length stand before the validator, or pydantic counts items for characters."""
MaxTokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
StopString = Annotated[str, Field(max_length=1024), AfterValidator(_whole_characters)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
BiasedToken = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Salt = Annotated[str, Field(max_length=256), AfterValidator(_whole_characters)]

UNION_SENTENCES = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of lists of token ids, "
    "at most 256 strings or lists",
    "stop": "a string or a list of at most 16 strings, each of at most 1024 characters",
    "tool_choice": "none, auto, required or {type: function, function: {name: ...}}",
    "json": "a JSON schema: an object, or its text",
    "content": "a string or a list of {type: text, text: ...} parts",
}
"""For fields of several types pydantic complains once for each; one sentence says it all."""


class GenerationParameters(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="Extension: sample of the k likeliest tokens; 0 and -1: of all."
    )
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        None, description="Extension: least probability, as a share of the likeliest token's."
    )
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = (
        Field(None, description="Extension: over 1, tokens of prompt and answer become rarer.")
    )
    logit_bias: Annotated[dict[BiasedToken, Bias], Field(max_length=1024)] | None = None
    max_tokens: MaxTokens | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        None, description="Extension: no end token and none of stop_token_ids before."
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    ignore_eos: bool | None = Field(None, description="Extension: generate up to max_tokens.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = Field(
        None, description="Extension: token ids that end the answer."
    )
    cache_salt: Salt | None = Field(
        None,
        description="Extension: share the prefix cache only with requests of the same salt.",
    )

    structured_outputs: StructuredOutputs | None = Field(
        None, description="Extension: what the answer must be."
    )

    def grammar(self) -> str:
        """Empty: any answer. Raises `BadRequest`."""
        return "" if self.structured_outputs is None else self.structured_outputs.source()

    def stops(self) -> tuple[str, ...]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if "" in stop:
            raise BadRequest("stop holds an empty string; leave it out.", param="stop")
        return tuple(stop)

    def sampling(
        self, bundle: TokenizerBundle, max_tokens: int, logprobs: int | None, grammar: str = ""
    ) -> Sampling:
        """Complete: what the request left open is decided here, a seed too."""
        min_tokens, ends = self.min_tokens or 0, tuple(self.stop_token_ids or ())
        if grammar and (min_tokens or self.ignore_eos):
            raise BadRequest(
                "An answer that follows a grammar ends with it: leave out min_tokens and "
                "ignore_eos.",
                param="min_tokens" if min_tokens else "ignore_eos",
            )
        if min_tokens > max_tokens:
            raise BadRequest(
                f"min_tokens is {min_tokens}, but at most {max_tokens} are generated.",
                param="min_tokens",
            )
        if min_tokens and not self.ignore_eos:
            ends += bundle.eos_token_ids
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        outside = next((token for token in bias if token >= bundle.vocab_size), None)
        if outside is not None:
            raise BadRequest(
                f"logit_bias has the token id {outside}; this model's ids are 0 to "
                f"{bundle.vocab_size - 1}.",
                param="logit_bias",
            )
        seed = random.getrandbits(63) if self.seed is None else self.seed & (2**63 - 1)
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=seed,
            ignore_eos=self.ignore_eos or False,
            stop_token_ids=ends,
            logprobs=logprobs,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple(bias.items()),
            min_tokens=min_tokens,
            grammar=grammar,
        )


def reseeded(sampling: Sampling, choice: int) -> Sampling:
    """Of the `choice`-th answer to one request: another seed, which follows from the first."""
    digest = blake2b(f"{sampling.seed}/{choice}".encode(), digest_size=8).digest()
    return msgspec.structs.replace(sampling, seed=int.from_bytes(digest, "big") >> 1)


def sentence_of(errors: list[dict[str, object]]) -> BadRequest:
    """pydantic's first error as one sentence that names the parameter."""
    first = errors[0]
    path = _path(first)
    kind, message = str(first["type"]), str(first["msg"])
    if kind == "json_invalid":
        context = first.get("ctx")
        reason = context["error"] if isinstance(context, dict) else message
        return BadRequest(f"The body is not JSON: {reason} at character {path[-1]}.")
    for n, name in enumerate(path):
        if name in UNION_SENTENCES and (kind != "missing" or n + 1 < len(path)):
            param = ".".join(path[: n + 1])
            broken = _broken_limit([e for e in errors if _path(e)[: n + 1] == path[: n + 1]])
            return BadRequest(f"{param} must be {UNION_SENTENCES[name]}{broken}.", param=param)
    param = ".".join(path)
    what = param or "The body"
    if kind == "missing":
        return BadRequest(f"{what} is missing.", param=param or None)
    if kind == "extra_forbidden":
        return BadRequest(f"{what} is not a parameter of this endpoint.", param=param)
    message = message.replace(" after validation", "")
    return BadRequest(f"{what}: {message[0].lower()}{message[1:]}.", param=param or None)


def _path(error: dict[str, object]) -> list[str]:
    location = error["loc"]
    assert isinstance(location, tuple)
    return [str(part) for part in location if part != "body"]


def _broken_limit(errors: list[dict[str, object]]) -> str:
    """By how much a value of several types is too long, if that is what is wrong with it."""
    for error in errors:
        value = error["input"]
        if error["type"] == "too_long" and isinstance(value, list):
            return f"; it has {len(value)} entries"
        if error["type"] == "string_too_long" and isinstance(value, str):
            return f"; one has {len(value)}"
    return ""
