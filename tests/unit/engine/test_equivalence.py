"""However a stream is computed, it is the same stream: tokens and their log probabilities.

The naive run computes each stream alone, its prompt in one piece, without a prefix cache. Chunked,
batched, prefix-cached, preempted, handed-over and resumed runs must give exactly the same numbers,
by any number of threads, in float32 and in bfloat16 (docs/design/engine.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request, SampledToken, StreamOutput
from tandem_runtime.protocol import Sampling

MakeEngine = Callable[..., Engine]
Tokens = list[SampledToken]
PREFIXES = [[7, 11, 13, 17] * 20, [5, 3] * 24]


@dataclass(frozen=True)
class Ask:
    """A stream to generate, and the step before which it arrives."""

    prompt: tuple[int, ...]
    sampling: Sampling
    arrives: int


samplings = st.builds(
    Sampling,
    max_tokens=st.integers(1, 24),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 0, 5]),
    min_p=st.sampled_from([0.0, 0.0, 0.2]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.4]),
    logit_bias=st.sampled_from([(), (), ((7, 2.5), (11, -100.0))]),
    seed=st.integers(0, 2**64 - 1),
    ignore_eos=st.just(True),
    logprobs=st.just(2),
)
prompts = st.builds(
    lambda prefix, cut, tail: tuple(prefix[:cut] + tail) or (1,),
    st.sampled_from(PREFIXES),
    st.integers(0, 80),
    st.lists(st.integers(0, 100), max_size=20),
)
asks = st.builds(Ask, prompts, samplings, st.integers(0, 12))
fixtures_are_stateless = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def request(name: str, ask: Ask, **changes: object) -> Request:
    return replace(Request(name, ask.prompt, ask.sampling), **changes)  # type: ignore[arg-type]


def drain(engine: Engine, pending: dict[int, list[Request]]) -> dict[str, Tokens]:
    """Step until all is done, adding the requests of step i before it; checks after each step."""
    tokens: dict[str, Tokens] = {}
    step = 0
    while engine.has_work or pending:
        for new in pending.pop(step, []):
            assert engine.add(new) is None
        for stream in engine.step().streams:
            if stream.token is not None:
                tokens.setdefault(stream.request_id, []).append(stream.token)
        engine.check_integrity()
        step += 1
        assert step < 2000, "no end"
    return tokens


def naive(make_engine: MakeEngine, ask: Ask, dtype: str) -> Tokens:
    engine = make_engine(dtype=dtype, prefix_caching=False)
    return drain(engine, {0: [request("alone", ask)]})["alone"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@fixtures_are_stateless
@given(
    streams=st.lists(asks, min_size=1, max_size=5),
    budget=st.integers(5, 70),
    blocks=st.integers(8, 24),
    reserve=st.sampled_from([0, 64]),
    overlaps=st.booleans(),
    swap_bytes=st.sampled_from([0, 1 << 14, 1 << 30]),
    threads=st.sampled_from([1, 2, 2, 3]),
)
def test_batched_chunked_cached_and_preempted_runs_equal_the_naive_run(
    make_engine: MakeEngine,
    dtype: str,
    streams: list[Ask],
    budget: int,
    blocks: int,
    reserve: int,
    overlaps: bool,
    swap_bytes: int,
    threads: int,
) -> None:
    engine = make_engine(
        dtype=dtype,
        blocks=blocks,
        max_batch_tokens=budget,
        max_running=min(budget, 5),
        growth_reserve_tokens=reserve,
        overlaps=overlaps,
        swap_bytes=swap_bytes,
        threads=threads,
    )
    pending: dict[int, list[Request]] = {}
    for index, ask in enumerate(streams):
        pending.setdefault(ask.arrives, []).append(request(str(index), ask))
    tokens = drain(engine, pending)
    for index, ask in enumerate(streams):
        assert tokens[str(index)] == naive(make_engine, ask, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@fixtures_are_stateless
@given(ask=asks, budget=st.integers(4, 70), page=st.integers(1, 40), warm=st.booleans())
@example(
    ask=Ask(tuple(range(64)), Sampling(max_tokens=9, temperature=0.0, logprobs=2), 0),
    budget=64,
    page=16,
    warm=True,
)
def test_a_handed_over_stream_equals_the_naive_run(
    make_engine: MakeEngine, dtype: str, ask: Ask, budget: int, page: int, warm: bool
) -> None:
    prefill = make_engine(dtype=dtype, max_batch_tokens=budget, max_running=4)
    decode = make_engine(dtype=dtype)
    if warm:
        drain(decode, {0: [request("earlier", ask)]})
    assert hand_over(prefill, decode, request("s", ask), page) == naive(make_engine, ask, dtype)
    assert prefill.stats().held_blocks == decode.stats().held_blocks == 0


def hand_over(prefill: Engine, decode: Engine, ask: Request, page: int) -> Tokens:
    """The stream's tokens, its KV moved in pages while it is computed."""
    assert decode.expect(ask) is None
    assert prefill.add(replace(ask, export=True)) is None
    known = len(ask.prompt_ids) + len(ask.output_ids)
    first = None
    at: int | None = None
    while first is None:
        (output,) = prefill.step().streams
        if output.computed is not None:
            grant = decode.grant(ask.request_id, output.computed.end)
            assert grant is not None
            at = grant.have_tokens if at is None else at
            while at < output.computed.end:
                end = min(at + page, output.computed.end)
                decode.write_kv(ask.request_id, at, bytes(prefill.read_kv(ask.request_id, at, end)))
                at = end
        first = output.token
    assert at == known
    output = decode.start_decode(ask.request_id, first)
    assert prefill.release(ask.request_id)
    assert output.token == first
    rest = [] if output.finish_reason else drain(decode, {})[ask.request_id]
    prefill.check_integrity()
    return [first, *rest]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@fixtures_are_stateless
