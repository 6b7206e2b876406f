"""Whose write of an autoscaled pool it was."""

from __future__ import annotations

from tandem_operator.api.pool import PoolSpec, PoolStatus
from tandem_operator.names import Reason
from tandem_operator.plan.scaled import LATE_S, WRITE_S, Scaled, settle
from tandem_operator.plan.scaling.decision import Decision, Numbers, ScaleReason
from tandem_operator.plan.scaling.state import ScalingState
from tandem_operator.plan.views import PoolView


def look(
    before: Scaled | None, size: int, target: int, now_s: float, *, shadow: bool = False
) -> Scaled:
    """A look that finds `size` and decides on `target`."""
    fields = {"fleetRef": {"name": "chat"}, "role": "decode", "revision": "r", "replicas": size}
    spec = PoolSpec.model_validate(fields)
    pool = PoolView("team", "chat-decode", "pool", "fleet", False, 1, spec, PoolStatus(), {})
    decision = Decision(target, ScaleReason.LOAD_OVER_BAND, Numbers(), ScalingState())
    return settle(before, pool, decision, now_s, shadow=shadow)


def test_a_write_that_a_newer_decision_overtook_is_nobody_elses() -> None:
    first = look(None, 2, 3, 1000.0)
    # The plan that writes 3 waits for a pod's answer meanwhile.
    overtaken = look(look(first, 2, 5, 1001.0), 2, 6, 1002.0)
    late = look(overtaken, 3, 6, 1003.0)
    assert (late.trouble, late.writes) == (None, True)
    assert look(late, 5, 6, 1004.0).trouble is None
    assert look(look(late, 6, 6, 1004.0), 6, 6, 1009.0).trouble is None


def test_another_writer_of_a_size_that_was_asked_for_is_noticed_in_the_end() -> None:
    scaled, now_s = look(look(None, 2, 3, 1000.0), 3, 5, 1005.0), 1010.0
    while scaled.trouble is None:
        assert now_s < 1000.0 + 2 * LATE_S
        # An HPA wants 3 every 15 s, and the policy 5.
        scaled = look(look(scaled, 5, 5, now_s), 3, 5, now_s + 15.0)
        now_s += 20.0
    assert scaled.trouble.reason == Reason.REPLICAS_CONTENDED


def test_a_size_that_nobody_asked_for_is_somebody_elses() -> None:
    scaled = look(look(None, 2, 3, 1000.0), 4, 4, 1001.0)
    assert scaled.trouble is not None


def test_decisions_that_are_not_carried_out_are_published_now_and_then() -> None:
    scaled, published = look(None, 2, 3, 1000.0, shadow=True), 1
    assert [d.replicas for d in scaled.published.decisions] == [3]
    for second in range(1, int(4 * WRITE_S)):
        before = scaled
        scaled = look(before, 2, 3 + second % 3, 1000.0 + second, shadow=True)
        published += scaled.published != before.published
    assert published == 4
