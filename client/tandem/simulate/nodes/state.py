"""What a simulated cluster is made of, and what is counted while nodes fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from tandem_operator.api.node_health import NodeHealthPolicySpec
from tandem_operator.plan.nodes.view import NodeView

from tandem.simulate.nodes.failures import HOUR_S, Failure
from tandem.simulate.nodes.pods import GPU

EPOCH_S: Final = 1_700_000_000.0
"""Where simulated time begins; statuses carry dates."""
CONDITION: Final = "GpuDegraded"
SILENT_AFTER_S: Final = 40.0
"""Until the control plane calls a dead node's Ready Unknown."""
EVICTED_AFTER_S: Final = 300.0
"""Kubernetes' own: it then deletes the pods of such a node."""
LEAVE_S: Final = 30.0
"""A draining pod's streams have moved by then."""
UNNOTICED_S: Final = 24 * HOUR_S
"""Until a person finds a straggler that nobody pulled out."""


@dataclass(frozen=True)
class ClusterSpec:
    """What is simulated."""

    nodes: int
    spare_nodes: int
    """Without a pod at first."""
    pool_pods: int
    rack_nodes: int
    startup_s: float
    look_every_s: float
    """The shortest time between two plans."""
    policy: NodeHealthPolicySpec
    seed: int = 0


@dataclass
class Counts:
    """What happened."""

    failures: Counter[str] = field(default_factory=Counter)
    already_failing: int = 0
    """Failures that fell on a node that was failing."""
    plans: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Events of the operator."""
    most_in_repair: int = 0
    over_the_brake: int = 0
    """Plans that began a repair and had more in repair than allowed."""
    under_the_floor: int = 0
    """Serving pods that we took away although the pool had no more than its size."""
    in_repair_s: float = 0.0
    held_s: float = 0.0
    found_after_s: list[float] = field(default_factory=list)
    waited_for_node: int = 0


@dataclass
class Node:
    """One, and what is wrong with it."""

    name: str
    rack: int
    view: NodeView
    failure: Failure | None = None
    dead: bool = False
    slow: float = 1.0
    mending: bool = False


def healthy(name: str) -> NodeView:
    """A node as it joins."""
    return NodeView(
        name=name,
        uid=f"uid-{name}",
        version="1",
        conditions={"Ready": "True", CONDITION: "False"},
        allocatable={GPU: "8"},
    )


def patched(view: NodeView, change: Mapping[str, Any]) -> NodeView:
    """After a patch of the operator."""
    merged = {**view.annotations, **change["metadata"].get("annotations", {})}
    return replace(
        view,
        version=str(int(view.version) + 1),
        annotations={k: v for k, v in merged.items() if v is not None},
        unschedulable=bool(change.get("spec", {}).get("unschedulable", view.unschedulable)),
    )
