"""`plan_nodes`: from a snapshot of all nodes to everything that has to happen, in order.

The status is written first: a node is touched only once the status says that it is in repair, so
that an operator that is killed at any moment goes on with what it began, and undoes only that.
"""

from __future__ import annotations

from tandem_operator.api.node_health import NodeStatus
from tandem_operator.names import Reason
from tandem_operator.plan.actions import Action, Notify, Plan
from tandem_operator.plan.nodes.decide import Decided, Look, decide, look_at
from tandem_operator.plan.nodes.ladder import looks_again_in_s, release, step
from tandem_operator.plan.nodes.memory import next_change_s
from tandem_operator.plan.nodes.repair import IN_REPAIR
from tandem_operator.plan.nodes.status import status_write
from tandem_operator.plan.nodes.traffic import weigh
from tandem_operator.plan.nodes.view import NodesSnapshot

LEAST_WAIT_S = 0.5


def plan_nodes(snapshot: NodesSnapshot) -> Plan:
    """What to do about nodes now."""
    policy = snapshot.policy
    if not snapshot.nodes:
        return Plan()  # Nothing is known: a cluster has nodes.
    if policy is None or policy.spec.mode == "Off":
        undone = tuple(action for node in snapshot.nodes for action in release(node))
        off = status_write(snapshot, policy, None, None) if policy else ()
        return Plan((*off, *undone, *weigh(snapshot)))
    look = look_at(snapshot, policy)
    decided = decide(look)
    actions: list[Action] = [*status_write(snapshot, policy, look, decided)]
    actions += _events(look, decided)
    actions += weigh(snapshot)
    in_repair = {n: entry for n, entry in decided.entries.items() if entry.phase in IN_REPAIR}
    ours = {n for n, node in look.nodes.items() if node.cordoned_by_us or node.given_up_by_us}
    for name in sorted(in_repair.keys() | ours):
        entry = in_repair.get(name)
        actions += step(look, entry) if entry is not None else release(look.nodes[name])
    return Plan(tuple(actions), _requeue(look, decided))


def _requeue(look: Look, decided: Decided) -> float | None:
    """When something changes although nothing happens."""
    clear_s = look.policy.spec.signals.clear_seconds
    waits = [look.outage.calm_in_s] if look.outage.calm_in_s is not None else []
    for name, entry in decided.entries.items():
        waits += next_change_s(entry.signals, look.signs[name], clear_s, look.now_s)
        waits += looks_again_in_s(look, entry)
    return max(LEAST_WAIT_S, min(waits)) if waits else None


_EVENTS = {
    "Held": ("Warning", Reason.NODE_HELD),
    "DryRun": ("Warning", Reason.NODE_DRY_RUN),
    "Draining": ("Warning", Reason.NODE_DRAINING),
    "Drained": ("Normal", Reason.NODE_DRAINED),
    "OutOfService": ("Warning", Reason.NODE_DEAD),
    "Released": ("Normal", Reason.NODE_RELEASED),
}


def _events(look: Look, decided: Decided) -> list[Action]:
    """One for each node whose phase changes, on the node."""
    events: list[Action] = []
    for name in sorted(look.before.keys() | decided.entries.keys()):
        node = look.nodes[name]
        before, after = look.before.get(name), decided.entries.get(name)
        if after is not None and (before is None or before.phase != after.phase):
            events += _told(look, after)
        elif after is None and before is not None and before.phase in IN_REPAIR:
            note = f"{name} shows no signal of failing any more and is used again"
            events.append(Notify(node.ref, "Normal", Reason.NODE_RECOVERED, note))
    return events


def _told(look: Look, entry: NodeStatus) -> list[Action]:
    if entry.phase not in _EVENTS:
        return []
    type_, reason = _EVENTS[entry.phase]
    note = f"{entry.name} {entry.phase}: {entry.message}"
    ref = look.nodes[entry.name].ref
    return [Notify(ref, "Warning" if type_ == "Warning" else "Normal", reason, note)]
