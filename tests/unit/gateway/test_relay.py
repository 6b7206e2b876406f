"""A stream's switch from pod to pod, whatever comes first and whatever fails; pods are scripts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_runtime.contract import Role
from tandem_runtime.gateway.attempt import Attempt
from tandem_runtime.gateway.journal import Journal
from tandem_runtime.gateway.load import Loads
from tandem_runtime.gateway.pod_client import PodUnreachable
from tandem_runtime.gateway.pods import PodView
from tandem_runtime.gateway.relay import Relay
from tandem_runtime.gateway.route import Pair
from tandem_runtime.protocol import GenerateEvent, GenerateRequest, PrefillTarget, Sampling

Script = list[Any]
"""Events, exceptions, and what is awaited between them."""


class Pods:
    """A `PodClient` whose pods say what the test wrote."""

    def __init__(self, **scripts: Script) -> None:
        self._scripts = scripts
        self.closed: list[str] = []

    async def generate(
        self, pod: PodView, request: GenerateRequest
    ) -> AsyncGenerator[GenerateEvent, None]:
        try:
            for line in self._scripts[pod.name]:
                if isinstance(line, Exception):
                    raise line
                if isinstance(line, GenerateEvent):
                    yield line
                else:
                    await line()
            raise PodUnreachable(f"pod {pod.name} ended a stream without its finish")
        finally:
            self.closed.append(pod.name)


class Due:
    """`Moves` in the test's hands."""

    def __init__(self) -> None:
        self.pods = {"a"}
        self.moving = 0

    def due(self, uid: str) -> bool:
        return uid in self.pods

    def begin(self, uid: str) -> bool:
        self.moving += 1
        return True

    def end(self, uid: str) -> None:
        self.moving -= 1


class Seen:
    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.pauses = 0

    def migration_ended(self, outcome: str) -> None:
        self.outcomes.append(outcome)

    def migration_paused(self, pause_s: float) -> None:
        assert pause_s >= 0
        self.pauses += 1


def pod(name: str) -> PodView:
    return PodView(name, name, "127.0.0.1", "f", Role.DECODE, "r", ("m",), 0.0, True, False)


def tokens(epoch: int, *ids: int, **fields: Any) -> GenerateEvent:
    return GenerateEvent(epoch, token_ids=ids, **fields)


def taken(*ids: int) -> GenerateEvent:
    return GenerateEvent(1, token_ids=ids, taken_over=True)


def over() -> GenerateEvent:
    return GenerateEvent(
        0, error="this stream goes on on pod b", error_code="moved", retryable=True
    )


class Scene:
    def __init__(self, a: Script, b: Script) -> None:
        self.journal = Journal(GenerateRequest("s", 0, [1, 2], Sampling(max_tokens=9)))
        self.pods, self.loads, self.due, self.seen = Pods(a=a, b=b), Loads(), Due(), Seen()
        attempt = self.attempt("a", self.journal.attempt(None))
        self.relay = Relay(attempt, self.journal, self.due, self.begin, self.seen)  # type: ignore[arg-type]

    def attempt(self, name: str, ask: GenerateRequest) -> Attempt:
        return Attempt(self.pods, self.loads, Pair(pod(name), None), ask)  # type: ignore[arg-type]

    def begin(self, current: Attempt, tried: frozenset[str]) -> Attempt | None:
        if "b" in tried:
            return None
        return self.attempt("b", self.journal.takeover(PrefillTarget("a", "127.0.0.1", 1)))

    async def run(self) -> list[int]:
        """The tokens that the client gets; they are the journal's."""
        got: list[int] = []
        try:
            while not self.journal.finished:
                event = await asyncio.wait_for(self.relay.next(), 10)
                if event.error is not None:
                    raise PodUnreachable(event.error)
                got += event.token_ids
        finally:
            assert got == self.journal.output_ids
            await self.relay.close()
            assert not self.due.moving
            assert not any(self.loads.outstanding_tokens().values())
        return got


async def soon() -> None:
    await asyncio.sleep(0.01)


async def later() -> None:
    await asyncio.sleep(0.05)


async def never() -> None:
    await asyncio.Event().wait()


FROM_B: Script = [tokens(1, 6), tokens(1, 7, finish_reason="length")]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([tokens(0, 3), soon, tokens(0, 4), tokens(0, 5), over()], [later, taken(4, 5), *FROM_B]),
        ([tokens(0, 3), later, tokens(0, 4), tokens(0, 5), over()], [taken(4, 5), *FROM_B]),
        ([tokens(0, 3), tokens(0, 4), later, tokens(0, 5), over()], [soon, taken(4, 5), *FROM_B]),
        ([tokens(0, 3), tokens(0, 4), tokens(0, 5), over()], [soon, taken(4, 5), later, *FROM_B]),
        ([tokens(0, 3), never], [taken(4, 5), *FROM_B]),
        ([tokens(0, 3), PodUnreachable("killed")], [later, taken(4, 5), *FROM_B]),
        ([tokens(0, 3), tokens(0, 4, 5), never], [later, taken(4, 5), *FROM_B]),
    ],
    ids=["a first", "b first", "between", "nothing new", "a stands", "a dies", "all was seen"],
)
async def test_no_token_is_lost_or_taken_twice(a: Script, b: Script) -> None:
    scene = Scene(a, b)
    assert await scene.run() == [3, 4, 5, 6, 7]
    assert scene.seen.outcomes == ["moved"]
    assert scene.seen.pauses == 1
    assert scene.journal.attempts == 1
    assert sorted(scene.pods.closed) == ["a", "b"]


