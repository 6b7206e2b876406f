"""How the policy stands: its conditions, and the write of its status."""

from __future__ import annotations

from collections.abc import Iterator

from tandem_operator.api.meta import Judgement, set_conditions
from tandem_operator.api.node_health import NodeHealthPolicyStatus
from tandem_operator.names import Condition, Reason
from tandem_operator.plan.actions import WriteStatus
from tandem_operator.plan.nodes.decide import Decided, Look
from tandem_operator.plan.nodes.signs import unknown_conditions
from tandem_operator.plan.nodes.view import NodesSnapshot, PolicyView
from tandem_operator.plan.times import to_text

ENABLE = (
    "the operator may not write to nodes: it moves its own pods, and neither cordons nor gives up "
    "a node; apply manifests/components/node-repair to allow it"
)


def status_write(
    snapshot: NodesSnapshot, policy: PolicyView, look: Look | None, decided: Decided | None
) -> tuple[WriteStatus, ...]:
    """The write, where the status differs; without a look the policy is off."""
    judged = [*_judgements(snapshot, policy, look)]
    status = NodeHealthPolicyStatus(
        observed_generation=policy.generation,
        conditions=set_conditions(
            policy.status.conditions, judged, policy.generation, to_text(snapshot.now_s)
        ),
        carrying=decided.carrying if decided else None,
        in_repair=decided.in_repair if decided else None,
        allowed=decided.allowed if decided else None,
        outage_since=look.outage.since if look else None,
        outage_over=look.outage.over if look else None,
        nodes=tuple(decided.entries.values()) if decided else (),
    )
    if status == policy.status:
        return ()
    return (WriteStatus(policy.ref, status.model_dump(by_alias=True, exclude_none=True)),)


def _judgements(
    snapshot: NodesSnapshot, policy: PolicyView, look: Look | None
) -> Iterator[Judgement]:
    if look is None:
        yield Judgement(Condition.READY, True, Reason.POLICY_OFF, "mode is Off: nothing is watched")
        return
    yield _ready(snapshot, policy)
    if snapshot.may_write:
        yield Judgement(
            Condition.NODE_REPAIR, True, Reason.ENABLED, "the operator may write to nodes"
        )
    else:
        yield Judgement(Condition.NODE_REPAIR, False, Reason.DISABLED, ENABLE)
    if look.paused:
        sentence = "no repair begins or goes further while the annotation is there"
        yield Judgement(Condition.HELD, True, Reason.PAUSED, sentence)
    elif look.outage.sentence is not None:
        yield Judgement(Condition.HELD, True, Reason.OUTAGE, look.outage.sentence)


def _ready(snapshot: NodesSnapshot, policy: PolicyView) -> Judgement:
    unknown = unknown_conditions(policy.spec.signals, snapshot.nodes)
    if unknown:
        sentence = "; ".join(unknown.values())
        return Judgement(Condition.READY, False, Reason.CONDITION_UNKNOWN, sentence)
    deadline_s = policy.spec.drain.deadline_seconds
    long = max((p for p in snapshot.pods if p.runtime), key=lambda p: p.grace_s, default=None)
    if long is not None and long.grace_s > deadline_s:
        sentence = (
            f"drain.deadlineSeconds {deadline_s} is under the {long.grace_s} s that the pods of "
            f"fleet {long.namespace}/{long.fleet} have to end; they get those all the same. Raise "
            "it, or lower the fleet's disruption.drainTimeoutSeconds"
        )
        return Judgement(Condition.READY, False, Reason.DEADLINE_TOO_SHORT, sentence)
    sentence = "nodes are watched" + (
        "; what would be done is in status.nodes" if policy.spec.mode == "DryRun" else ""
    )
    return Judgement(Condition.READY, True, Reason.WATCHING, sentence)
