"""Nodes, pods and a NodeHealthPolicy for tests of the plan: what is planned happens at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tandem_operator.api.node_health import (
    NodeHealthPolicySpec,
    NodeHealthPolicyStatus,
    NodeStatus,
)
from tandem_operator.plan.actions import (
    Annotate,
    Delete,
    Evict,
    Notify,
    PatchNode,
    Plan,
    WriteStatus,
)
from tandem_operator.plan.nodes.plan import plan_nodes
from tandem_operator.plan.nodes.repair import IN_REPAIR
from tandem_operator.plan.nodes.view import (
    NodesSnapshot,
    NodeView,
    PlacedPod,
    PolicyView,
)
from tandem_runtime.contract import ANNOTATION_SLOWER_PERCENT

NOW_S = 1_700_000_000.0
GPU = "nvidia.com/gpu"


CONDITIONS = {
    "signals": {
        "conditions": [
            {"type": "KernelDeadlock", "status": "True", "forSeconds": 30},
            {"type": "StorageReady", "status": "False"},
        ]
    }
}


@dataclass
class Cluster:
    """Nodes with one decode pod each, and a policy; what is planned is carried out at once.

    Pods leave when a test says so: that is their fleets' business.
    """

    size: int = 4
    spec: Mapping[str, Any] = field(default_factory=dict)
    may_write: bool = True

    def __post_init__(self) -> None:
        self.now_s = NOW_S
        self.nodes = {f"n{i}": node(f"n{i}") for i in range(self.size)}
        self.pods = {f"p{i}": pod(f"p{i}", f"n{i}") for i in range(self.size)}
        self.facts: dict[str, Any] = {}
        self.annotations: dict[str, str] = {}
        self.status = NodeHealthPolicyStatus()
        self.notes: list[tuple[str, str]] = []
        self.policy_gone = False

    @property
    def snapshot(self) -> NodesSnapshot:
        spec = NodeHealthPolicySpec.model_validate({"mode": "Active", **self.spec})
        policy = PolicyView("default", "u", 1, self.annotations, spec, self.status)
        return NodesSnapshot(
            now_s=self.now_s,
            policy=None if self.policy_gone else policy,
            nodes=tuple(self.nodes.values()),
            pods=tuple(self.pods.values()),
            may_write=self.may_write,
            **self.facts,
        )

    def look(self, seconds: float = 0.0) -> Plan:
        """Some time later: one plan, carried out."""
        self.now_s += seconds
        plan = plan_nodes(self.snapshot)
        for action in plan.actions:
            match action:
                case WriteStatus(_, status):
                    self.status = NodeHealthPolicyStatus.model_validate(status)
                case PatchNode(target, version, change):
                    assert self.nodes[target.name].version == version
                    self.patch(target.name, change)
                case Notify(_, _, reason, note):
                    self.notes.append((reason, note))
                case Annotate(target, annotations):
                    percent = annotations[ANNOTATION_SLOWER_PERCENT]
                    was = self.pods[target.name]
                    self.pods[target.name] = replace(was, slower_percent=percent)
                case Delete(target, grace_s=0):
                    self.pods.pop(target.name)
        return plan

    def patch(self, name: str, change: Mapping[str, Any]) -> None:
        was = self.nodes[name]
        merged = {**was.annotations, **change["metadata"].get("annotations", {})}
        spec = change.get("spec", {})
        taints = spec.get("taints")
        self.nodes[name] = replace(
            was,
            version=str(int(was.version) + 1),
            annotations={k: v for k, v in merged.items() if v is not None},
            unschedulable=bool(spec.get("unschedulable", was.unschedulable)),
            taints=was.taints
            if taints is None
            else tuple((t["key"], t.get("value", ""), t["effect"]) for t in taints),
        )

    def condition(self, name: str, type_: str, status: str) -> None:
        was = self.nodes[name]
        self.nodes[name] = replace(was, conditions={**was.conditions, type_: status})

    def cordon(self, name: str, on: bool = True) -> None:
        """A person does."""
        self.nodes[name] = replace(self.nodes[name], unschedulable=on)

    def silence(self, *names: str) -> None:
        for name in names:
            self.condition(name, "Ready", "Unknown")

    def recover(self, *names: str) -> None:
        for name in names:
            self.condition(name, "Ready", "True")

    def entry(self, name: str) -> NodeStatus | None:
        return next((e for e in self.status.nodes if e.name == name), None)

    def expect(self, name: str) -> NodeStatus:
        """What the status says of a node that has to be in it."""
        entry = self.entry(name)
        assert entry is not None, f"the status has no {name}"
        return entry

    def phase(self, name: str) -> str | None:
        entry = self.entry(name)
        return entry.phase if entry else None

    @property
    def in_repair(self) -> set[str]:
        return {e.name for e in self.status.nodes if e.phase in IN_REPAIR}

    @property
    def cordoned(self) -> set[str]:
        return {n.name for n in self.nodes.values() if n.unschedulable}

    def says(self, type_: str) -> tuple[str, str]:
        """Reason and message of a condition of the policy."""
        found = {c.type: (c.reason, c.message) for c in self.status.conditions}
        return found.get(type_, ("", ""))


def node(name: str, **changes: Any) -> NodeView:
    made = NodeView(
        name=name,
        uid=f"uid-{name}",
        version="1",
        conditions={"Ready": "True", "KernelDeadlock": "False", "StorageReady": "True"},
        allocatable={GPU: "8"},
    )
    return replace(made, **changes)


def pod(name: str, on: str, **changes: Any) -> PlacedPod:
    made = PlacedPod(
        namespace="team",
        name=name,
        uid=f"uid-{name}",
        node=on,
        runtime=True,
        fleet="chat",
        pool="chat-decode",
        ready=True,
        terminating=False,
        grace_s=630,
        accelerators={GPU: 1},
        ip="127.0.0.1",
    )
    return replace(made, **changes)


def steps(plan: Plan) -> list[PatchNode | Evict | Delete]:
    """What a plan does to nodes and pods."""
    return [a for a in plan.actions if isinstance(a, PatchNode | Evict | Delete)]


def names(found: Iterable[PatchNode | Evict | Delete]) -> list[tuple[str, str]]:
    """What happens to which pod."""
    return [(type(s).__name__, s.target.name) for s in found if not isinstance(s, PatchNode)]
