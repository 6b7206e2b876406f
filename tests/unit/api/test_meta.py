"""Conditions keep their transition times."""

from __future__ import annotations

from tandem_operator.api.meta import Judgement, find_condition, set_conditions


def test_transition_time_changes_with_status_alone() -> None:
    first = set_conditions((), [Judgement("Ready", False, "A", "a")], 1, "t1")
    second = set_conditions(first, [Judgement("Ready", False, "B", "b")], 2, "t2")
    third = set_conditions(second, [Judgement("Ready", True, "C", "c")], 2, "t3")
    assert [c[0].last_transition_time for c in (first, second, third)] == ["t1", "t1", "t3"]
    assert (second[0].reason, second[0].observed_generation) == ("B", 2)


def test_conditions_are_sorted_and_the_unnamed_are_dropped() -> None:
    old = set_conditions((), [Judgement("Stalled", True, "A", "")], 1, "t1")
    new = set_conditions(
        old, [Judgement("Ready", None, "B", ""), Judgement("Available", True, "C", "")], 1, "t2"
    )
    assert [(c.type, c.status) for c in new] == [("Available", "True"), ("Ready", "Unknown")]
    assert find_condition(new, "Stalled") is None
    assert find_condition(new, "Ready") == new[1]
