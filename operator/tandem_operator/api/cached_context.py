"""`CachedContext`: a long text that is prefilled once and kept for the requests that name it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tandem_operator.api.meta import ApiModel, Conditions, Name, NameRef, Rule, rules

MAX_TEXT = 1_000_000
"""An object of the API server holds a little more."""


class ConfigMapKey(ApiModel):
    """A key of a ConfigMap of the same namespace."""

    name: Name
    key: Annotated[str, Field(min_length=1, max_length=253)]


class ClaimFile(ApiModel):
    """A file on a PersistentVolumeClaim that the fleet's pods mount at /mnt/tandem/pvc/CLAIM, by
    its template or for its Model."""

    claim_name: Name
    path: Annotated[
        str,
        Field(
            min_length=1,
            max_length=1024,
            json_schema_extra=rules(
                Rule(
                    "!self.startsWith('/') && !self.contains('..')",
                    "path must be relative to the claim's root, without ..",
                )
            ),
        ),
    ]


class CachedContextSpec(ApiModel):
    """What is kept, for which fleet, where and until when."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.fleetRef) != has(self.modelRef)",
            "give fleetRef or modelRef: one of them",
        ),
        Rule(
            "[has(self.text), has(self.configMap), has(self.url), has(self.file)]"
            ".exists_one(given, given)",
            "give text, configMap, url or file: one of them",
        ),
    )

    fleet_ref: NameRef | None = None
    """The fleet that keeps it and answers with it."""
    model_ref: NameRef | None = None
    """Instead: the oldest fleet that serves this Model."""
    text: Annotated[str, Field(min_length=1, max_length=MAX_TEXT)] | None = None
    """The content, or:"""
    config_map: ConfigMapKey | None = None
    """where it is. Read again every few minutes: a change is prefilled and takes its place."""
    url: (
        Annotated[
            str,
            Field(
                min_length=1,
                max_length=2048,
                json_schema_extra=rules(
                    Rule("self.matches('^https?://[^/]+')", "url must be https://HOST/PATH")
                ),
            ),
        ]
        | None
    ) = None
    """Read by a gateway, once for each text, which has to be UTF-8 and at most 32 MiB."""
    file: ClaimFile | None = None
    """On a volume that the fleet's pods mount, read likewise."""
    role: Literal["system", "user", "prompt"] = "system"
    """Whose message the text is, at the beginning of every conversation; prompt: no message, the
    text as it is, for /v1/completions."""
    tier: Literal["Accelerator", "Memory", "Disk"] | None = None
    """Where it is kept; without it, in each pod's first tier below the accelerator."""
    copies: Annotated[int, Field(ge=1, le=64)] = 1
    """Pods that keep it."""
    ttl_seconds: Annotated[int, Field(ge=1, le=366 * 86_400)] | None = None
    """Since the object was created; without it, for as long as the object exists."""
    tenant: Annotated[str, Field(min_length=1, max_length=256)] = "default"
    """Whose requests may use it (x-tandem-tenant); for all others it does not exist."""


class Content(ApiModel):
    """What was read last."""

    digest: str
    loaded_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class CachedContextStatus(ApiModel):
    """What pods have of it. Numbers of requests are those since the gateways started."""

    observed_generation: int | None = None
    conditions: Conditions = ()
    fleet: str | None = None
    content: Content | None = None
    copies: str | None = None
    """Ready and wanted, such as 1/2."""
    pods: tuple[str, ...] = ()
    """That keep it."""
    tier: str | None = None
    tokens: int | None = None
    bytes: int | None = None
    """Of KV, all copies together."""
    expiration_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})] | None = None
    hits: int | None = None
    """Requests that were answered with it, to two digits; the same for the following."""
    cached_tokens: int | None = None
    saved_seconds: int | None = None
    """Of prefill."""
    measured_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})] | None = None
    """When these were written last."""
