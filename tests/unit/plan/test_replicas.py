"""Who decides a pool's size: all modes, and every change of mode."""

from __future__ import annotations

from typing import Any

import pytest
from tandem_operator.api.fleet import PoolTemplate
from tandem_operator.plan.replicas import Size, decide, overwritten_note

FIXED = "spec.decode.replicas"
SCALED = "spec.decode.scaling"


@pytest.mark.parametrize(
    ("pool", "live", "decided", "size"),
    [
        ({}, 7, None, Size(7)),
        ({}, 0, 3, Size(0)),
        ({"replicas": 3}, 3, 3, Size(3, owner=FIXED)),
        ({"replicas": 3}, 1, None, Size(3, write=True, owner=FIXED)),
        ({"replicas": 4}, 3, 3, Size(4, write=True, owner=FIXED)),
        ({"replicas": 3}, 5, 3, Size(3, write=True, overwritten=True, owner=FIXED)),
        ({"scaling": {"minReplicas": 2, "maxReplicas": 9}}, 1, None, Size(1, owner=SCALED)),
        ({"scaling": {"minReplicas": 2, "maxReplicas": 9}}, 5, 2, Size(5, owner=SCALED)),
    ],
    ids=[
        "others decide",
        "others stop the pool after it was fixed",
        "fixed and so",
        "fixed from the schema's default",
        "fixed to another number",
        "fixed and written by another",
        "scaled and not looked at yet",
        "scaled and written by another",
    ],
)
def test_decide(pool: dict[str, Any], live: int, decided: int | None, size: Size) -> None:
    assert decide(PoolTemplate.model_validate(pool), "decode", live, decided) == size


def test_an_automatic_size_is_written() -> None:
    pool = PoolTemplate.model_validate({"scaling": {"minReplicas": 2, "maxReplicas": 9}})
    assert decide(pool, "decode", 3, 3, scaled=5) == Size(5, write=True, owner=SCALED)
    assert decide(pool, "decode", 5, 3, scaled=5) == Size(5, owner=SCALED)


def test_the_other_writer_is_told_what_to_edit() -> None:
    size = Size(3, write=True, overwritten=True, owner=FIXED)
    assert overwritten_note(size, "chat-decode", 5, "chat") == (
        "Pool chat-decode was set to 5 replicas and is put back to 3, which spec.decode.replicas "
        "of InferenceFleet chat says: edit it there, or remove it to let others set the Pool's size"
    )
