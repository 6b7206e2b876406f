"""`InferenceFleet`: a model served by a prefill and a decode pool, or by one pool that does both.

Every default is in the schema, except inside list items (a default there keeps GitOps tools
reporting a difference for ever); those are filled in by the plan.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tandem_operator.api.meta import (
    ApiModel,
    Conditions,
    NameRef,
    PartialTemplate,
    Quantity,
    Rule,
    rules,
)

MAX_REPLICAS = 10_000
DEFAULT_ACCELERATOR_PERCENT = 90


class Objective(ApiModel):
    """A latency that most requests keep."""

    percentile: Literal[50, 95] = 95
    target_milliseconds: Annotated[int, Field(ge=1, le=3_600_000)]


class Objectives(ApiModel):
    """The service levels that the fleet is measured against."""

    time_to_first_token: Objective | None = None
    time_per_output_token: Objective | None = None


class Accelerator(ApiModel):
    """The device plugin resource that each pod asks for."""

    resource: Annotated[str, Field(min_length=1, max_length=253)] = "nvidia.com/gpu"
    count: Annotated[int, Field(ge=1, le=64)] = 1
    """More than one share the model by tensor parallelism; status.resolved.tensorParallelSizes of
    the Model says which numbers can."""


class Scaling(ApiModel):
    """An autoscaled pool: its bounds, and the policy by which it follows its load."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.minReplicas <= self.maxReplicas",
            "minReplicas exceeds maxReplicas; lower one or raise the other",
        ),
    )

    min_replicas: Annotated[int, Field(ge=0, le=MAX_REPLICAS)] = 1
    """0: without requests for the policy's windows.idleSeconds the pool has no pods; then the next
    request waits at the gateway until one serves."""
    max_replicas: Annotated[int, Field(ge=1, le=MAX_REPLICAS)]
    policy_ref: NameRef | None = None
    """A ScalingPolicy of this namespace; without it, the defaults of one."""


FixedReplicas = Annotated[
    int,
    Field(
        le=MAX_REPLICAS,
        json_schema_extra=rules(
            Rule(
                "self >= 1",
                "replicas must be at least 1; to stop a pool, leave replicas out and run: "
                "kubectl scale pool NAME --replicas=0",
            )
        ),
    ),
]


class PoolTemplate(ApiModel):
    """One pool of a fleet."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(has(self.replicas) && has(self.scaling))",
            "replicas and scaling exclude each other: keep replicas for a fixed size, scaling "
            "for an automatic one, or neither to let kubectl scale or an HPA set the Pool's size",
        ),
    )

    replicas: FixedReplicas | None = None
    """A fixed size. Without it and without scaling, whoever writes the Pool's /scale owns it."""
    scaling: Scaling | None = None
    accelerator: Accelerator | None = None
    """Without it the pool's pods serve on the CPU."""
    template: PartialTemplate | None = None
    """A partial pod template, merged last: maps deep, lists by name or mountPath."""


_FITTING_FIELDS = {
    "Accelerator": ("percent", ("size", "uri", "volume")),
    "Memory": ("size", ("percent", "uri", "volume")),
    "Disk": ("size and volume", ("percent", "uri")),
    "Remote": ("uri", ("percent", "size", "volume")),
    "Peer": ("nothing beside its name", ("percent", "size", "uri", "volume")),
}


_REMOTE_ONLY = ("secretRef", "ttlSeconds")


