"""A restart forgets nothing, and a decision log replays to the same decisions."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from tandem_operator.plan.scaling.record import LONGEST, Look, line, replay, state_of, state_text
from tandem_operator.plan.scaling.state import ScalingState
from tandem_operator.plan.scaling.window import PoolWindow

Make = Callable[..., Any]
RATE = 47_700.0


def worked(plant: Make) -> Any:
    pool = plant()
    for tick in range(400):
        pool.tick(prompt_tokens_s=(2.0 + tick % 60 / 20.0) * RATE)
    return pool


def test_a_state_is_small_text(plant: Make) -> None:
    text = state_text(worked(plant).state)
    assert len(text) < 2048
    assert state_text(state_of(text)) == text


def test_a_state_of_any_load_is_read_again(plant: Make) -> None:
    """Every kind of moment followed by every other, and no need ever the same."""
    pool, chance = plant(), Random(5)
    for _ in range(3000):
        pool.tick(prompt_tokens_s=RATE * 60.0 ** chance.uniform(-1.0, 1.0))
    text = state_text(pool.state)
    assert len(text) < LONGEST
    assert state_of(text) != ScalingState()
    assert state_text(state_of(text)) == text


def test_a_new_leader_decides_as_the_old_one_would_have(plant: Make) -> None:
    first, second = worked(plant), worked(plant)
    second.state = state_of(state_text(second.state))
    for tick in range(200):
        load = (1.0 + tick % 50 / 10.0) * RATE
        one, other = first.tick(prompt_tokens_s=load), second.tick(prompt_tokens_s=load)
        assert (one.target, one.reason) == (other.target, other.reason)


@pytest.mark.parametrize("text", [None, "", "{", '{"steps": 3}', "[]", "{}" * LONGEST])
def test_a_state_that_is_none_is_a_new_one(text: str | None) -> None:
    assert state_of(text) == ScalingState()


def test_the_log_replays(plant: Make) -> None:
    pool = plant()
    states: dict[str, ScalingState] = {}
    lines, size = [], 1
    for tick in range(120):
        now_s = 1e9 + 10.0 * tick
        load = pool._load((1.0 + tick % 40 / 10.0) * RATE, 0.0)
        window = PoolWindow(10.0, size, size, load=load if tick % 7 else None)
        look = Look(now_s, {"p": pool.policy}, states, {"p": window}, 6)
        decisions = look.decide()
        lines.append(line("default/fleet", look, decisions))
        states, size = {"p": decisions["p"].state}, decisions["p"].target
    replayed = [replay(text) for text in lines]
    assert all(one is not None and one.same for one in replayed)
    assert len({one.decided["p"] for one in replayed if one}) > 4
    # And a log that was tampered with does not.
    entry = json.loads(lines[0])
    entry["decisions"]["p"]["target"] += 1
    forged = replay(json.dumps(entry))
    assert forged is not None
    assert not forged.same
    assert replay('{"key": "InferenceFleet/default/a", "actions": []}') is None
    assert replay("not JSON") is None
