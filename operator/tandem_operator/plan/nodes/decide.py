"""Which phase each node is in now: remembered, ripe, held, in repair, recovered.

```
            ripe, and the brakes allow it          no pods left        dead for long, by policy
Suspect ──────────────────────────────> Draining ───────────> Drained          OutOfService
   │  ripe, and they do not: Held           │   a person uncordons it: Released
   │  mode DryRun: DryRun                   │
   └──── every signal away for clearSeconds: forgotten; what we did to the node is undone ────
```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tandem_operator.api.node_health import MAX_NODES, NodeStatus, Phase, SeenSignal
from tandem_operator.plan.nodes import brakes
from tandem_operator.plan.nodes.memory import advance, ripe
from tandem_operator.plan.nodes.repair import IN_REPAIR
from tandem_operator.plan.nodes.signs import Sign, signs_of, suspects
from tandem_operator.plan.nodes.view import (
    NodesSnapshot,
    NodeView,
    PlacedPod,
    PolicyView,
    is_paused,
)
from tandem_operator.plan.times import to_text

BEGUN = (*IN_REPAIR, "DryRun")
MOST_NAMED = 5
MOST_TEXT = 1024


@dataclass(frozen=True)
class Look:
    """A snapshot, put in order."""

    snapshot: NodesSnapshot
    policy: PolicyView
    nodes: Mapping[str, NodeView]
    before: Mapping[str, NodeStatus]
    """What the status says, of nodes that are still the same."""
    pods: Mapping[str, tuple[PlacedPod, ...]]
    signs: Mapping[str, tuple[Sign, ...]]
    outage: brakes.Outage
    carrying: frozenset[str]

    @property
    def now_s(self) -> float:
        return self.snapshot.now_s

    @property
    def paused(self) -> bool:
        return is_paused(self.policy.annotations)


def look_at(snapshot: NodesSnapshot, policy: PolicyView) -> Look:
    """Put a snapshot in order."""
    nodes = {node.name: node for node in snapshot.nodes}
    before = {
        entry.name: entry
        for entry in policy.status.nodes
        if entry.name in nodes and nodes[entry.name].uid == entry.uid
    }
    pods: dict[str, list[PlacedPod]] = {}
    for pod in snapshot.pods:
        pods.setdefault(pod.node, []).append(pod)
    by_node = {name: _in_order(found) for name, found in pods.items()}
    carrying = frozenset(p.node for p in snapshot.pods if p.runtime and p.node in nodes)
    signals = policy.spec.signals
    signs: dict[str, tuple[Sign, ...]] = dict.fromkeys(nodes, ())
    for name in suspects(snapshot.nodes, by_node, signals, snapshot, before) & nodes.keys():
        here = by_node.get(name, ())
        signs[name] = signs_of(nodes[name], here, signals, snapshot, before.get(name))
    outage = brakes.outage(policy.spec.brakes, signs, carrying, policy.status, snapshot.now_s)
    return Look(snapshot, policy, nodes, before, by_node, signs, outage, carrying)


def _in_order(pods: list[PlacedPod]) -> tuple[PlacedPod, ...]:
    if len(pods) == 1:
        return (pods[0],)
    return tuple(sorted(pods, key=lambda p: (p.namespace, p.name)))


@dataclass(frozen=True)
class Decided:
    """The next status of every node with signals, and the brakes behind it."""

    entries: Mapping[str, NodeStatus]
    carrying: int
    allowed: int

    @property
    def in_repair(self) -> int:
        return sum(entry.phase in IN_REPAIR for entry in self.entries.values())


@dataclass
class _Tally:
    entries: dict[str, NodeStatus] = field(default_factory=dict)
    candidates: list[tuple[NodeView, tuple[SeenSignal, ...], list[Sign]]] = field(
        default_factory=list
    )


def decide(look: Look) -> Decided:
    """The phases of all nodes."""
    tally = _Tally()
    for name in sorted(n for n, shown in look.signs.items() if shown or n in look.before):
        _sort_in(look, look.nodes[name], tally)
    in_repair = {n for n, entry in tally.entries.items() if entry.phase in IN_REPAIR}
    carrying = len(look.carrying | in_repair)
    allowed = min(MAX_NODES, brakes.allowed(look.policy.spec.brakes, carrying))
    drained_by_others = {n for n in look.carrying - in_repair if look.nodes[n].unschedulable}
    free = allowed - len(in_repair | drained_by_others)
    for node, seen, signs in sorted(tally.candidates, key=_urgency):
        why = _held(look, node, signs, free, tally.entries, allowed)
        if why is None:
            free -= node.name not in drained_by_others
        tally.entries[node.name] = _candidate(look, node, seen, signs, why)
    kept = sorted(tally.entries.values(), key=_importance)[:MAX_NODES]
    return Decided({e.name: e for e in sorted(kept, key=lambda e: e.name)}, carrying, allowed)


def _sort_in(look: Look, node: NodeView, tally: _Tally) -> None:
    before, signs = look.before.get(node.name), look.signs[node.name]
    clear_s = look.policy.spec.signals.clear_seconds
    seen = advance(before.signals if before else (), signs, clear_s, look.now_s)
    if not seen:
        return
    active = look.policy.spec.mode == "Active"
    ripened = ripe(seen, signs, look.now_s)
    if before is not None and before.phase in IN_REPAIR and active:
        tally.entries[node.name] = _continued(look, node, before, seen, ripened)
    elif before is not None and before.phase == "Released" and active:
        tally.entries[node.name] = before.model_copy(update={"signals": seen})
    elif ripened:
        tally.candidates.append((node, seen, ripened))
    else:
        tally.entries[node.name] = _entry(look, node, "Suspect", _told(seen), seen)


def _urgency(candidate: tuple[NodeView, tuple[SeenSignal, ...], list[Sign]]) -> tuple[object, ...]:
    """Silent nodes first, then whoever fails for longest."""
    node, seen, _ = candidate
    return not node.silent, min(s.first_seen for s in seen), node.name


def _importance(entry: NodeStatus) -> tuple[object, ...]:
    return entry.phase not in IN_REPAIR, entry.phase == "Suspect", entry.since, entry.name


def _held(
    look: Look,
    node: NodeView,
    signs: Sequence[Sign],
    free: int,
    entries: Mapping[str, NodeStatus],
    allowed: int,
) -> str | None:
    """Why the repair of a failing node does not begin now."""
    if node.name not in look.carrying:
        return "it carries no pods of Tandem"
    if look.paused or node.paused:
        return "repairs are paused by an annotation"
    if look.outage.sentence is not None:
        return look.outage.sentence
    if free <= 0 and not node.unschedulable:
        taken = sorted(n for n, entry in entries.items() if entry.phase in BEGUN)
        names = ", ".join(taken[:MOST_NAMED]) or "drained by somebody else"
        return f"{allowed} nodes may be in repair at a time, and are ({names})"
    pool = _busy_pool(look, node, signs, entries)
    return f"another pod of {pool} is being pulled out" if pool else None


def _busy_pool(
    look: Look, node: NodeView, signs: Sequence[Sign], entries: Mapping[str, NodeStatus]
) -> str | None:
    """The pool of a straggler, if a former one of it has not left yet: one at a time."""
    pods = _scope(signs)
    pools = {p.pool for p in look.pods.get(node.name, ()) if p.uid in pods}
    leaving = {uid for entry in entries.values() if entry.phase in BEGUN for uid in entry.pods}
    busy = sorted(p.pool for p in look.snapshot.pods if p.uid in leaving and p.pool in pools)
    return busy[0] if busy else None


def _candidate(
    look: Look,
    node: NodeView,
    seen: tuple[SeenSignal, ...],
    signs: Sequence[Sign],
    why: str | None,
) -> NodeStatus:
    evidence = _told(seen)
    if why is not None:
        return _entry(look, node, "Held", f"{evidence}; held: {why}", seen)
    pods = _scope(signs)
    if look.policy.spec.mode == "DryRun":
        return _entry(look, node, "DryRun", f"{evidence}; it would be drained", seen, pods)
    left = left_on(look.pods.get(node.name, ()), pods)
    return _entry(look, node, "Draining", _progress(look, evidence, left), seen, pods)


def _scope(signs: Sequence[Sign]) -> tuple[str, ...]:
    """The pods that leave, where the signs are about pods alone; else all do: ()."""
    if any(not sign.pods for sign in signs):
        return ()
    return tuple(sorted({uid for sign in signs for uid in sign.pods}))


def _continued(
    look: Look,
    node: NodeView,
    before: NodeStatus,
    seen: tuple[SeenSignal, ...],
    ripened: Sequence[Sign],
) -> NodeStatus:
    """A node in repair that still shows signals."""
    evidence = _told(seen)
    cordoned = before.cordoned or node.cordoned_by_us
    if cordoned and not node.unschedulable:
        message = f"{evidence}; somebody uncordoned it: left alone until its signals are gone"
        return _entry(look, node, "Released", message, seen)
    pods = _scope(ripened) if before.pods and ripened else before.pods
    left = left_on(look.pods.get(node.name, ()), pods)
    phase: Phase = "Draining" if left else "Drained"
    if node.given_up_by_us:
        phase = "OutOfService"
    return NodeStatus(
        name=node.name,
        uid=node.uid,
        phase=phase,
        since=before.since,
        message=_progress(look, evidence, left),
        cordoned=cordoned,
        pods=pods,
        signals=seen,
    )


def left_on(pods: Sequence[PlacedPod], scope: Sequence[str]) -> list[PlacedPod]:
    """The pods that still have to leave a node; with no scope all of them."""
    return [pod for pod in pods if not scope or pod.uid in scope]


def _progress(look: Look, evidence: str, left: Sequence[PlacedPod]) -> str:
    if not left:
        return f"{evidence}; no pods of Tandem are left"
    return f"{evidence}; {len(left)} to leave: " + ", ".join(
        _state(look, pod) for pod in left[:MOST_NAMED]
    )


def _state(look: Look, pod: PlacedPod) -> str:
    name = f"{pod.namespace}/{pod.name}"
    if pod.terminating:
        held = f", held by {', '.join(pod.finalizers)}" if pod.finalizers else ""
        return f"{name} (ending{held})"
    refused = look.snapshot.refusals.get(pod.uid)
    return f"{name} ({refused[:200]})" if refused else name


def _told(seen: Sequence[SeenSignal]) -> str:
    """The evidence: what is there, else what was."""
    there = [s for s in seen if s.since is not None]
    text = "; ".join(s.evidence for s in there)
    return text or "; ".join(f"{s.evidence} until {s.gone}" for s in seen)


def _entry(
    look: Look,
    node: NodeView,
    phase: Phase,
    message: str,
    seen: tuple[SeenSignal, ...],
    pods: tuple[str, ...] = (),
) -> NodeStatus:
    before = look.before.get(node.name)
    same = before is not None and before.phase == phase
    return NodeStatus(
        name=node.name,
        uid=node.uid,
        phase=phase,
        since=before.since if before is not None and same else to_text(look.now_s),
        message=message[:MOST_TEXT],
        pods=pods,
        signals=seen,
    )