class TenantPart(ApiModel):
    """What a tenant has of a tier, in percent of it."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.floorPercent) || has(self.quotaPercent)",
            "a tenant of a tier needs floorPercent, quotaPercent or both",
        ),
        Rule(
            "!has(self.floorPercent) || !has(self.quotaPercent) || "
            "self.floorPercent <= self.quotaPercent",
            "floorPercent exceeds quotaPercent; lower one or raise the other",
        ),
    )

    name: Annotated[str, Field(max_length=256, pattern=r"^[!-~]([ -~]*[!-~])?$")]
    """The header x-tandem-tenant of his requests, letter for letter; default: of those without."""
    floor_percent: Annotated[int, Field(ge=1, le=100)] | None = None
    """Kept for him against others once he has filled it."""
    quota_percent: Annotated[int, Field(ge=0, le=100)] | None = None
    """He never has more, and nothing with 0; no limit without it."""


TenantParts = Annotated[
    tuple[TenantPart, ...],
    Field(
        max_length=64,
        json_schema_extra={
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["name"],
            **rules(
                Rule(
                    "self.filter(t, has(t.floorPercent)).map(t, t.floorPercent).sum() <= 100",
                    "the tenants' floors are more than 100 % of the tier; lower them",
                )
            ),
        },
    ),
]


def _tier_rules() -> tuple[Rule, ...]:
    """For each medium: the fields it has, and what they may say."""
    fitting = tuple(
        Rule(
            f"self.medium != '{medium}' || !({' || '.join(f'has(self.{f})' for f in unfit)})",
            f"a tier of medium {medium} takes {takes}; remove {', '.join(unfit)}",
        )
        for medium, (takes, unfit) in _FITTING_FIELDS.items()
    )
    missing = (
        Rule(
            "self.medium != 'Memory' || has(self.size)",
            "a tier of medium Memory needs size, for example 64Gi",
        ),
        Rule(
            "self.medium != 'Disk' || has(self.size) && has(self.volume)",
            "a tier of medium Disk needs size and volume, for example 500Gi and {emptyDir: {}}",
        ),
        Rule(
            "self.medium != 'Remote' || has(self.uri)",
            "a tier of medium Remote needs uri, for example valkey://valkey.cache:6379",
        ),
        Rule(
            "!has(self.size) || isQuantity(self.size) && quantity(self.size).isGreaterThan("
            "quantity('0'))",
            "size must be a quantity above 0, for example 64Gi",
            "'size ' + self.size + ' is not a quantity above 0; write for example 64Gi'",
        ),
        Rule(
            f"self.medium == 'Remote' || !({' || '.join(f'has(self.{f})' for f in _REMOTE_ONLY)})",
            f"{' and '.join(_REMOTE_ONLY)} are for tiers of medium Remote; remove them",
        ),
        Rule(
            r"!has(self.uri) || self.uri.matches('^(valkey|valkeys|redis|rediss)://[^/@?#]+(/[0-9]+)?$')"
            r" || self.uri.matches('^s3://[^/@?#]+(/[^?#]*)?$')",
            "uri must be valkey://HOST:PORT, redis://HOST:PORT (valkeys:// and rediss:// with TLS) "
            "or s3://BUCKET/PREFIX, without a name, a password or parameters: put credentials "
            "into a Secret and name it in secretRef",
            field_path=".uri",
        ),
        Rule(
            "!has(self.ttlSeconds) || !has(self.uri) || !self.uri.startsWith('s3://')",
            "a bucket forgets by its own lifecycle rules; remove ttlSeconds",
            field_path=".ttlSeconds",
        ),
        Rule(
            "self.medium in ['Memory', 'Disk'] || "
            "!(has(self.tenants) || has(self.defaultQuotaPercent))",
            "tenants and defaultQuotaPercent are for tiers of medium Memory or Disk; remove them",
        ),
    )
    return fitting + missing


class CacheTier(ApiModel):
    """A place for KV cache. The order of tiers follows from their medium."""

    cel: ClassVar[tuple[Rule, ...]] = _tier_rules()

    name: Annotated[str, Field(min_length=1, max_length=63)]
    medium: Literal["Accelerator", "Memory", "Disk", "Remote", "Peer"]
    """Peer: what the caches of the fleet's other pods hold; it takes no room of its own."""
    percent: Annotated[int, Field(ge=1, le=100)] | None = None
    """Share of the memory that weights leave free; 90 without it."""
    size: Quantity | None = None
    """Of each pod."""
    uri: Annotated[str, Field(max_length=1024)] | None = None
    """Of a Remote tier, which all pods share: valkey://HOST:PORT/DATABASE, rediss://HOST:PORT (with
    TLS) or s3://BUCKET/PREFIX."""
    secret_ref: NameRef | None = None
    """Of a Remote tier: a Secret of this namespace with USERNAME, PASSWORD and CA_CERT (PEM), or
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION, ..."""
    ttl_seconds: Annotated[int, Field(ge=60, le=31_536_000)] | None = None
    """For which a Remote tier of Valkey or Redis keeps a page after its last use; 86400 without
    it."""
    volume: PartialTemplate | None = None
    """The volume source of a Disk tier."""
    tenants: TenantParts | None = None
    """Those that have a part of their own of a Memory or Disk tier."""
    default_quota_percent: Annotated[int, Field(ge=0, le=100)] | None = None
    """Of each tenant that is not among them; no limit without it."""


