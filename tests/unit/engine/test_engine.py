"""The engine's doors: what is refused and how it says so, and how streams end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.runner import TorchRunner
from tandem_runtime.engine.sequence import Request, RequestRefused, SampledToken
from tandem_runtime.model.decoder import Decoder
from tandem_runtime.protocol import Sampling

GREEDY = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine(blocks=8)


def ask(name: str = "s", length: int = 5, sampling: Sampling = GREEDY) -> Request:
    return Request(name, list(range(1, length + 1)), sampling)


def run(engine: Engine) -> tuple[list[int], str | None]:
    tokens, reason = [], None
    while engine.has_work:
        for stream in engine.step().streams:
            if stream.token is not None:
                tokens.append(stream.token.token_id)
            reason = stream.finish_reason or reason
    return tokens, reason


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        pytest.param(
            ask(length=100, sampling=Sampling(max_tokens=500)),
            "the prompt has 100 tokens and max_tokens is 500: together 600, more than the context "
            "of 512",
            id="context",
        ),
        pytest.param(
            ask(length=100, sampling=Sampling(max_tokens=30)),
            "the prompt has 100 tokens and max_tokens is 30: together more than the 128 tokens "
            "that this pod's KV cache holds",
            id="pool",
        ),
        pytest.param(ask(length=0), "the prompt is empty: give at least one token", id="empty"),
        pytest.param(
            ask(sampling=Sampling(max_tokens=0)), "max_tokens is 0: ask for at least 1", id="none"
        ),
        pytest.param(
            Request("s", [1, 101], GREEDY), "token id 101 is not in the vocabulary, 0..100", id="id"
        ),
        pytest.param(
            Request("s", [1], GREEDY, output_ids=[-1]),
            "token id -1 is not in the vocabulary, 0..100",
            id="output id",
        ),
    ],
)
@pytest.mark.parametrize("door", ["add", "expect"])
def test_what_can_never_be_served_is_refused_with_numbers(
    engine: Engine, request_: Request, sentence: str, door: str
) -> None:
    with pytest.raises(RequestRefused) as caught:
        getattr(engine, door)(request_)
    assert str(caught.value) == sentence
    assert not engine.has_work


def test_a_request_that_fills_the_pool_to_the_last_token_is_served(engine: Engine) -> None:
    assert (
        engine.add(ask(length=100, sampling=Sampling(29, temperature=0.0, ignore_eos=True))) is None
    )
    tokens, reason = run(engine)
    assert (len(tokens), reason) == (29, "length")


def test_a_name_in_use_is_refused(engine: Engine) -> None:
    engine.add(ask())
    with pytest.raises(RequestRefused, match="'s' is already in the engine"):
        engine.add(ask())


def test_streams_stop_at_stop_tokens_at_eos_and_at_the_limit(engine: Engine) -> None:
    engine.add(ask())
    tokens, reason = run(engine)
    assert (len(tokens), reason) == (8, "length")
    stop = next(t for t in tokens if tokens.index(t) > 0)
    cut = tokens[: tokens.index(stop) + 1]
    engine.add(ask(sampling=Sampling(8, temperature=0.0, stop_token_ids=(stop,))))
    assert run(engine) == (cut, "stop")
    engine.eos_token_ids = frozenset({stop})
    engine.add(ask(sampling=Sampling(8, temperature=0.0)))
    assert run(engine) == (cut, "stop")


def test_a_resumed_stream_that_has_ended_is_not_queued(engine: Engine) -> None:
    done = ask(sampling=Sampling(3, temperature=0.0))
    assert engine.add(replace(done, output_ids=[7, 8, 9])) == "length"
    assert engine.expect(replace(done, output_ids=[7, 2])) == "stop"
    assert not engine.has_work
    assert engine.stats().receiving == 0


def test_abort_frees_at_once_in_any_state(engine: Engine) -> None:
    engine.add(ask("running"))
    engine.step()
    engine.add(ask("waiting"))
    engine.expect(ask("far"))
    engine.grant("far", 5)
    for name in ("running", "waiting", "far"):
        assert engine.abort(name)
        assert not engine.abort(name)
    assert engine.stats().held_blocks == 0
    engine.check_integrity()


def test_logprobs_are_of_the_raw_distribution_most_likely_first(engine: Engine) -> None:
    engine.add(ask(sampling=Sampling(1, temperature=0.0, ignore_eos=True, logprobs=3)))
    (stream,) = engine.step().streams
    assert stream.token is not None
    top = stream.token.top_logprobs
    assert top[0].token_id == stream.token.token_id
    assert top[0].logprob == stream.token.logprob
    assert [entry.logprob for entry in top] == sorted((e.logprob for e in top), reverse=True)
    assert len(top) == 3


def test_kv_that_is_not_computed_is_not_given(engine: Engine) -> None:
    engine.add(replace(ask(), export=True))
    with pytest.raises(
        ValueError, match=r"KV of tokens \[0, 5\) was asked for, but 0 are computed"
    ):
        engine.read_kv("s", 0, 5)
    with pytest.raises(KeyError, match="there is no stream 'x'"):
        engine.read_kv("x", 0, 5)


def test_an_export_ends_with_its_first_token_and_keeps_its_kv(engine: Engine) -> None:
    engine.add(replace(ask(), export=True))
    (stream,) = engine.step().streams
    assert stream.token is not None
    assert stream.finish_reason is None
    assert not engine.has_work
    assert len(engine.read_kv("s", 0, 5)) == 5 * engine.layout.token_bytes
    assert engine.release("s")
    assert not engine.release("s")
    assert engine.stats().held_blocks == 0


def test_kv_is_taken_in_order_and_in_whole_tokens_only(engine: Engine) -> None:
    token = bytes(engine.layout.token_bytes)
    engine.expect(ask())
    with pytest.raises(ValueError, match=r"KV of tokens \[0, 1\) came, but \[0, 0\) is granted"):
        engine.write_kv("s", 0, token)
    grant = engine.grant("s", 5)
    assert grant is not None
    assert (grant.have_tokens, grant.granted_tokens) == (0, 5)
    for start, payload, sentence in [
        (1, token, r"KV of tokens \[1, 2\) came, but \[0, 5\)"),
        (0, token * 6, r"KV of tokens \[0, 6\) came"),
        (0, token + b"x", "is no whole number of tokens"),
        (0, b"", "of 0 bytes is no whole number of tokens"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            engine.write_kv("s", start, payload)
    with pytest.raises(ValueError, match="KV of 5 tokens is needed to decode, and 0 are here"):
        engine.start_decode("s", SampledToken(1))
    engine.write_kv("s", 0, token * 5)
    with pytest.raises(ValueError, match=r"first token 101 is not in 0\.\.100"):
        engine.start_decode("s", SampledToken(101))
    assert engine.start_decode("s", SampledToken(1)).finish_reason is None
    with pytest.raises(ValueError, match="s is running, it awaits no KV"):
        engine.grant("s", 5)


def test_a_first_token_that_ends_the_stream_ends_it_on_the_decode_side_too(engine: Engine) -> None:
    engine.expect(ask(sampling=Sampling(1, temperature=0.0)))
    engine.grant("s", 5)
    engine.write_kv("s", 0, bytes(engine.layout.token_bytes) * 5)
    assert engine.start_decode("s", SampledToken(7)).finish_reason == "length"
    assert not engine.has_work
    assert engine.stats().held_blocks == 0


def poisoned(engine: Engine) -> Engine:
    """Every block holds what a stream of infinities left."""
    runner = engine._runner
    assert isinstance(runner, TorchRunner)
    runner._cache.data[:, :, 1:] = float("nan")
    return engine


def test_what_earlier_streams_left_in_blocks_has_no_effect(
    make_engine: Callable[..., Engine],
) -> None:
    clean, dirty = make_engine(), poisoned(make_engine(max_batch_tokens=7, max_running=2))
    for name, length in (("a", 5), ("b", 40)):
        clean.add(ask(name, length))
        dirty.add(ask(name, length))
        assert run(dirty) == run(clean)


def test_what_earlier_streams_left_has_no_effect_on_received_kv(
    make_engine: Callable[..., Engine],
) -> None:
    source, dirty, clean = make_engine(), poisoned(make_engine()), make_engine()
    source.add(replace(ask(length=21), export=True))
    (output,) = source.step().streams
    assert output.token is not None
    dirty.expect(ask(length=21))
    dirty.grant("s", 21)
    for start, end in ((0, 10), (10, 21)):
        dirty.write_kv("s", start, bytes(source.read_kv("s", start, end)))
    dirty.start_decode("s", output.token)
    clean.add(ask(length=21))
    tokens, _ = run(clean)
    assert [output.token.token_id, *run(dirty)[0]] == tokens


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_stream_whose_logits_are_no_numbers_is_ended_alone(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    engine, clean = make_engine(), make_engine()
    engine.add(ask("good"))
    engine.step()
    engine.add(ask("bad", length=20))
    forward = Decoder.forward

    def broken(self: Decoder, token_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        logits = forward(self, token_ids, *rest)
        if len(token_ids) > 5:  # the step that computes the bad one's prompt
            logits[1, 7] = value
        return logits

    monkeypatch.setattr(Decoder, "forward", broken)
    outputs = {stream.request_id: stream for stream in engine.step().streams}
    assert (outputs["bad"].finish_reason, outputs["bad"].token) == ("abort", None)
    assert outputs["good"].token is not None
    assert not engine.abort("bad")
    clean.add(ask("good"))
    tokens, _ = run(clean)
    assert run(engine)[0] == tokens[2:]
    assert engine.stats().held_blocks == 0


def test_stats_count_what_happened(engine: Engine) -> None:
    engine.add(ask())
    run(engine)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens) == (5, 0, 8)
    assert stats.kv_usage == 0.0
    assert engine.kv_capacity_tokens == 128
