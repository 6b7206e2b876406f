"""What is done to a node in repair now: one step at a time, each derived from what is observed.

1. Its fleets replace the pods there and move their streams (plan.pods does that, from the status).
2. Cordon, where the operator may write to nodes.
3. Pods that are still there are evicted, as far as their budgets allow, until the deadline.
4. After it, what the policy says: wait, or delete.
5. A node that is silent, and none of whose pods answers, is given up after a time, if the policy
   says so.

Nothing here undoes what somebody else did: see `release`.
"""

from __future__ import annotations

from collections.abc import Sequence

from tandem_operator.api.node_health import NodeStatus
from tandem_operator.names import ANNOTATION_CORDONED, ANNOTATION_OUT_OF_SERVICE, Reason
from tandem_operator.plan.actions import Action, Delete, Evict, Notify, PatchNode
from tandem_operator.plan.nodes.decide import Look, left_on
from tandem_operator.plan.nodes.memory import present_s
from tandem_operator.plan.nodes.repair import IN_REPAIR
from tandem_operator.plan.nodes.signs import NOT_READY, STRAGGLER
from tandem_operator.plan.nodes.view import OUT_OF_SERVICE_TAINT, NodeView, PlacedPod
from tandem_operator.plan.times import to_unix_s

RETRY_S = 10.0
"""Between two evictions of a pod whose budget allows none."""


def step(look: Look, entry: NodeStatus) -> tuple[Action, ...]:
    """The next step for a node; none before the status says that it is in repair."""
    before, node = look.before.get(entry.name), look.nodes[entry.name]
    begun = before is not None and before.phase in IN_REPAIR and entry.phase in IN_REPAIR
    if not begun or look.paused or node.paused or look.outage.sentence is not None:
        return ()
    pods = look.pods.get(entry.name, ())
    if not entry.pods:
        whole = _cordon(look, node, entry) or _give_up(look, node, entry, pods)
        if whole:
            return whole
    return _evict(look, entry, left_on(pods, entry.pods))


def _cordon(look: Look, node: NodeView, entry: NodeStatus) -> tuple[Action, ...]:
    """Not again after somebody took it back, and not over somebody's own."""
    wanted = look.snapshot.may_write and look.policy.spec.drain.cordon
    if not wanted or node.unschedulable or entry.cordoned:
        return ()
    change = {
        "metadata": {"annotations": {ANNOTATION_CORDONED: entry.message[:200]}},
        "spec": {"unschedulable": True},
    }
    return (PatchNode(node.ref, node.version, change, Reason.NODE_DRAINING),)


def _give_up(
    look: Look, node: NodeView, entry: NodeStatus, pods: Sequence[PlacedPod]
) -> tuple[Action, ...]:
    """A node that is dead, as far as anybody can tell from here."""
    action = look.policy.spec.dead_nodes.action
    if action == "Wait" or node.given_up_by_us or not is_dead(look, node, entry):
        return ()
    if action == "ForceDelete":
        note = f"{node.name} is taken for dead, and the pod is deleted by force: {entry.message}"
        return _deleted(pods, Reason.NODE_DEAD, note, grace_s=0)
    if not look.snapshot.may_write or look.snapshot.strangers.get(node.name, 1):
        return ()
    taints = [_taint(*taint) for taint in node.taints]
    taints.append(_taint(OUT_OF_SERVICE_TAINT, "tandem", "NoExecute"))
    change = {
        "metadata": {"annotations": {ANNOTATION_OUT_OF_SERVICE: entry.message[:200]}},
        "spec": {"taints": taints},
    }
    return (PatchNode(node.ref, node.version, change, Reason.NODE_DEAD),)


def is_dead(look: Look, node: NodeView, entry: NodeStatus) -> bool:
    """Silent for long enough, and its pods too: one that answers is only out of reach for the
    control plane, and goes on serving."""
    if not node.silent or any(
        pod.uid in look.snapshot.answered for pod in look.pods.get(node.name, ())
    ):
        return False
    silent_s = max(
        (present_s(s, look.now_s) for s in entry.signals if s.signal == NOT_READY), default=0.0
    )
    return silent_s >= look.policy.spec.dead_nodes.after_seconds


