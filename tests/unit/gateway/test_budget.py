"""A stream's budget: it moves when pods fail, but not for ever, and it takes no fleet along."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import openai
import pytest
from hash_pods import SECRET, MakePod, Served
from prometheus_client import CollectorRegistry
from small_vocabulary import byte_bundle
from tandem_runtime.contract import Role
from tandem_runtime.frontend.backend import ModelCard, Route, ServedModel
from tandem_runtime.frontend.errors import ApiError, BadRequest, Internal, Unavailable
from tandem_runtime.gateway import backend as backend_module
from tandem_runtime.gateway.backend import GatewayBackend
from tandem_runtime.gateway.load import Loads
from tandem_runtime.gateway.metrics import GatewayMetrics
from tandem_runtime.gateway.pages import PagesHeld
from tandem_runtime.gateway.pod_client import PodUnreachable
from tandem_runtime.gateway.pods import PodView
from tandem_runtime.protocol import GenerateEvent, GenerateRequest, Sampling

Attempt = Callable[[GenerateRequest], list[GenerateEvent]]
"""What a pod answers; an attempt whose events end without a finish broke off."""


def pod(name: str) -> PodView:
    return PodView(name, name, "127.0.0.1", "f", Role.BOTH, "r1", ("m",), 1.0, True, False)


class Played:
    """Discovery, tokenizers, health and pods of a backend, all played."""

    def __init__(self, pods: Sequence[PodView], attempt: Attempt) -> None:
        self.pods = tuple(pods)
        self.synced = True
        self.age_s = 0.0
        self.unusable: frozenset[str] = frozenset()
        self.attempt = attempt
        self.asked: list[str] = []
        self.ready: Callable[[], bool] = lambda: True
        self.model = ServedModel.of(ModelCard("m", "f", 0), byte_bundle())

    def pods_of(self, model: ServedModel) -> list[PodView]:
        return list(self.pods) if self.ready() else []

    async def generate(
        self, pod: PodView, ask: GenerateRequest
    ) -> AsyncGenerator[GenerateEvent, None]:
        self.asked.append(pod.name)
        for event in self.attempt(ask):
            yield event
        raise PodUnreachable(f"pod {pod.name} broke off")

    async def stream(self, max_tokens: int = 50) -> tuple[int, ApiError | None]:
        """Runs a stream; how many tokens came, and what ended it if it was no finish."""
        metrics = GatewayMetrics(CollectorRegistry())
        played: Any = self
        backend = GatewayBackend(
            played, played, played, played, Loads(), metrics, SECRET, played, PagesHeld()
        )
        request = GenerateRequest("s", 0, [1, 2, 3], Sampling(max_tokens))
        tokens = 0
        try:
            async for event in backend.generate(self.model, request, Route()):
                tokens += len(event.token_ids)
        except ApiError as error:
            return tokens, error
        return tokens, None


def some(tokens: int) -> Attempt:
    return lambda ask: [GenerateEvent(ask.epoch, token_ids=(7,)) for _ in range(tokens)]


def first_then(first: Attempt, later: Attempt) -> Attempt:
    return lambda ask: later(ask) if ask.output_ids else first(ask)


def broken(code: str) -> Attempt:
    return lambda ask: [GenerateEvent(ask.epoch, error="it broke", error_code=code, retryable=True)]


def refused(ask: GenerateRequest) -> list[GenerateEvent]:
    reason = "the prompt is too long for this pod."
    return [GenerateEvent(ask.epoch, error=reason, error_code="bad_request")]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long streams paused, in seconds; nobody waits for them."""
    paused: list[float] = []
    sleep = asyncio.sleep

    async def at_once(delay_s: float) -> None:
        paused.append(delay_s)
        assert sum(paused) < 600, "this stream goes on for ever"
        await sleep(0)

    monkeypatch.setattr(backend_module.asyncio, "sleep", at_once)
    return paused


PODS = [pod(f"p{n}") for n in range(20)]


