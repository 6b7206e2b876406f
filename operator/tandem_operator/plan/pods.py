"""A fleet's pods: from a rollout step to pods made, drained and deleted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tandem_runtime.contract import ANNOTATION_SERVED_NAMES, LABEL_MODEL

from tandem_operator.api.model import served_names
from tandem_operator.names import Reason
from tandem_operator.plan import drain
from tandem_operator.plan.actions import Action, Annotate, Create, Delete, Manifest, Notify
from tandem_operator.plan.pod import evictable, pod_manifest, served_names_text
from tandem_operator.plan.pools import Pools
from tandem_operator.plan.revision import recorded
from tandem_operator.plan.rollout import Member, PoolState, PoolStep, Step, next_step
from tandem_operator.plan.target import Target
from tandem_operator.plan.views import FleetSnapshot, FleetView, PodView, PoolView

STARVED_AFTER_S = 20.0
"""The scheduler needs a moment to see capacity that was just freed."""
FAILED_HOLD_S = 10.0
"""A failed pod keeps its place that long: a node that refuses pods must not cause a storm."""


@dataclass(frozen=True)
class Pods:
    """What happens to the fleet's pods, and how the rollout stands."""

    states: Mapping[str, PoolState]
    """By pool name."""
    step: Step
    actions: tuple[Action, ...]
    requeue_after_s: float | None


def plan_pods(
    snapshot: FleetSnapshot,
    fleet: FleetView,
    target: Target,
    pools: Pools,
    names: Sequence[str],
) -> Pods:
    """The next actions on the pods of the live pools; without a target they only drain."""
    states = {
        pool.name: _pool_state(snapshot, fleet, target, pool, pools.sizes[pool.name].replicas)
        for pool in pools.live
    }
    step = next_step(list(states.values()))
    actions: list[Action] = []
    poll = False
    for pool, pool_step in zip(pools.live, step.pools, strict=True):
        own = _own(snapshot, pool)
        actions += _bury(fleet, own, snapshot.now_s)
        leaving = _leaving(snapshot, fleet, own, pool_step, step.rolling)
        actions += [action for entry in leaving for action in entry.actions]
        poll = poll or any(entry.poll for entry in leaving)
        if pools.ready:
            actions += _creations(snapshot, fleet, pool, pool_step, names, step)
        actions += _renamed(fleet, own, names)
        actions += _evictable(snapshot, fleet, pool, own)
    after_s = _requeue(snapshot, fleet, pools, poll)
    return Pods(states, step, tuple(actions), after_s)


def _own(snapshot: FleetSnapshot, pool: PoolView) -> list[PodView]:
    return [p for p in snapshot.pods if p.pool_uid == pool.uid and not p.terminating]


def _buried(pod: PodView, now_s: float) -> bool:
    return pod.finished and now_s - pod.created_s >= FAILED_HOLD_S


def _pool_state(
    snapshot: FleetSnapshot, fleet: FleetView, target: Target, pool: PoolView, size: int
) -> PoolState:
    revision = target.revision or pool.spec.revision
    deadline_s = fleet.spec.rollout.progress_deadline_seconds
    members = []
    for pod in _own(snapshot, pool):
        if _buried(pod, snapshot.now_s):
            continue
        age_s = snapshot.now_s - pod.created_s
        state = snapshot.states.get(pod.uid)
        late = snapshot.now_s - pod.waiting_since_s >= deadline_s and not pod.starved
        members.append(
            Member(
                name=pod.name,
                revision=pod.revision,
                ready=pod.ready,
                leaving=pod.draining is not None,
                broken=not pod.ready and (pod.problem is not None or late),
                starved=not pod.ready and pod.starved and age_s >= STARVED_AFTER_S,
                alone=pod.role == "both",
                in_flight=state.in_flight if state else 0,
                slot=pod.slot,
                displaced=snapshot.displaces(pod),
            )
        )
    return PoolState(
        role=target.roles.get(pool.name, pool.spec.role),
        size=size,
        target=revision,
        serving=pool.status.current_revision,
        max_surge=fleet.spec.rollout.max_surge,
        max_unavailable=fleet.spec.rollout.max_unavailable,
        members=tuple(members),
    )


def _bury(fleet: FleetView, own: list[PodView], now_s: float) -> list[Action]:
    """Failed pods are deleted; that they failed, and why, stays as an Event."""
    actions: list[Action] = []
    for pod in own:
        if _buried(pod, now_s):
            sentence = pod.problem.sentence if pod.problem else "it ended"
            note = f"Pod {pod.name} failed and is replaced: {sentence}"
            actions.append(Notify(fleet.ref, "Warning", Reason.POD_FAILED, note))
            actions.append(Delete(pod.ref, Reason.POD_FAILED))
    return actions


