"""What a node shows right now that the policy counts as failing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tandem_operator.api.node_health import DEFAULT_FOR_SECONDS, NodeStatus, Signals
from tandem_operator.plan.nodes.repair import IN_REPAIR
from tandem_operator.plan.nodes.view import NodesSnapshot, NodeView, PlacedPod
from tandem_operator.plan.times import to_unix_s

NOT_READY = "NotReady"
STRAGGLER = "Straggler"


@dataclass(frozen=True)
class Sign:
    """One signal that is there now."""

    signal: str
    """Its kind, and what it is about: Condition/KernelDeadlock."""
    evidence: str
    for_s: float
    """How long it has to be there before it counts."""
    everywhere: bool = True
    """Any node can show it, not only one that carries pods of Tandem."""
    pods: tuple[str, ...] = ()
    """Uids: it is about these pods alone."""


def suspects(
    nodes: Sequence[NodeView],
    pods: Mapping[str, tuple[PlacedPod, ...]],
    signals: Signals,
    snapshot: NodesSnapshot,
    before: Mapping[str, NodeStatus],
) -> set[str]:
    """Nodes that may show a sign; of the others `signs_of` is empty.

    It is cheap, since it looks at every node of the cluster at every look.
    """
    told = snapshot.reports.keys() | {s.pod_uid for s in snapshot.stragglers}
    found = {*before, *snapshot.xids}
    if told:
        found.update(p.node for p in snapshot.pods if p.uid in told)
    bad = [(wanted.type, wanted.status) for wanted in signals.conditions]
    for node in nodes:
        conditions = node.conditions
        if conditions.get("Ready") != "True" or (node.taints and signals.taints):
            found.add(node.name)
        for type_, status in bad:
            if conditions.get(type_) == status:
                found.add(node.name)
    if signals.accelerators is not None:
        found.update(node.name for node in nodes if _short(node, pods.get(node.name, ())))
    return found


def _short(node: NodeView, pods: tuple[PlacedPod, ...]) -> bool:
    """Whether it may have less allocatable than its pods have."""
    if len(pods) != 1:
        return bool(pods)
    allocatable = node.allocatable
    for resource, count in pods[0].accelerators.items():
        left = allocatable.get(resource, "0")
        if left.isdigit() and int(left) < count:
            return True
    return False


def signs_of(
    node: NodeView,
    pods: tuple[PlacedPod, ...],
    signals: Signals,
    snapshot: NodesSnapshot,
    before: NodeStatus | None,
) -> tuple[Sign, ...]:
    """The signs of one node; `pods` are ours on it, `before` is what the status says of it."""
    return (
        *_not_ready(node, signals),
        *_conditions(node, signals),
        *_taints(node, signals),
        *_accelerators(node, pods, signals),
        *_xids(node, signals, snapshot),
        *_reports(pods, signals, snapshot),
        *_stragglers(pods, signals, snapshot, before),
    )


def _not_ready(node: NodeView, signals: Signals) -> Iterable[Sign]:
    status = node.conditions.get("Ready", "Unknown")
    if status != "True":
        yield Sign(NOT_READY, f"Ready is {status}", signals.not_ready.for_seconds)


def _conditions(node: NodeView, signals: Signals) -> Iterable[Sign]:
    for wanted in signals.conditions:
        if node.conditions.get(wanted.type) == wanted.status:
            yield Sign(
                f"Condition/{wanted.type}",
                f"{wanted.type} is {wanted.status}",
                DEFAULT_FOR_SECONDS if wanted.for_seconds is None else wanted.for_seconds,
            )


def _taints(node: NodeView, signals: Signals) -> Iterable[Sign]:
    present = {(key, effect) for key, _, effect in node.taints}
    for wanted in signals.taints:
        if any(key == wanted.key and wanted.effect in (None, e) for key, e in present):
            yield Sign(
                f"Taint/{wanted.key}",
                f"it has the taint {wanted.key}",
                DEFAULT_FOR_SECONDS if wanted.for_seconds is None else wanted.for_seconds,
            )


def _accelerators(node: NodeView, pods: tuple[PlacedPod, ...], signals: Signals) -> Iterable[Sign]:
    if signals.accelerators is None:
        return
    used: Counter[str] = Counter()
    for pod in pods:
        if not pod.terminating:
            used.update(pod.accelerators)
    for resource, count in sorted(used.items()):
        left = node.allocatable.get(resource, "0")
        if left.isdigit() and int(left) < count:
            yield Sign(
                f"Accelerators/{resource}",
                f"{left} {resource} are allocatable and pods of Tandem have {count}",
                signals.accelerators.for_seconds,
                everywhere=False,
            )


def _xids(node: NodeView, signals: Signals, snapshot: NodesSnapshot) -> Iterable[Sign]:
    if signals.xids is None:
        return
    since_s = snapshot.now_s - signals.xids.within_seconds
    for code, times in sorted(snapshot.xids.get(node.name, {}).items()):
        new = sum(at_s > since_s for at_s in times)
        if code in signals.xids.codes and new >= signals.xids.count:
            yield Sign(f"Xid/{code}", f"{new} new XID {code}", 0.0, everywhere=False)


def _reports(
    pods: tuple[PlacedPod, ...], signals: Signals, snapshot: NodesSnapshot
) -> Iterable[Sign]:
    if signals.reports is None:
        return
    told = sorted(
        f"{pod.name}: {snapshot.reports[pod.uid]}" for pod in pods if pod.uid in snapshot.reports
    )
    if told:
        yield Sign("Report", "; ".join(told), signals.reports.for_seconds, everywhere=False)


def _stragglers(
    pods: tuple[PlacedPod, ...],
    signals: Signals,
    snapshot: NodesSnapshot,
    before: NodeStatus | None,
) -> Iterable[Sign]:
    """One that was pulled out stands: it is not measured any more, and what is slow stays so."""
    if signals.stragglers is None:
        return
    here = {pod.uid for pod in pods}
    found = [s for s in snapshot.stragglers if s.pod_uid in here]
    pulled = before is not None and before.phase in IN_REPAIR and bool(before.pods)
    known = next((s for s in before.signals if s.signal == STRAGGLER), None) if before else None
    if pulled and before is not None and known is not None:
        age_s = snapshot.now_s - to_unix_s(known.first_seen)
        if age_s < signals.stragglers.avoid_seconds:
            uids = tuple(sorted({*before.pods, *(s.pod_uid for s in found)}))
            yield Sign(STRAGGLER, known.evidence, 0.0, everywhere=False, pods=uids)
            return
    if found:
        evidence = "; ".join(s.evidence for s in found)
        uids = tuple(sorted(s.pod_uid for s in found))
        yield Sign(STRAGGLER, evidence, 0.0, everywhere=False, pods=uids)


def unknown_conditions(signals: Signals, nodes: Iterable[NodeView]) -> Mapping[str, str]:
    """Condition types of the policy that no node reports, with a sentence; most are misspelled."""
    seen = tuple(nodes)
    wanted_types = {wanted.type for wanted in signals.conditions}
    if all(any(type_ in node.conditions for node in seen) for type_ in wanted_types):
        return {}
    reported = sorted({type_ for node in seen for type_ in node.conditions})
    if not reported:
        return {}
    return {
        wanted.type: f"no node reports the condition {wanted.type}; nodes report: "
        f"{', '.join(reported)[:400]}"
        for wanted in signals.conditions
        if wanted.type not in reported
    }
