"""`ScalingPolicy`: how autoscaled pools of a namespace follow their load.

Every field has a default, so a policy states only what differs. What a value does to the size of a
pool is in docs/concepts/autoscaling.md.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tandem_operator.api.fleet import MAX_REPLICAS, Objectives
from tandem_operator.api.meta import ApiModel, Conditions, Rule, rules

MAX_SECONDS = 86_400
MAX_WINDOW_SECONDS = 604_800
Percent = Annotated[int, Field(ge=1, le=100)]


class Bands(ApiModel):
    """Between low and high the size stays as it is."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.lowPercent < self.highPercent",
            "lowPercent must be under highPercent: a size between the bands is one that stays",
        ),
    )

    high_percent: Percent = 95
    """A load over this share of what the replicas can take adds replicas."""
    low_percent: Percent = 75
    """Replicas are removed only if the load stays under this share of what the others can take."""
    tolerance_percent: Annotated[int, Field(ge=0, le=100)] = 10
    """By how much a percentile may exceed its target before that corrects the learned capacity."""


class Windows(ApiModel):
    """Times that the law looks over."""

    load_seconds: Annotated[int, Field(ge=10, le=3600)] = 60
    """Bursts of up to this length are provided for."""
    hold_seconds: Annotated[int, Field(ge=0, le=MAX_SECONDS)] | None = None
    """How long a need must be gone before replicas are removed; without it, twice the time
    that a pod takes to start."""
    idle_seconds: Annotated[int, Field(ge=30, le=MAX_SECONDS)] = 600
    """Without a request for that long a pool with minReplicas 0 goes to zero."""
    startup_seconds: Annotated[int, Field(ge=1, le=MAX_SECONDS)] = 100
    """The time that a pod takes to start, until it has been measured."""


class StepOut(ApiModel):
    """What one decision adds at most: the larger of the two."""

    replicas: Annotated[int, Field(ge=1, le=MAX_REPLICAS)] = 8
    percent: Annotated[int, Field(ge=0, le=1000)] = 100


class StepIn(ApiModel):
    """What one decision removes at most: the larger of the two; and how often."""

    replicas: Annotated[int, Field(ge=1, le=MAX_REPLICAS)] = 1
    percent: Annotated[int, Field(ge=0, le=100)] = 25
    interval_seconds: Annotated[int, Field(ge=0, le=MAX_SECONDS)] = 60


class Steps(ApiModel):
    """Limits of one decision. minReplicas and maxReplicas hold whatever these say."""

    scale_out: StepOut = StepOut()
    scale_in: StepIn = StepIn()


class Forecast(ApiModel):
    """Provide for the load that is likely by the time that a new pod serves."""

    percent: Annotated[int, Field(ge=0, le=99)] = 90
    """At 90 work that misses its target is worth nine times the replicas that would have kept it;
    0: only the load of now counts."""


Query = Annotated[str, Field(min_length=1, max_length=2048)]


class Promql(ApiModel):
    """Queries instead of the built-in ones, each with one number as its answer. $fleet and $pool
    are the names; every selector is confined to the policy's namespace."""

    time_to_first_token: Query | None = None
    """Milliseconds, at the percentile that the objective names."""
    time_per_output_token: Query | None = None
    """Likewise."""
    prompt_tokens_per_second: Query | None = None
    """That arrive and are in no cache."""
    running_requests: Query | None = None
    waiting_requests: Query | None = None


class ScheduleBounds(ApiModel):
    """What a pool's size may be in a window, within the bounds that its fleet gives it."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.minReplicas) || has(self.maxReplicas)",
            "give minReplicas, maxReplicas or both: what a window changes",
        ),
        Rule(
            "!has(self.minReplicas) || !has(self.maxReplicas) || "
            "self.minReplicas <= self.maxReplicas",
            "minReplicas exceeds maxReplicas; lower one or raise the other",
        ),
    )

    min_replicas: Annotated[int, Field(ge=0, le=MAX_REPLICAS)] | None = None
    """So many are Ready when the window begins: they are started ahead."""
    max_replicas: Annotated[int, Field(ge=1, le=MAX_REPLICAS)] | None = None


WindowSeconds = Annotated[
    int,
    Field(
        ge=60,
        json_schema_extra=rules(
            Rule(
                f"self <= {MAX_WINDOW_SECONDS}",
                f"durationSeconds must be at most {MAX_WINDOW_SECONDS}, a week; for longer, change "
                "the bounds in the fleet",
            )
        ),
    ),
]
Cron = Annotated[
    str,
    Field(
        min_length=1,
        max_length=128,
        json_schema_extra=rules(
            Rule(
                "self.matches('^ *[0-9*/,A-Za-z#-]+( +[0-9*/,A-Za-z#-]+){4} *$')",
                "cron must have five fields, minute, hour, day of month, month and day of week, "
                'such as "0 8 * * 1-5"',
            )
        ),
    ),
]


class Schedule(ApiModel):
    """Windows of time in which pools have other bounds."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.prefill) || has(self.decode)",
            "give prefill, decode or both: the pools whose bounds are others in a window",
        ),
    )

    name: Annotated[
        str, Field(min_length=1, max_length=63, pattern="^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")
    ]
    """For people: decisions name it."""
    cron: Cron
    """When a window begins: minute, hour, day of month, month, day of week."""
    duration_seconds: WindowSeconds
    """How long it lasts."""
    time_zone: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Of the IANA database, such as Europe/Berlin; without it, UTC."""
    prefill: ScheduleBounds | None = None
    decode: ScheduleBounds | None = None
    """Also of a pool that does both."""


class ScalingPolicySpec(ApiModel):
    """How pools that refer to this policy scale."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.schedules) || "
            "self.schedules.all(s, self.schedules.exists_one(t, t.name == s.name))",
            "two schedules have the same name; decisions name the one that counts, so each needs "
            "its own",
        ),
    )

    mode: Literal["Active", "Shadow"] = "Active"
    """Shadow decides and reports in the fleet's status, and leaves every size as it is."""
    objectives: Objectives | None = None
    """Targets of the law; without it, the fleet's objectives."""
    gpu_budget: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Accelerators that the pools of one fleet with this policy have together. A pod without an
    accelerator counts as one."""
    bands: Bands = Bands()
    windows: Windows = Windows()
    steps: Steps = Steps()
    forecast: Forecast = Forecast()
    schedules: Annotated[tuple[Schedule, ...], Field(max_length=16)] | None = None
    """Where windows overlap, the one that is listed last counts, alone, for the pools it names."""
    promql: Promql | None = None
    """Only with a Prometheus in the operator's settings."""


class ScalingPolicyStatus(ApiModel):
    """Empty: what a policy does is in the status of its fleets and their Pools."""

    observed_generation: int | None = None
    conditions: Conditions = ()
