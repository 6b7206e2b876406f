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
    established_replicas: int | None = None
    """How many of `replicas` were Ready at the same time since the size last changed: losing one
    of these makes the pool not Ready, waiting for more does not."""
