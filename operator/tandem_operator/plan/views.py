"""What the plan sees: live objects parsed into frozen values.

Parsers are total over what the API server returns for our kinds; a custom resource that no longer
parses (a newer CRD than this operator) raises pydantic.ValidationError.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tandem_runtime.contract import (
    ANNOTATION_DRAINING,
    ANNOTATION_EXTERNAL_URL,
    ANNOTATION_SERVED_NAMES,
    LABEL_FLEET,
    LABEL_MODEL,
    LABEL_POOL,
    LABEL_REVISION,
    LABEL_ROLE,
)
from tandem_runtime.protocol import PodState

from tandem_operator.api.fleet import FleetSpec, FleetStatus, Latency
from tandem_operator.api.model import ModelSpec, ModelStatus
from tandem_operator.api.pool import PoolSpec, PoolStatus
from tandem_operator.api.scaling_policy import ScalingPolicySpec
from tandem_operator.names import ANNOTATION_DRAINING_SINCE, ANNOTATION_SAFE_TO_EVICT
from tandem_operator.plan.health import Problem, pod_problem
from tandem_operator.plan.nodes.repair import Repair
from tandem_operator.plan.times import to_unix_s
from tandem_operator.resources import FLEETS, MODELS, PODS, POOLS, REVISIONS, Ref

if TYPE_CHECKING:
    from tandem_operator.plan.scaled import Scaled

Body = Mapping[str, Any]


def controller_uid(body: Body, kind: str | None = None) -> str | None:
    """The uid of the object's controller, where it is of that kind."""
    for owner in body["metadata"].get("ownerReferences", ()):
        if owner.get("controller") and kind in (None, owner.get("kind")):
            return str(owner["uid"])
    return None


@dataclass(frozen=True)
class ModelView:
    """A Model."""

    namespace: str
    name: str
    uid: str
    generation: int
    created_s: float
    spec: ModelSpec
    status: ModelStatus

    @property
    def ref(self) -> Ref:
        return Ref(MODELS, self.namespace, self.name, self.uid)


def model_view(body: Body) -> ModelView:
    """Parse a Model."""
    meta = body["metadata"]
    return ModelView(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        generation=meta["generation"],
        created_s=to_unix_s(meta["creationTimestamp"]),
        spec=ModelSpec.model_validate(body["spec"]),
        status=ModelStatus.model_validate(body.get("status") or {}),
    )


@dataclass(frozen=True)
class FleetView:
    """An InferenceFleet."""

    namespace: str
    name: str
    uid: str
    generation: int
    created_s: float
    deleting: bool
    annotations: Mapping[str, str]
    spec: FleetSpec
    status: FleetStatus

    @property
    def ref(self) -> Ref:
        return Ref(FLEETS, self.namespace, self.name, self.uid)


def fleet_view(body: Body) -> FleetView:
    """Parse an InferenceFleet."""
    meta = body["metadata"]
    return FleetView(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        generation=meta["generation"],
        created_s=to_unix_s(meta["creationTimestamp"]),
        deleting="deletionTimestamp" in meta,
        annotations=meta.get("annotations") or {},
        spec=FleetSpec.model_validate(body["spec"]),
        status=FleetStatus.model_validate(body.get("status") or {}),
    )


@dataclass(frozen=True)
class PoolView:
    """A Pool."""

    namespace: str
    name: str
    uid: str
    owner_uid: str | None
    deleting: bool
    generation: int
    spec: PoolSpec
    status: PoolStatus
    body: Body = field(repr=False, compare=False)

    @property
    def ref(self) -> Ref:
        return Ref(POOLS, self.namespace, self.name, self.uid)


def pool_view(body: Body) -> PoolView:
    """Parse a Pool."""
    meta = body["metadata"]
    return PoolView(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        owner_uid=controller_uid(body),
        deleting="deletionTimestamp" in meta,
        generation=meta["generation"],
        spec=PoolSpec.model_validate(body["spec"]),
        status=PoolStatus.model_validate(body.get("status") or {}),
        body=body,
    )


@dataclass(frozen=True)
class ScalingPolicyView:
    """A ScalingPolicy."""

    namespace: str
    name: str
    uid: str
    spec: ScalingPolicySpec