@pytest.mark.usefixtures("pauses")
class TestBudget:
    async def test_attempts_without_progress_are_bounded_after_the_first_token_too(self) -> None:
        played = Played(PODS, first_then(some(1), some(0)))
        tokens, error = await played.stream()
        assert (tokens, len(played.asked)) == (1, 5)
        assert isinstance(error, Unavailable)
        assert error.message.startswith("5 attempts failed, the last one because pod p")

    async def test_progress_starts_the_count_again_up_to_ten_attempts(self) -> None:
        played = Played(PODS, some(2))
        tokens, error = await played.stream()
        assert (tokens, len(played.asked)) == (20, 10)
        assert isinstance(error, Unavailable)
        assert "10 attempts failed" in error.message

    async def test_a_stream_that_finds_good_pods_in_time_finishes(self) -> None:
        def attempt(ask: GenerateRequest) -> list[GenerateEvent]:
            if ask.epoch < 9:
                return [GenerateEvent(ask.epoch, token_ids=(7,))]
            return [GenerateEvent(ask.epoch, token_ids=(7,), finish_reason="length")]

        assert await Played(PODS, attempt).stream() == (10, None)

    async def test_repeated_failures_are_waited_out_longer_and_longer(
        self, pauses: list[float]
    ) -> None:
        await Played(PODS, first_then(some(1), some(0))).stream()
        assert pauses == [0.2, 0.4, 0.8, 1.6]

    async def test_waiting_for_pods_is_bounded_over_the_whole_stream(
        self, pauses: list[float]
    ) -> None:
        """A pod that comes, gives one token and goes does not renew the wait."""
        played = Played(PODS, some(1))
        played.ready = lambda: len(pauses) % 60 == 0
        tokens, error = await played.stream()
        assert isinstance(error, Unavailable)
        assert "No pod of fleet 'f' can serve now" in error.message
        assert 58 <= sum(pauses) <= 64
        assert 1 < tokens < 10

    @pytest.mark.parametrize("progress", [0, 3])
    async def test_two_pods_that_fail_inside_at_one_point_are_enough(self, progress: int) -> None:
        played = Played(
            PODS,
            first_then(lambda a: some(progress)(a) + broken("internal")(a), broken("internal")),
        )
        tokens, error = await played.stream()
        assert (tokens, len(played.asked)) == (progress, 2)
        assert isinstance(error, Internal)
        assert f"two pods failed at the same point of it, after {progress} tokens" in error.message
        assert "it broke" in error.message
        assert error.headers["x-should-retry"] == "false", "openai's clients repeat a 500 otherwise"

    async def test_failing_inside_at_different_points_is_bad_luck(self) -> None:
        played = Played(PODS, lambda a: some(1)(a) + broken("internal")(a))
        tokens, error = await played.stream()
        assert (tokens, len(played.asked)) == (10, 10)
        assert isinstance(error, Unavailable)

    async def test_what_every_pod_refuses_is_the_clients_fault(self) -> None:
        played = Played(PODS[:2], refused)
        _, error = await played.stream()
        assert sorted(played.asked) == ["p0", "p1"]
        assert isinstance(error, BadRequest)
        assert error.message == "The prompt is too long for this pod."

    async def test_a_stream_that_others_refuse_returns_to_the_pod_that_held_it(self) -> None:
        def attempt(ask: GenerateRequest) -> list[GenerateEvent]:
            held = played.asked[-1] == played.asked[0]
            if not held:
                return refused(ask)
            finish: Any = "length" if ask.output_ids else None
            return [GenerateEvent(ask.epoch, token_ids=(7,), finish_reason=finish)]

        played = Played(PODS[:2], attempt)
        assert await played.stream() == (2, None)
        assert len(played.asked) == 3


async def test_a_request_that_crashes_engines_takes_no_more_than_two(
    front: Any, make_pod: MakePod
) -> None:
    pods = [await make_pod(pod=f"pod-{n}") for n in range(5)]

    def crash(batch: Any) -> None:
        assert max(batch.positions, default=0) < 80, "this token crashes engines"

    for served in pods:
        served.runner.before_step = crash
    front.discovery.show(*(served.view() for served in pods))
    stream = await front.client.completions.create(
        model="hash", prompt="ten tokens", max_tokens=200, stream=True
    )
    assert (await anext(stream)).choices[0].text
    with pytest.raises(openai.APIError, match="two pods failed at the same point"):
        _ = [chunk async for chunk in stream]
    assert sum(_failed(served) for served in pods) == 2


def _failed(served: Served) -> bool:
    return served.pod.worker.failed.done()