CacheTiers = Annotated[
    tuple[CacheTier, ...],
    Field(
        max_length=8,
        json_schema_extra={
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["name"],
            **rules(
                *(
                    Rule(
                        f"self.filter(t, t.medium == '{medium}').size() <= 1",
                        f"a fleet has one tier of medium {medium}; remove the others",
                    )
                    for medium in _FITTING_FIELDS
                )
            ),
        },
    ),
]


class Rollout(ApiModel):
    """How pods are replaced by those of a new revision; the words of a Deployment."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.maxSurge > 0 || self.maxUnavailable > 0",
            "maxSurge and maxUnavailable are both 0: no pod could ever be replaced; "
            "set one to at least 1",
        ),
    )

    max_surge: Annotated[int, Field(ge=0, le=MAX_REPLICAS)] = 1
    """Pods of a pool above its size while it rolls out."""
    max_unavailable: Annotated[int, Field(ge=0, le=MAX_REPLICAS)] = 0
    """Pods of a pool that may be missing while it rolls out."""
    progress_deadline_seconds: Annotated[int, Field(ge=1, le=86_400)] = 1800
    """A new pod that is not Ready by then halts the rollout."""


class Disruption(ApiModel):
    """How pods leave."""

    max_unavailable: Annotated[int, Field(ge=0, le=MAX_REPLICAS)] = 0
    """Written into each pool's PodDisruptionBudget; with 0 a pod is replaced before it leaves."""
    drain_timeout_seconds: Annotated[int, Field(ge=1, le=86_400)] = 600
    """How long a leaving pod may finish its streams."""


class FleetSpec(ApiModel):
    """Which model, how many pods of which kind, and how they are replaced."""

    model_ref: NameRef
    objectives: Objectives | None = None
    prefill: PoolTemplate | None = None
    """Without it the decode pool computes prompts too (aggregated serving)."""
    decode: PoolTemplate
    cache_tiers: CacheTiers | None = None
    rollout: Rollout = Rollout()
    disruption: Disruption = Disruption()


class PoolCount(ApiModel):
    """One pool in the fleet's status."""

    replicas: int
    """Pods that the pool should have."""
    ready_replicas: int
    """Ready pods, of any revision."""
    ready: str
    """For people, such as 2/2."""


class Percentiles(ApiModel):
    """Of one latency, over the last minute, to two digits."""

    p50_microseconds: int
    p95_microseconds: int


class Latency(ApiModel):
    """What the gateways measured."""

    time_to_first_token: Percentiles
    time_per_output_token: Percentiles | None = None
    """Of answers of at least two tokens; left out where there was none."""


class FleetRevision(ApiModel):
    """Which revision should serve, and which one does."""

    target: str
    serving: str | None = None
    """The last revision that was rolled out completely."""
    spec: str | None = None
    """What the spec asks for; differs from target after `tandem rollout undo`."""
    restarted_at: str | None = None
    """The restart that this status takes into account: annotations have no generation."""


class FleetStatus(ApiModel):
    """What serves now."""

    observed_generation: int | None = None
    conditions: Conditions = ()
    url: str | None = None
    """Where clients reach the fleet's gateway."""
    served_names: tuple[str, ...] | None = None
    revision: FleetRevision | None = None
    prefill: PoolCount | None = None
    decode: PoolCount | None = None
    latency: Latency | None = None
    """Written at most every 30 s and on a change over 10 %; dropped when nothing is asked."""
    ttft: str | None = None
    """latency.timeToFirstToken's 95th percentile for people, such as 120ms."""
    tpot: str | None = None
    """latency.timePerOutputToken's 95th percentile for people, such as 8.5ms."""


def tier_of(spec: FleetSpec, medium: str) -> CacheTier | None:
    """The fleet's tier of this medium."""
    return next((tier for tier in spec.cache_tiers or () if tier.medium == medium), None)


def accelerator_percent(spec: FleetSpec) -> int:
    """Share of free accelerator memory that holds KV cache."""
    tier = tier_of(spec, "Accelerator")
    return tier.percent if tier and tier.percent is not None else DEFAULT_ACCELERATOR_PERCENT
