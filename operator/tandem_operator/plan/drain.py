"""Emptying a pod before it goes: pure steps, each derived from what the pod says of itself.

A pod leaves by (1) the annotation, which the gateway sees, (2) POST drain, after which it admits
nothing, (3) waiting until it says that nothing is in flight, (4) deletion. Every step can be lost
or repeated. A pod that does not answer is waited for until the drain timeout, since its streams may
go on without us.

A pod whose node is to be drained (a taint) leaves likewise, once another has taken its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem_runtime.contract import ANNOTATION_DRAINING
from tandem_runtime.protocol import DrainRequest, PodState

from tandem_operator.names import ANNOTATION_DRAINING_SINCE, Reason
from tandem_operator.plan.actions import Action, Annotate, Delete, PostDrain
from tandem_operator.plan.times import to_text
from tandem_operator.plan.views import PodView

POLL_S = 1.0
END_DEADLINE_S = 30.0
"""What streams still get once their pool is deleted."""


@dataclass(frozen=True)
class Leaving:
    """What to do about a pod that leaves."""

    actions: tuple[Action, ...]
    poll: bool = False


def start(pod: PodView, reason: Reason, now_s: float) -> Leaving:
    """Begin to take a pod out of service. One that is not Ready serves nobody and goes at once;
    should it hold a stream all the same, SIGTERM drains it too."""
    if not pod.ready or pod.ip is None:
        return Leaving((Delete(pod.ref, reason),))
    annotations = {ANNOTATION_DRAINING: reason.value, ANNOTATION_DRAINING_SINCE: to_text(now_s)}
    return Leaving(
        (
            Annotate(pod.ref, annotations, reason, destructive=True),
            PostDrain(pod.ref, pod.ip, DrainRequest("drain"), reason),
        ),
        poll=True,
    )


def proceed(pod: PodView, state: PodState | None, timeout_s: float, now_s: float) -> Leaving:
    """The next step of a pod that carries the draining annotation."""
    if pod.draining_since_s is None:
        # Somebody else's annotation, or an unreadable time: its patience begins now.
        mark = {ANNOTATION_DRAINING_SINCE: to_text(now_s)}
        return Leaving((Annotate(pod.ref, mark, Reason.SCALE_IN),), poll=True)
    if now_s - pod.draining_since_s >= timeout_s:
        return Leaving((Delete(pod.ref, Reason.DRAIN_TIMED_OUT),))
    if state is None or pod.ip is None:
        gone = pod.problem is not None or pod.ip is None
        return Leaving((Delete(pod.ref, Reason.NOT_SERVING),)) if gone else Leaving((), poll=True)
    if not state.draining:
        request = DrainRequest("drain")
        return Leaving((PostDrain(pod.ref, pod.ip, request, Reason.SCALE_IN),), poll=True)
    if state.in_flight == 0:
        return Leaving((Delete(pod.ref, Reason.DRAINED),))
    return Leaving((), poll=True)


def cancel(pod: PodView) -> Leaving:
    """Take a pod back into service: the pod first, since the gateway must not send to one that
    refuses."""
    clear: dict[str, str | None] = {ANNOTATION_DRAINING: None, ANNOTATION_DRAINING_SINCE: None}
    annotate = Annotate(pod.ref, clear, Reason.DRAIN_CANCELLED)
    if pod.ip is None:
        return Leaving((annotate,))
    request = DrainRequest("cancel")
    return Leaving((PostDrain(pod.ref, pod.ip, request, Reason.DRAIN_CANCELLED), annotate))


def end(pod: PodView, now_s: float) -> Leaving:
    """A pod whose Pool is gone or going: its streams get at most END_DEADLINE_S. The annotation
    comes last and says that the pod was told."""
    if pod.draining == Reason.POOL_DELETED or pod.ip is None or pod.finished:
        return Leaving(())
    if pod.terminating and not pod.ready:
        # It has no streams (with any it stays Ready), or its node is lost and nobody answers:
        # asking again and again would hold up a fleet of the same name.
        return Leaving(())
    request = DrainRequest("end", deadline_s=END_DEADLINE_S)
    since = to_text(now_s)
    marks = {ANNOTATION_DRAINING: Reason.POOL_DELETED.value, ANNOTATION_DRAINING_SINCE: since}
    return Leaving(
        (
            PostDrain(pod.ref, pod.ip, request, Reason.POOL_DELETED),
            Annotate(pod.ref, marks, Reason.POOL_DELETED, destructive=True),
        )
    )


def pods_to_ask(pods: Sequence[PodView], sizes: dict[str, int]) -> list[PodView]:
    """The pods whose own view the plan needs: while any has to go, every one that could be chosen.

    `sizes` are the pools' sizes by pool name.
    """
    alive = [p for p in pods if not p.terminating and not p.finished and p.ip]
    counts = {name: sum(p.pool == name and not p.draining for p in alive) for name in sizes}
    moving = (
        any(p.draining for p in alive)
        or len({p.revision for p in alive}) > 1
        or any(counts[name] > size for name, size in sizes.items())
    )
    return [p for p in alive if p.ready or p.draining] if moving else []
