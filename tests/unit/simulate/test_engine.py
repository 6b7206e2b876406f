"""An engine's epochs come to what its steps come to one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_fleet import engine_spec, trace_of
from tandem.simulate.engine import Engine
from tandem.simulate.engine_spec import EngineSpec
from tandem.simulate.requests import Requests


@dataclass
class Played:
    """An engine that is driven alone."""

    engine: Engine
    requests: Requests
    ends: dict[int, float] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    most_context: int = 0
    most_streams: int = 0

    def until(self, now_s: float) -> None:
        engine = self.engine
        while engine.busy and engine.ends_s <= now_s:
            at_s = engine.ends_s
            outcome = engine.finish_event(at_s)
            for request in outcome.streams_done:
                self.ends[request] = at_s
            self.waiting = outcome.preempted + self.waiting
            self.admit(at_s)
            self.most_context = max(self.most_context, engine.context_tokens)
            self.most_streams = max(self.most_streams, engine.running)

    def admit(self, now_s: float) -> None:
        requests = self.requests
        while self.waiting and self.engine.has_room(requests.context[self.waiting[0]]):
            self.stream(self.waiting.pop(0), now_s)

    def stream(self, request: int, now_s: float) -> None:
        if self.engine.add_stream(request, now_s) and not self.engine.busy:
            self.engine.start(now_s)


def step_by_step(spec: EngineSpec, arrivals: list[tuple[float, int, int]]) -> dict[int, float]:
    """The same, one step at a time: the oracle."""
    waiting = list(enumerate(arrivals))
    running: dict[int, list[int]] = {}
    ends: dict[int, float] = {}
    now_s = 0.0
    while waiting or running:
        if not running:
            now_s = max(now_s, waiting[0][1][0])
        while waiting and waiting[0][1][0] <= now_s + 1e-12:
            number, (_, context, left) = waiting.pop(0)
            running[number] = [context, left]
        context = sum(tokens for tokens, _ in running.values())
        now_s += spec.replica.decode_s(len(running), context)
        for number, state in list(running.items()):
            state[0] += 1
            state[1] -= 1
            if not state[1]:
                ends[number] = now_s
                del running[number]
    return ends


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.floats(0, 3), st.integers(1, 4000), st.integers(1, 120)),
        min_size=1, max_size=12,
    ),
    looks=st.lists(st.floats(0, 4), max_size=6),
)  # fmt: skip
def test_epochs_are_steps_in_one(rows: list[tuple[float, int, int]], looks: list[float]) -> None:
    rows = sorted(rows)
    spec = engine_spec()
    requests = Requests(trace_of(rows))
    played = Played(Engine(spec, requests, math.inf), requests)
    moments = [(at_s, 0, i) for i, (at_s, _, _) in enumerate(rows)]
    moments += [(at_s, 1, -1) for at_s in looks]
    for at_s, kind, request in sorted(moments):
        played.until(at_s)
        if kind:
            played.engine.look(at_s)  # Counting in between changes nothing.
        else:
            played.stream(request, at_s)
    played.until(math.inf)
    expected = step_by_step(spec, rows)
    assert played.ends.keys() == expected.keys()
    for request, end_s in expected.items():
        assert played.ends[request] == pytest.approx(end_s, rel=1e-6)
    sums = played.engine.sums
    assert sums.streams == sum(left for _, _, left in rows)
    assert played.engine.output_tokens == sums.streams
    assert played.engine.empty
    assert played.engine.context_tokens == 0


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.floats(0, 1), st.integers(1, 900), st.integers(1, 300)),
        min_size=1, max_size=20,
    ),
    max_running=st.integers(1, 8),
)  # fmt: skip
def test_streams_outgrow_neither_cache_nor_batch(
    rows: list[tuple[float, int, int]], max_running: int
) -> None:
    rows = sorted(rows)
    spec = engine_spec(capacity_tokens=1500, max_running=max_running)
    requests = Requests(trace_of(rows))
    played = Played(Engine(spec, requests, math.inf), requests)
    for request, (at_s, _, _) in enumerate(rows):
        played.until(at_s)
        played.waiting.append(request)
        played.admit(at_s)
    played.until(math.inf)
    assert played.ends.keys() == set(range(len(rows)))
    assert played.most_context <= 1500
    assert played.most_streams <= max_running


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    requests = Requests(trace_of([(0.0, 100, 200), (0.1, 5000, 2)]))
    engine = Engine(engine_spec(chunk_tokens=1024), requests, math.inf)
    engine.add_prompt(0, 0.0)
    engine.start(0.0)
    steps = 0
    first_s = None
    now_s = 0.0
    while engine.busy:
        if steps == 1:
            engine.add_prompt(1, now_s + 0.001)
        now_s = engine.ends_s
        outcome = engine.finish_event(now_s)
        steps += 1
        if 1 in outcome.prompts_done:
            first_s = now_s
    assert first_s is not None
    sums = engine.sums
    assert sums.prompt == 5100
    # The running stream takes one token of each chunk.
    assert sums.prompt_prompt == pytest.approx(100**2 + 4 * 1023**2 + (5000 - 4 * 1023) ** 2)
    assert engine.output_tokens == 199 + 1


def test_a_prompt_that_waited_too_long_is_given_up() -> None:
    requests = Requests(trace_of([(0.0, 60_000, 2), (0.001, 100, 2)]))
    engine = Engine(engine_spec(), requests, 0.5)
    for request in (0, 1):
        engine.add_prompt(request, 0.0)
    engine.start(0.0)
    expired = []
    while engine.busy:
        expired += engine.finish_event(engine.ends_s).expired
    assert expired == [1]
    assert engine.queued_tokens == 0