@settings(max_examples=100, deadline=None)
@given(by_a=st.integers(1, 6), known=st.integers(1, 6), waits=st.lists(st.booleans(), min_size=12))
def test_in_any_order(by_a: int, known: int, waits: list[bool]) -> None:
    """A generates `by_a` tokens and freezes; the move begins with the first."""
    pause = iter(waits * 3)

    def script(events: Script) -> Script:
        lines: Script = []
        for event in events:
            lines += [soon, event] if next(pause) else [event]
        return lines

    a = script([*(tokens(0, n) for n in range(by_a)), over()])
    rest: Script = [tokens(1, n) for n in range(by_a, 8)]
    b = script([taken(*range(1, by_a)), *rest, tokens(1, 8, finish_reason="length")])
    scene = Scene(a, b)
    assert asyncio.run(scene.run()) == list(range(9))


LAST = tokens(0, 6, finish_reason="length")
GOES_ON: Script = [tokens(0, 4), later, tokens(0, 5), later, later, LAST]


@pytest.mark.parametrize(
    "b",
    [
        [GenerateEvent(1, error="no room", error_code="overloaded", retryable=True)],
        [PodUnreachable("killed")],
        [soon, PodUnreachable("killed")],
        [tokens(1, 4)],
        [taken()],
        [taken(9)],
    ],
    ids=["refuses", "dead", "dies", "knows no moves", "a went on since", "another stream"],
)
async def test_the_stream_stays_where_it_is(b: Script) -> None:
    scene = Scene([tokens(0, 3), soon, *GOES_ON], [later, *b])
    assert await scene.run() == [3, 4, 5, 6]
    assert scene.seen.outcomes == ["failed"]


async def test_a_drain_that_is_cancelled() -> None:
    scene = Scene([tokens(0, 3), soon, *GOES_ON], [never])

    async def cancel() -> None:
        scene.due.pods.clear()

    scene.pods._scripts["a"].insert(3, cancel)
    assert await scene.run() == [3, 4, 5, 6]
    assert scene.seen.outcomes == ["cancelled"]
    assert scene.pods.closed == ["b", "a"]


async def test_a_stream_that_ends_before_it_has_moved() -> None:
    scene = Scene([tokens(0, 3), soon, *GOES_ON], [never])
    assert await scene.run() == [3, 4, 5, 6]
    assert scene.seen.outcomes == ["ended"]


@pytest.mark.parametrize(
    ("end", "b", "reason"),
    [
        (over(), [soon, PodUnreachable("b is dead")], "goes on on pod b"),
        (PodUnreachable("a is dead"), [soon, PodUnreachable("b is dead")], "a is dead"),
        (PodUnreachable("a is dead"), [later, taken()], "a is dead"),
    ],
)
async def test_when_neither_has_it_the_attempt_has_failed(end: Any, b: Script, reason: str) -> None:
    """The gateway begins the stream again with what it has."""
    scene = Scene([tokens(0, 3), tokens(0, 4), soon, end], b)
    with pytest.raises(PodUnreachable, match=reason):
        await scene.run()
    assert scene.journal.output_ids == [3, 4]
    again = scene.journal.attempt(None)
    assert (again.epoch, again.output_ids, again.take_from) == (2, [3, 4], None)


async def test_the_other_pod_s_silence_is_not_awaited_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tandem_runtime.gateway.relay._ANSWER_S", 0.05)
    scene = Scene([tokens(0, 3), over()], [never])
    with pytest.raises(PodUnreachable, match="goes on on pod b"):
        await scene.run()
    assert scene.seen.outcomes == ["failed"]


async def test_nothing_moves_before_its_first_token() -> None:
    async def look() -> None:
        assert scene.due.moving == 0

    scene = Scene([soon, look, tokens(0, 3, finish_reason="stop")], [taken()])
    assert await scene.run() == [3]
    assert scene.seen.outcomes == []


async def test_log_probabilities_are_cut_with_their_tokens() -> None:
    from tandem_runtime.protocol import TokenLogprob

    def logprob(*ids: int) -> dict[str, Any]:
        pairs = tuple(TokenLogprob(n, -n / 8) for n in ids)
        return {"logprobs": pairs, "top_logprobs": tuple((pair,) for pair in pairs)}

    event = GenerateEvent(1, token_ids=(4, 5), taken_over=True, **logprob(4, 5))
    journal = Journal(GenerateRequest("s", 0, [1], Sampling(max_tokens=9)))
    journal.attempt(None)
    journal.take(tokens(0, 3))
    ask = journal.takeover(PrefillTarget("a", "127.0.0.1", 1))
    journal.take(tokens(0, 4))
    fresh = journal.switch(ask, event)
    assert fresh == GenerateEvent(1, token_ids=(5,), taken_over=True, **logprob(5))
    assert journal.take(fresh)
    assert not journal.take(tokens(0, 5)), "of the pod before"
    assert journal.output_ids == [3, 4, 5]