def _evict(look: Look, entry: NodeStatus, left: Sequence[PlacedPod]) -> tuple[Action, ...]:
    drain = look.policy.spec.drain
    elapsed_s = look.now_s - to_unix_s(entry.since)
    here = [pod for pod in left if not pod.terminating and not pod.draining]
    late = [pod for pod in here if elapsed_s >= deadline_s(look, pod)]
    if drain.after_deadline == "Delete" and (deletions := _overdue(look, entry, late)):
        return deletions
    due = [pod for pod in here if not pod.runtime or elapsed_s >= drain.evict_after_seconds]
    return tuple(Evict(pod.ref, Reason.NODE_DRAINING) for pod in due if pod not in late)


def deadline_s(look: Look, pod: PlacedPod) -> float:
    """Of a pod's evictions: none gets less than its own grace period."""
    return float(max(look.policy.spec.drain.deadline_seconds, pod.grace_s))


def _overdue(look: Look, entry: NodeStatus, here: Sequence[PlacedPod]) -> tuple[Action, ...]:
    """One pod of a pool at a time, and never the last that serves."""
    overdue: list[PlacedPod] = []
    pools: set[tuple[str, str]] = set()
    for pod in here:
        pool = (pod.namespace, pod.pool)
        mates = [p for p in look.snapshot.pods if (p.namespace, p.pool) == pool and p.runtime]
        serving = [p for p in mates if p.ready and not p.terminating and p.uid != pod.uid]
        ending = any(p.terminating for p in mates)
        if pod.runtime and pod.ready and (not serving or ending or pool in pools):
            continue
        pools.add(pool)
        overdue.append(pod)
    note = f"it did not leave {entry.name} in time and is deleted, whatever budgets say"
    return _deleted(overdue, Reason.DRAIN_TIMED_OUT, f"{note}: {entry.message}")


def _deleted(
    pods: Sequence[PlacedPod], reason: Reason, note: str, grace_s: int | None = None
) -> tuple[Action, ...]:
    """Each with an Event, on the pod."""
    actions: list[Action] = []
    for pod in pods:
        actions.append(Notify(pod.ref, "Warning", reason, note))
        actions.append(Delete(pod.ref, reason, grace_s=grace_s))
    return tuple(actions)


def _taint(key: str, value: str, effect: str) -> dict[str, str]:
    return {"key": key, "effect": effect} | ({"value": value} if value else {})


def release(node: NodeView) -> tuple[Action, ...]:
    """Undo what we did to a node that is in repair no more, and nothing else."""
    if not node.cordoned_by_us and not node.given_up_by_us:
        return ()
    annotations: dict[str, None] = {}
    spec: dict[str, object] = {}
    if node.cordoned_by_us:
        annotations[ANNOTATION_CORDONED] = None
        if node.unschedulable:
            spec["unschedulable"] = None
    if node.given_up_by_us:
        annotations[ANNOTATION_OUT_OF_SERVICE] = None
        kept = [_taint(*t) for t in node.taints if t[0] != OUT_OF_SERVICE_TAINT]
        spec["taints"] = kept
    change = {"metadata": {"annotations": annotations}} | ({"spec": spec} if spec else {})
    return (PatchNode(node.ref, node.version, change, Reason.NODE_RECOVERED),)


def looks_again_in_s(look: Look, entry: NodeStatus) -> list[float]:
    """When the next step of a node in repair is due, or its straggler is avoided no more."""
    if entry.phase not in IN_REPAIR:
        return []
    left = left_on(look.pods.get(entry.name, ()), entry.pods)
    elapsed_s = look.now_s - to_unix_s(entry.since)
    drain = look.policy.spec.drain
    waits = [deadline_s(look, pod) - elapsed_s for pod in left]
    waits += [drain.evict_after_seconds - elapsed_s] if left else []
    silent = [present_s(s, look.now_s) for s in entry.signals if s.signal == NOT_READY and s.since]
    waits += [look.policy.spec.dead_nodes.after_seconds - silent_s for silent_s in silent]
    waits += _avoided_for_s(look, entry)
    waits = [wait_s for wait_s in waits if wait_s > 0.0]
    return [*waits, RETRY_S] if left else waits


def _avoided_for_s(look: Look, entry: NodeStatus) -> list[float]:
    """How long a straggler's node takes no new pods yet: nothing else tells when that is over."""
    wanted = look.policy.spec.signals.stragglers
    if wanted is None or not entry.pods:
        return []
    found = [s for s in entry.signals if s.signal == STRAGGLER and s.since]
    return [wanted.avoid_seconds - (look.now_s - to_unix_s(s.first_seen)) for s in found]
