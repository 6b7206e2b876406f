"""`NodeHealthPolicy`: what counts as a failing node, what is done about it, and the brakes.

Of the cluster, and there is one: `default`. What each field does: docs/concepts/node-health.md.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tandem_operator.api.meta import ApiModel, Conditions, Rule

POLICY_NAME = "default"
MAX_SECONDS = 604_800
MAX_NODES = 100
"""Nodes in a status, those in repair first; no more are in repair, whatever a percentage says."""
DEFAULT_FOR_SECONDS = 300
"""Of a listed condition or taint that does not say."""
FATAL_XIDS = (48, 63, 64, 74, 79, 95, 119, 120)
"""Memory that cannot be corrected or remapped, NVLink, off the bus, uncontained errors, GSP."""

CONDITION_PATTERN = "^[A-Za-z0-9]([-A-Za-z0-9_./]*[A-Za-z0-9])?$"
"""Kubernetes' own, of condition types."""

Seconds = Annotated[int, Field(ge=0, le=MAX_SECONDS)]
TaintKey = Annotated[str, Field(min_length=1, max_length=316)]
Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class NotReady(ApiModel):
    """The node's own `Ready` is False or Unknown."""

    for_seconds: Seconds = 60


class NodeCondition(ApiModel):
    """A condition that means a failing node, such as node-problem-detector's."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.type != 'Ready'",
            "Ready has a signal of its own: set signals.notReady.forSeconds and remove this entry",
        ),
    )

    type: Annotated[str, Field(min_length=1, max_length=316, pattern=CONDITION_PATTERN)]
    status: Literal["True", "False", "Unknown"]
    """The status that is bad: True of node-problem-detector's, False of those called ...Ready."""
    for_seconds: Seconds | None = None
    """300 without it."""


class NodeTaint(ApiModel):
    """A taint that means a failing node."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.key != 'node.kubernetes.io/unschedulable'",
            "a cordon says that somebody drains the node, and its pods move without a policy; "
            "remove this entry",
        ),
        Rule(
            "self.key != 'node.kubernetes.io/out-of-service'",
            "out-of-service is what a policy does, not what it looks for: see deadNodes.action",
        ),
    )

    key: TaintKey
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Any without it."""
    for_seconds: Seconds | None = None
    """300 without it."""


class Accelerators(ApiModel):
    """Fewer allocatable accelerators than the running pods of Tandem have there: a device plugin
    has given one up, and leaves the pod that uses it alone."""

    for_seconds: Seconds = 60


class Xids(ApiModel):
    """NVIDIA's error codes, by how their counts change: a code that only stays is history."""

    codes: Annotated[
        tuple[Annotated[int, Field(ge=1, le=999)], ...], Field(min_length=1, max_length=64)
    ] = FATAL_XIDS
    count: Annotated[int, Field(ge=1, le=1000)] = 1
    """That many new ones ..."""
    within_seconds: Annotated[int, Field(ge=10, le=MAX_SECONDS)] = 600
    """... in that time."""


class Reports(ApiModel):
    """A runtime pod says that its device fails."""

    for_seconds: Seconds = 30


class Stragglers(ApiModel):
    """A pod whose engine's steps take longer than those of its peers take for the same work."""

    percent: Annotated[int, Field(ge=5, le=500)] = 10
    """By how much, at least."""
    windows: Annotated[int, Field(ge=3, le=100)] = 6
    """In how many windows in a row."""
    window_seconds: Annotated[int, Field(ge=5, le=600)] = 15
    avoid_seconds: Seconds = 86_400
    """How long no pod of Tandem is put on the node of one that was pulled out."""


class Signals(ApiModel):
    """What counts. A part that is left out, `notReady` excepted, does not."""

    not_ready: NotReady = NotReady()
    conditions: Annotated[tuple[NodeCondition, ...], Field(max_length=64)] = ()
    taints: Annotated[tuple[NodeTaint, ...], Field(max_length=64)] = ()
    accelerators: Accelerators | None = None
    xids: Xids | None = None
    reports: Reports | None = None
    stragglers: Stragglers | None = None
    clear_seconds: Annotated[int, Field(ge=1, le=MAX_SECONDS)] = 120
    """A signal that is away for so long is forgotten; shorter gaps do not reset it."""