def scaling_policy_view(body: Body) -> ScalingPolicyView:
    """Parse a ScalingPolicy."""
    meta = body["metadata"]
    return ScalingPolicyView(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        spec=ScalingPolicySpec.model_validate(body["spec"]),
    )


@dataclass(frozen=True)
class PodView:
    """A runtime pod."""

    namespace: str
    name: str
    uid: str
    fleet: str
    pool: str
    pool_uid: str | None
    """None: no Pool controls it, whatever its labels say."""
    role: str
    revision: str
    created_s: float
    terminating: bool
    finished: bool
    """Failed or Succeeded: it will never run again."""
    ready: bool
    ip: str | None
    unschedulable: str | None
    """The scheduler's sentence while it finds no node."""
    problem: Problem | None
    draining: str | None
    draining_since_s: float | None
    served_names: str | None
    model: str = ""
    """The Model whose weights it has."""
    unready_s: float | None = None
    """Since when it is not Ready, where the kubelet says so."""
    node: str | None = None
    safe_to_evict: str | None = None
    """The cluster autoscaler's annotation."""
    tolerated: frozenset[str] = frozenset()
    """Keys of the taints that it tolerates; an empty one: all."""

    @property
    def ref(self) -> Ref:
        return Ref(PODS, self.namespace, self.name, self.uid)

    @property
    def waiting_since_s(self) -> float:
        """When a pod that is not Ready began not to be."""
        return self.created_s if self.unready_s is None else self.unready_s

    @property
    def slot(self) -> int:
        """The number at the end of its name; large for a name that has none."""
        match = re.search(r"-(\d+)$", self.name)
        return int(match[1]) if match else 1 << 30

    @property
    def starved(self) -> bool:
        """Whether the scheduler wants resources that no node has free."""
        return self.unschedulable is not None and "Insufficient" in self.unschedulable


def _time(text: str | None) -> float | None:
    """A timestamp that people can edit; None for one that is none."""
    try:
        return to_unix_s(text) if text else None
    except ValueError:
        return None


def pod_view(body: Body) -> PodView:
    """Parse a runtime pod."""
    meta, status, spec = body["metadata"], body.get("status") or {}, body.get("spec") or {}
    labels, annotations = meta.get("labels") or {}, meta.get("annotations") or {}
    conditions = {c["type"]: c for c in status.get("conditions", ())}
    scheduled = conditions.get("PodScheduled", {})
    unschedulable = scheduled.get("status") == "False" and scheduled.get("reason")
    ready_condition = conditions.get("Ready", {})
    finished = status.get("phase") in ("Failed", "Succeeded")
    # A node that was lost leaves the condition behind.
    ready = ready_condition.get("status") == "True" and not finished
    return PodView(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        fleet=labels.get(LABEL_FLEET, ""),
        pool=labels.get(LABEL_POOL, ""),
        pool_uid=controller_uid(body, POOLS.kind),
        role=labels.get(LABEL_ROLE, ""),
        revision=labels.get(LABEL_REVISION, ""),
        created_s=to_unix_s(meta["creationTimestamp"]),
        terminating="deletionTimestamp" in meta,
        finished=finished,
        ready=ready,
        ip=status.get("podIP"),
        unschedulable=str(scheduled.get("message")) if unschedulable == "Unschedulable" else None,
        problem=None if ready else pod_problem(body),
        draining=annotations.get(ANNOTATION_DRAINING),
        draining_since_s=_time(annotations.get(ANNOTATION_DRAINING_SINCE)),
        served_names=annotations.get(ANNOTATION_SERVED_NAMES),
        model=labels.get(LABEL_MODEL, ""),
        safe_to_evict=annotations.get(ANNOTATION_SAFE_TO_EVICT),
        unready_s=None if ready else _time(ready_condition.get("lastTransitionTime")),
        node=spec.get("nodeName"),
        tolerated=frozenset(str(t.get("key") or "") for t in spec.get("tolerations") or ()),
    )


@dataclass(frozen=True)
class RevisionView:
    """A ControllerRevision: one pool's pod template of one revision."""

    namespace: str
    name: str
    uid: str
    pool_uid: str | None
    revision: str
    number: int
    template: Body = field(repr=False, compare=False)

    @property
    def ref(self) -> Ref:
        return Ref(REVISIONS, self.namespace, self.name, self.uid)