def _leaving(
    snapshot: FleetSnapshot,
    fleet: FleetView,
    own: list[PodView],
    step: PoolStep,
    rolling: bool,
) -> list[drain.Leaving]:
    usual = Reason.ROLLING_OUT if rolling else Reason.SCALE_IN
    timeout_s = fleet.spec.disruption.drain_timeout_seconds
    entries = []
    for pod in own:
        if pod.name in step.leave:
            reason = Reason.NODE_DRAINING if pod.name in step.displaced else usual
            entries.append(drain.start(pod, reason, snapshot.now_s))
        elif pod.name in step.stay:
            entries.append(drain.cancel(pod))
        elif pod.draining is not None and not _buried(pod, snapshot.now_s):
            state = snapshot.states.get(pod.uid)
            entries.append(drain.proceed(pod, state, timeout_s, snapshot.now_s))
    return entries


def _creations(
    snapshot: FleetSnapshot,
    fleet: FleetView,
    pool: PoolView,
    step: PoolStep,
    names: Sequence[str],
    rollout: Step,
) -> list[Action]:
    """A pod takes the lowest slot whose name no object holds, terminating or not."""
    taken = {pod.name for pod in snapshot.pods}
    reason = Reason.ROLLING_OUT if rollout.rolling else Reason.SCALE_OUT
    actions: list[Action] = []
    for revision in step.create:
        record = recorded(snapshot.revisions, pool.uid, revision)
        if record is None:
            continue
        slot = next(n for n in range(1 << 16) if f"{pool.name}-{revision}-{n}" not in taken)
        template = dict(record.template)
        text = _names_of(snapshot, fleet, template, names)
        avoid = snapshot.repair.avoid
        manifest = pod_manifest(fleet, pool, revision, slot, template, text, avoid)
        taken.add(manifest["metadata"]["name"])
        actions.append(Create(manifest, reason, pool.uid))
    return actions


def _renamed(fleet: FleetView, own: list[PodView], names: Sequence[str]) -> list[Action]:
    """Served names change in place: the gateway reads them from the annotation.

    A pod with another Model's weights keeps its own names: it must not answer for the new ones.
    """
    text, model = served_names_text(names), fleet.spec.model_ref.name
    return [
        Annotate(pod.ref, {ANNOTATION_SERVED_NAMES: text}, Reason.NAMES_CHANGED)
        for pod in own
        if pod.model in ("", model) and pod.served_names != text and not pod.finished
    ]


def _evictable(
    snapshot: FleetSnapshot, fleet: FleetView, pool: PoolView, own: list[PodView]
) -> list[Action]:
    """What the cluster autoscaler reads follows what a pod does: it may go once it leaves."""
    actions: list[Action] = []
    for pod in own:
        record = recorded(snapshot.revisions, pool.uid, pod.revision)
        if record is None or pod.finished:
            continue
        wanted = evictable(fleet, dict(record.template), leaves=pod.draining is not None)
        if any(pod.safe_to_evict != text for text in wanted.values()):
            actions.append(Annotate(pod.ref, wanted, Reason.CONFIGURED))
    return actions


def _names_of(
    snapshot: FleetSnapshot, fleet: FleetView, template: Manifest, names: Sequence[str]
) -> str:
    """The names of a new pod: of another Model's weights, those that its siblings have."""
    model = str(template["metadata"]["labels"].get(LABEL_MODEL, ""))
    if model in ("", fleet.spec.model_ref.name):
        return served_names_text(names)
    siblings = (p.served_names for p in snapshot.pods if p.model == model)
    known = next((m for m in snapshot.models if m.name == model), None)
    wanted = served_names(known.spec, known.name) if known else ()
    return next((text for text in siblings if text is not None), served_names_text(wanted))


def _requeue(snapshot: FleetSnapshot, fleet: FleetView, pools: Pools, poll: bool) -> float | None:
    """When the plan may change although nothing happens."""
    waits = [drain.POLL_S] if poll else []
    uids = {pool.uid for pool in pools.live}
    for pod in snapshot.pods:
        if pod.terminating or pod.ready or pod.pool_uid not in uids:
            continue
        deadline_s = fleet.spec.rollout.progress_deadline_seconds
        times = [pod.waiting_since_s + deadline_s]
        times += [pod.created_s + deadline_s, pod.created_s + STARVED_AFTER_S] * pod.starved
        times += [pod.created_s + FAILED_HOLD_S] * pod.finished
        waits += [time_s - snapshot.now_s for time_s in times if time_s > snapshot.now_s]
    return min(waits) + 0.05 if waits else None


def end_orphans(snapshot: FleetSnapshot, pools: Sequence[PoolView]) -> tuple[Action, ...]:
    """Tell the pods of pools that are gone or going to end their streams."""
    live = {pool.uid for pool in pools}
    return tuple(
        action
        for pod in snapshot.pods
        if pod.pool_uid is not None and pod.pool_uid not in live
        for action in drain.end(pod, snapshot.now_s).actions
    )