@given(ask=asks, done=st.integers(0, 24), moved=st.booleans())
def test_a_resumed_stream_goes_on_as_if_nothing_had_happened(
    make_engine: MakeEngine, dtype: str, ask: Ask, done: int, moved: bool
) -> None:
    whole = naive(make_engine, ask, dtype)
    done = min(done, len(whole) - 1)
    again = request("again", ask, output_ids=tuple(t.token_id for t in whole[:done]))
    if moved:
        rest = hand_over(make_engine(dtype=dtype), make_engine(dtype=dtype), again, 16)
    else:
        rest = drain(make_engine(dtype=dtype, max_batch_tokens=33), {0: [again]})["again"]
    assert whole[:done] + rest == whole


EVERYTHING = Sampling(
    max_tokens=20,
    temperature=0.9,
    top_p=0.95,
    top_k=30,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=0.5,
    frequency_penalty=0.8,
    logit_bias=((3, 4.0), (5, 4.0)),
    seed=11,
    min_tokens=9,
    stop_token_ids=(3, 5),
    logprobs=1,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("moved", [False, True])
def test_every_position_is_a_place_to_resume_from(
    make_engine: MakeEngine, dtype: str, moved: bool
) -> None:
    ask = Ask(tuple(range(20)), EVERYTHING, 0)
    whole = naive(make_engine, ask, dtype)
    assert len(whole) > 9
    assert not {3, 5} & {token.token_id for token in whole[:9]}
    engine, other = make_engine(dtype=dtype), make_engine(dtype=dtype)
    for done in range(len(whole)):
        again = request(f"from {done}", ask, output_ids=[t.token_id for t in whole[:done]])
        if moved:
            rest = hand_over(engine, other, again, 16)
        else:
            rest = drain(engine, {0: [again]})[again.request_id]
        assert whole[:done] + rest == whole


@pytest.mark.parametrize("swap_bytes", [0, 1 << 30])
def test_preemption_happens_in_these_tests(make_engine: MakeEngine, swap_bytes: int) -> None:
    engine = make_engine(
        blocks=8,
        max_batch_tokens=40,
        max_running=4,
        growth_reserve_tokens=0,
        swap_bytes=swap_bytes,
    )
    sampling = Sampling(max_tokens=70, temperature=0.0, ignore_eos=True)
    asks = [Ask((index + 1,) * 10, sampling, 0) for index in range(3)]
    tokens = drain(engine, {0: [request(str(i), ask) for i, ask in enumerate(asks)]})
    assert engine.stats().preemptions > 0
    for index, ask in enumerate(asks):
        assert tokens[str(index)] == naive(make_engine, ask, "float32")


def test_outputs_say_what_they_should(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_tokens=20, max_running=4)
    sampling = Sampling(max_tokens=2, temperature=0.0, ignore_eos=True)
    assert engine.add(Request("s", [9] * 30, sampling, export=True)) is None
    outputs: list[StreamOutput] = []
    while engine.has_work:
        outputs += engine.step().streams
    assert [(o.computed and (o.computed.start, o.computed.end)) for o in outputs] == [
        (0, 20),
        (20, 30),
    ]
    assert [o.token is not None for o in outputs] == [False, True]
    assert engine.stats().held == 1
