"""What the plan for nodes sees: nodes, the policy, and Tandem's pods on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tandem_runtime.contract import (
    ANNOTATION_DRAINING,
    ANNOTATION_SLOWER_PERCENT,
    COMPONENT_RUNTIME,
    LABEL_COMPONENT,
    LABEL_FLEET,
    LABEL_POOL,
)

from tandem_operator.api.node_health import NodeHealthPolicySpec, NodeHealthPolicyStatus
from tandem_operator.names import (
    ANNOTATION_CORDONED,
    ANNOTATION_OUT_OF_SERVICE,
    ANNOTATION_REPAIR_PAUSED,
)
from tandem_operator.plan.views import Body
from tandem_operator.resources import NODE_HEALTH_POLICIES, NODES, PODS, Ref

CORDON_TAINT = "node.kubernetes.io/unschedulable"
OUT_OF_SERVICE_TAINT = "node.kubernetes.io/out-of-service"


@dataclass(frozen=True)
class NodeView:
    """A node."""

    name: str
    uid: str
    version: str
    """metadata.resourceVersion: what is written is written to the node as it was seen."""
    unschedulable: bool = False
    taints: tuple[tuple[str, str, str], ...] = ()
    """Key, value, effect."""
    conditions: Mapping[str, str] = field(default_factory=dict)
    """Status by type."""
    allocatable: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def ref(self) -> Ref:
        return Ref(NODES, "", self.name, self.uid)

    @property
    def silent(self) -> bool:
        """Nobody there reports."""
        return self.conditions.get("Ready") == "Unknown"

    @property
    def cordoned_by_us(self) -> bool:
        return ANNOTATION_CORDONED in self.annotations

    @property
    def given_up_by_us(self) -> bool:
        return ANNOTATION_OUT_OF_SERVICE in self.annotations

    @property
    def paused(self) -> bool:
        return is_paused(self.annotations)


def is_paused(annotations: Mapping[str, str]) -> bool:
    """Whether somebody wants no repair to begin or to go further."""
    return annotations.get(ANNOTATION_REPAIR_PAUSED, "false").lower() != "false"


def node_view(body: Body) -> NodeView:
    """Parse a node, whole or as the watch keeps it."""
    meta, spec, status = body["metadata"], body.get("spec") or {}, body.get("status") or {}
    taints = spec.get("taints") or ()
    return NodeView(
        name=meta["name"],
        uid=meta["uid"],
        version=str(meta.get("resourceVersion", "")),
        unschedulable=bool(spec.get("unschedulable")),
        taints=tuple((t["key"], t.get("value") or "", t.get("effect") or "") for t in taints),
        conditions={c["type"]: c["status"] for c in status.get("conditions") or ()},
        allocatable={k: str(v) for k, v in (status.get("allocatable") or {}).items()},
        annotations=meta.get("annotations") or {},
    )


@dataclass(frozen=True)
class PolicyView:
    """The NodeHealthPolicy."""

    name: str
    uid: str
    generation: int
    annotations: Mapping[str, str]
    spec: NodeHealthPolicySpec
    status: NodeHealthPolicyStatus

    @property
    def ref(self) -> Ref:
        return Ref(NODE_HEALTH_POLICIES, "", self.name, self.uid)


def policy_view(body: Body) -> PolicyView:
    """Parse a NodeHealthPolicy."""
    meta = body["metadata"]
    return PolicyView(
        name=meta["name"],
        uid=meta["uid"],
        generation=meta["generation"],
        annotations=meta.get("annotations") or {},
        spec=NodeHealthPolicySpec.model_validate(body["spec"]),
        status=NodeHealthPolicyStatus.model_validate(body.get("status") or {}),
    )


@dataclass(frozen=True)
class PlacedPod:
    """A pod of Tandem that has a node."""

    namespace: str
    name: str
    uid: str
    node: str
    runtime: bool
    """Of a fleet; else a gateway or a resolver."""
    fleet: str
    pool: str
    ready: bool
    terminating: bool
    grace_s: int
    """terminationGracePeriodSeconds."""
    draining: bool = False
    """Its fleet empties it already, which has a time limit of its own."""
    finalizers: tuple[str, ...] = ()
    accelerators: Mapping[str, int] = field(default_factory=dict)
    """What it has, by resource."""
    ip: str | None = None
    slower_percent: str | None = None
    """As it is annotated: it gets less traffic."""

    @property
    def ref(self) -> Ref:
        return Ref(PODS, self.namespace, self.name, self.uid)


def placed_pods(bodies: Iterable[Body]) -> tuple[PlacedPod, ...]:
    """Those that have a node and have not ended."""
    return tuple(
        _placed(body)
        for body in bodies
        if (body.get("spec") or {}).get("nodeName")
        and (body.get("status") or {}).get("phase") not in ("Failed", "Succeeded")
    )


def _placed(body: Body) -> PlacedPod:
    meta, spec, status = body["metadata"], body["spec"], body.get("status") or {}
    labels = meta.get("labels") or {}
    conditions = {c["type"]: c["status"] for c in status.get("conditions") or ()}
    return PlacedPod(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        node=spec["nodeName"],
        runtime=labels.get(LABEL_COMPONENT) == COMPONENT_RUNTIME,
        fleet=labels.get(LABEL_FLEET, ""),
        pool=labels.get(LABEL_POOL, ""),
        ready=conditions.get("Ready") == "True",
        terminating="deletionTimestamp" in meta,
        grace_s=int(spec.get("terminationGracePeriodSeconds") or 30),
        draining=ANNOTATION_DRAINING in (meta.get("annotations") or {}),
        finalizers=tuple(meta.get("finalizers") or ()),
        accelerators=_accelerators(spec),
        ip=status.get("podIP"),
        slower_percent=(meta.get("annotations") or {}).get(ANNOTATION_SLOWER_PERCENT),
    )


def _accelerators(spec: Body) -> dict[str, int]:
    """Extended resources, which are whole numbers; limits and requests of those are equal."""
    counts: dict[str, int] = {}
    for container in spec.get("containers") or ():
        for resource, amount in ((container.get("resources") or {}).get("limits") or {}).items():
            if "/" in resource and str(amount).isdigit():
                counts[resource] = counts.get(resource, 0) + int(amount)
    return counts


@dataclass(frozen=True)
class Straggler:
    """A pod that was slower than its peers for long enough."""

    pod_uid: str
    evidence: str


@dataclass(frozen=True)
class NodesSnapshot:
    """Everything that a plan for the nodes is made of."""

    now_s: float
    policy: PolicyView | None
    nodes: tuple[NodeView, ...] = ()
    pods: tuple[PlacedPod, ...] = ()
    may_write: bool = False
    """Whether the operator has been given the right to write to nodes."""
    answered: frozenset[str] = frozenset()
    """Uids of pods on silent nodes that answer all the same."""
    strangers: Mapping[str, int] = field(default_factory=dict)
    """By node, pods that are neither ours nor a DaemonSet's; only of nodes that were asked for."""
    refusals: Mapping[str, str] = field(default_factory=dict)
    """Why evictions were refused last, by pod uid."""
    xids: Mapping[str, Mapping[int, tuple[float, ...]]] = field(default_factory=dict)
    """By node and code, when its count rose, once for each."""
    reports: Mapping[str, str] = field(default_factory=dict)
    """By pod uid, what is wrong with its device in its own words."""
    stragglers: tuple[Straggler, ...] = ()
    suspected: Mapping[str, int] = field(default_factory=dict)
    """By pod uid, by how many percent it seems to be slower than its peers."""
