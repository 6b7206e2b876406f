"""`Pool`: the pods of one role of a fleet. Made and owned by the operator; users only scale it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tandem_operator.api.fleet import MAX_REPLICAS
from tandem_operator.api.meta import ApiModel, Conditions, NameRef

Role = Literal["prefill", "decode", "both"]


class PoolSpec(ApiModel):
    """What the operator wants of the pool's pods; `replicas` belongs to whoever scales."""

    fleet_ref: NameRef
    role: Role
    replicas: Annotated[int, Field(ge=0, le=MAX_REPLICAS)] = 1
    """Written through /scale only. Fixed by the fleet's `replicas`, where it has one."""
    revision: Annotated[str, Field(max_length=63)]
    """The revision that pods should have; its pod template is the ControllerRevision
    POOL-REVISION."""


class ScalingDecision(ApiModel):
    """One decision to change the pool's size, with the numbers that led to it."""

    time: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    replicas_before: int
    replicas: int
    reason: Annotated[str, Field(max_length=63)]
    shadow: bool = False
    """It was not carried out: the policy only reports."""
    demand: int
    """Prompt tokens per second, or streams."""
    capacity: int
    """Of one replica, in the same unit; 0: not learned yet."""
    need_percent: int
    """Replicas that the load takes at full use, times 100."""
    growth_percent: int
    """What the need was multiplied with for the time that a pod takes to start."""
    latency_milliseconds: int | None = None
    """The percentile as measured."""
    target_milliseconds: int
    startup_seconds: int
    ready: int
    starting: int
    limited_by: Annotated[str, Field(max_length=63)] = ""
    """What cut the size: minReplicas, maxReplicas, step or budget."""
    schedule: Annotated[str, Field(max_length=63)] = ""
    """The schedule that cut it, or else whose bounds held."""


class ScheduleInForce(ApiModel):
    """A schedule of the policy whose bounds hold now, and what they are."""

    name: Annotated[str, Field(max_length=63)]
    min_replicas: int
    max_replicas: int


class PoolScaling(ApiModel):
    """How an autoscaled pool came to its size."""

    decisions: Annotated[tuple[ScalingDecision, ...], Field(max_length=10)] = ()
    """The last ones, newest last."""
    state: Annotated[str, Field(max_length=4096)] = ""
    """What the law remembers, so that another operator goes on from it."""
    stands_back_until: Annotated[str, Field(json_schema_extra={"format": "date-time"})] | None = (
        None
    )
    """Somebody else wrote the pool's size: the policy leaves it alone until then."""
    schedule: ScheduleInForce | None = None
    """Absent where the bounds are the fleet's."""


class PoolStatus(ApiModel):
    """What the pool has."""

    observed_generation: int | None = None
    conditions: Conditions = ()
    replicas: int | None = None
    ready_replicas: int | None = None
    updated_replicas: int | None = None
    """Pods of the revision in spec."""
    selector: str | None = None
    current_revision: str | None = None
    """The last revision that was rolled out completely; lost pods of a halted rollout return to
    it."""
    decided_replicas: int | None = None
    """The size that the fleet decides, as last seen; absent where the Pool's own counts."""
    scaling: PoolScaling | None = None
    """Of an autoscaled pool."""
    established_replicas: int | None = None
    """How many of `replicas` were Ready at the same time since the size last changed: losing one
    of these makes the pool not Ready, waiting for more does not."""