def revision_view(body: Body) -> RevisionView:
    """Parse a ControllerRevision that we made."""
    meta = body["metadata"]
    return RevisionView(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        pool_uid=controller_uid(body),
        revision=(meta.get("labels") or {}).get(LABEL_REVISION, ""),
        number=int(body.get("revision", 0)),
        template=(body.get("data") or {}).get("template") or {},
    )


@dataclass(frozen=True)
class GatewayView:
    """The namespace's gateway as fleets see it."""

    available_replicas: int
    url: str
    worry: str | None = None
    """Why its pods cannot be made, in the API server's words."""


def gateway_view(namespace: str, deployment: Body | None, service: Body | None) -> GatewayView:
    """The gateway's state; the URL is the external one where the Service has it."""
    status = (deployment or {}).get("status") or {}
    available = status.get("availableReplicas", 0)
    failures = (c for c in status.get("conditions", ()) if c["type"] == "ReplicaFailure")
    worry = next((str(c.get("message")) for c in failures if c["status"] == "True"), None)
    meta = service["metadata"] if service else {}
    external = (meta.get("annotations") or {}).get(ANNOTATION_EXTERNAL_URL)
    host = external or f"{meta.get('name', 'tandem-gateway')}.{namespace}.svc"
    return GatewayView(available, f"http://{host}", worry)


@dataclass(frozen=True)
class TemplateCheck:
    """What the API server said to a revision's pod."""

    accepted: bool
    reason: str
    sentence: str


@dataclass(frozen=True)
class FleetSnapshot:
    """Everything that a plan for one fleet is made of."""

    namespace: str
    name: str
    now_s: float
    fleet: FleetView | None
    model: ModelView | None = None
    """The fleet's own, if it exists."""
    fleets: tuple[FleetView, ...] = ()
    """All of the namespace."""
    models: tuple[ModelView, ...] = ()
    """All of the namespace."""
    pools: tuple[PoolView, ...] = ()
    pods: tuple[PodView, ...] = ()
    """All with the fleet's label, also those of pools that are gone."""
    revisions: tuple[RevisionView, ...] = ()
    budgets: Mapping[str, Body] = field(default_factory=dict)
    """PodDisruptionBudgets by name."""
    gateway: GatewayView | None = None
    states: Mapping[str, PodState] = field(default_factory=dict)
    """What pods say of themselves, by uid; only those that were asked and answered."""
    checks: Mapping[str, TemplateCheck] = field(default_factory=dict)
    """By pool name and revision, see `check_key`."""
    latency: Latency | None = None
    scaled: Mapping[str, Scaled] = field(default_factory=dict)
    """The last decisions for autoscaled pools, by pool name."""
    refused: str | None = None
    """Why the last plan could not make an object: a quota, an admission policy."""
    drained_nodes: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Nodes that somebody drains, or is about to, with the keys of the taints that say so."""
    gone_nodes: frozenset[str] = frozenset()
    """Nodes that pods still name, and that are no more."""
    repair: Repair = field(default_factory=Repair)
    """Nodes that the NodeHealthPolicy has in repair."""

    def displaces(self, pod: PodView) -> bool:
        """Whether the pod has to go because its node does. One that tolerates the taint stays: its
        replacement could come to the same node, and would have to go as well. From a node in repair
        all go: their replacements keep away from it."""
        if pod.node in self.repair.nodes | self.gone_nodes or pod.uid in self.repair.pods:
            return True
        taints = self.drained_nodes.get(pod.node or "", frozenset())
        return bool(taints - pod.tolerated) and "" not in pod.tolerated


def drained_nodes(nodes: Iterable[Body], keys: Collection[str]) -> Mapping[str, frozenset[str]]:
    """By node, the taints with these keys that keep new pods away."""
    found = {}
    for node in nodes:
        taints = (node.get("spec") or {}).get("taints") or ()
        barring = [t["key"] for t in taints if t.get("effect") in ("NoSchedule", "NoExecute")]
        if wanted := frozenset(key for key in barring if key in keys):
            found[str(node["metadata"]["name"])] = wanted
    return found


def check_key(pool: str, revision: str) -> str:
    """Key of `FleetSnapshot.checks`."""
    return f"{pool}-{revision}"
