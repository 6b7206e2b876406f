"""How the live scaling benchmark judges what it saw."""

from __future__ import annotations

from benchmarks.scaling_live.load import Answer, recovered_after_s, share_within
from benchmarks.scaling_live.scene import Look, busier_than_least


def answers(*ttfts_s: float, from_s: float = 0.0) -> list[Answer]:
    """One each second."""
    return [Answer(from_s + i, ttft_s, 0.03) for i, ttft_s in enumerate(ttfts_s)]


def recovered(found: list[Answer], until_s: float) -> float:
    limits = {"ttft_s": 1.0, "tpot_s": 0.05, "share": 0.9, "bucket_s": 10.0}
    return recovered_after_s(found, 0.0, until_s, **limits)


def test_both_targets_count_and_failures_too() -> None:
    found = [
        Answer(0, 0.5, 0.03),
        Answer(0, 1.5, 0.03),
        Answer(0, 0.5, 0.06),
        Answer(0, 0.0, 0.0, "failed"),
    ]
    assert share_within(found, 1.0, 0.05) == 0.25
    assert share_within([], 1.0, 0.05) == 1.0


def test_recovery_ends_with_the_last_bad_bucket() -> None:
    assert recovered(answers(*[0.5] * 40), 40.0) == 0.0
    assert recovered(answers(*[2.0] * 10, *[0.5] * 30), 40.0) == 10.0
    relapsed = answers(*[2.0] * 10, *[0.5] * 10, *[2.0] * 2, *[0.5] * 18)
    assert recovered(relapsed, 40.0) == 30.0
    assert recovered(answers(*[0.5] * 35, *[2.0] * 5), 40.0) == 40.0, "never"


def look(running: dict[str, int], *leaving: str) -> Look:
    return Look(0.0, {}, {}, running, frozenset(leaving))


def test_who_leaves_is_held_against_the_idlest_a_look_before() -> None:
    looks = [
        look({"a": 3, "b": 1, "c": 0}),
        look({"a": 3, "b": 0, "c": 2}, "b"),
        look({"a": 3, "c": 2}, "b"),
        look({"a": 3, "c": 2}, "b", "c"),
        look({"a": 3}, "b", "c"),
    ]
    assert busier_than_least(looks) == [1, 0]
    assert busier_than_least(looks[:1]) == []