class Drain(ApiModel):
    """What happens to Tandem's pods on a failing node."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.evictAfterSeconds < self.deadlineSeconds",
            "evictAfterSeconds must be under deadlineSeconds: evictions are tried in between",
        ),
    )

    cordon: bool = True
    """Where the operator may write to nodes; pods of Tandem keep away in any case."""
    evict_after_seconds: Seconds = 300
    """Pods that could not be replaced by then are evicted as far as their budgets allow."""
    deadline_seconds: Annotated[int, Field(ge=31, le=MAX_SECONDS)] = 1800
    """Of evictions. Not under the grace period of any pod there: drainTimeoutSeconds + 30."""
    after_deadline: Literal["Wait", "Delete"] = "Wait"
    """Delete: pods that still serve there are deleted, one of a pool at a time, the last never."""


class DeadNodes(ApiModel):
    """A node that is silent, and none of whose pods answers."""

    action: Literal["Wait", "ForceDelete", "OutOfService"] = "Wait"
    """ForceDelete removes Tandem's pods from the API. OutOfService taints the node, whereupon
    Kubernetes removes all pods and detaches their volumes; only if all others are a DaemonSet's."""
    after_seconds: Annotated[int, Field(ge=30, le=MAX_SECONDS)] = 300
    """Of silence. The machine has to be off by then: nothing here can switch it off."""


class Brakes(ApiModel):
    """Limits over all fleets."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.maxPercent < self.outagePercent",
            "maxPercent must be under outagePercent: from that share on it is taken for an outage, "
            "and nothing is repaired",
        ),
    )

    max_nodes: Annotated[int, Field(ge=1, le=1000)] = 1
    max_percent: Annotated[int, Field(ge=0, le=100)] = 20
    """Of the nodes that carry pods of Tandem; the larger of the two numbers holds."""
    outage_percent: Annotated[int, Field(ge=1, le=100)] = 50
    """When more nodes than that show the same signal, the control plane or the network is the
    likelier fault: nothing new is begun."""
    calm_seconds: Seconds = 120
    """And for so long afterwards."""


class NodeHealthPolicySpec(ApiModel):
    """What counts as a failing node, and what is done about it."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.deadNodes.afterSeconds >= self.signals.notReady.forSeconds",
            "deadNodes.afterSeconds must not be under signals.notReady.forSeconds: a node is "
            "drained before it is given up",
        ),
    )

    mode: Literal["Off", "DryRun", "Active"] = "DryRun"
    """DryRun says in the status what Active would do."""
    signals: Signals = Signals()
    drain: Drain = Drain()
    dead_nodes: DeadNodes = DeadNodes()
    brakes: Brakes = Brakes()


class SeenSignal(ApiModel):
    """One signal of a node, as the operator has seen it."""

    signal: Annotated[str, Field(max_length=330)]
    evidence: Annotated[str, Field(max_length=1024)]
    first_seen: Time
    """Kept while it comes and goes."""
    since: Time | None = None
    """It is there now, since then."""
    gone: Time | None = None
    """It is not, since then."""
    seconds: int = 0
    """How long it was there in all, before `since`."""


Phase = Literal["Suspect", "Held", "DryRun", "Draining", "Drained", "OutOfService", "Released"]


class NodeStatus(ApiModel):
    """A node with signals."""

    name: Annotated[str, Field(max_length=253)]
    uid: Annotated[str, Field(max_length=64)]
    phase: Phase
    since: Time
    """Of the phase; of the repair, for a node in repair."""
    message: Annotated[str, Field(max_length=1024)]
    cordoned: bool = False
    """By us."""
    pods: Annotated[tuple[Annotated[str, Field(max_length=64)], ...], Field(max_length=64)] = ()
    """Uids: these alone leave, the rest of the node stays."""
    signals: Annotated[tuple[SeenSignal, ...], Field(max_length=16)] = ()


class NodeHealthPolicyStatus(ApiModel):
    """What is seen and done."""

    observed_generation: int | None = None
    conditions: Conditions = ()
    carrying: int | None = None
    """Nodes with pods of Tandem."""
    in_repair: int | None = None
    allowed: int | None = None
    """How many may be in repair."""
    outage_since: Time | None = None
    outage_over: Time | None = None
    nodes: Annotated[
        tuple[NodeStatus, ...],
        Field(
            max_length=MAX_NODES,
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            },
        ),
    ] = ()
