"""The first rung: a pod that seems to be slow gets less traffic, before anybody is sure.

Its annotation says by how much, gateways count work on it as so much more, and it is taken away as
soon as the suspicion is.
"""

from __future__ import annotations

from tandem_runtime.contract import ANNOTATION_SLOWER_PERCENT

from tandem_operator.names import Reason
from tandem_operator.plan.actions import Annotate
from tandem_operator.plan.nodes.view import NodesSnapshot, PlacedPod, is_paused


def weigh(snapshot: NodesSnapshot) -> tuple[Annotate, ...]:
    """Annotations of pods that are not as they should be."""
    policy = snapshot.policy
    acts = (
        policy is not None
        and policy.spec.mode == "Active"
        and policy.spec.signals.stragglers is not None
        and not is_paused(policy.annotations)
    )
    suspected = snapshot.suspected if acts else {}
    wanted = {uid: str(percent) for uid, percent in suspected.items()}
    return tuple(
        _annotate(pod, wanted.get(pod.uid))
        for pod in snapshot.pods
        if pod.runtime and not pod.terminating and pod.slower_percent != wanted.get(pod.uid)
    )


def _annotate(pod: PlacedPod, percent: str | None) -> Annotate:
    reason = Reason.POD_CLEARED if percent is None else Reason.POD_SUSPECTED
    return Annotate(pod.ref, {ANNOTATION_SLOWER_PERCENT: percent}, reason)
