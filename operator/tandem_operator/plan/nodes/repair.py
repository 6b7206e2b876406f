"""What fleets have to know of nodes in repair: whose pods leave, and where no new ones are put."""

from __future__ import annotations

from dataclasses import dataclass

from tandem_operator.api.node_health import NodeHealthPolicySpec, NodeHealthPolicyStatus

IN_REPAIR = ("Draining", "Drained", "OutOfService")


@dataclass(frozen=True)
class Repair:
    """Nodes in repair, as the policy's status has them: what is not written there yet, a restarted
    operator would not know."""

    nodes: frozenset[str] = frozenset()
    """Every pod of ours there leaves."""
    pods: frozenset[str] = frozenset()
    """Uids of further ones that leave."""
    avoid: tuple[str, ...] = ()
    """Nodes that new pods keep away from."""


def repair_of(spec: NodeHealthPolicySpec, status: NodeHealthPolicyStatus) -> Repair:
    """From a NodeHealthPolicy."""
    if spec.mode != "Active":
        return Repair()
    nodes = [node for node in status.nodes if node.phase in IN_REPAIR]
    return Repair(
        nodes=frozenset(node.name for node in nodes if not node.pods),
        pods=frozenset(uid for node in nodes for uid in node.pods),
        avoid=tuple(sorted(node.name for node in nodes)),
    )
