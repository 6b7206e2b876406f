"""A stream that is decoded on one engine and goes on on another is the same stream, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_engine import DelayedRunner, ask, expected, make
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.grammar import Grammar
from tandem_runtime.engine.sequence import Request, SampledToken
from tandem_runtime.protocol import Sampling

MakeEngine = Callable[..., Engine]
Tokens = list[SampledToken]


@dataclass(frozen=True)
class Move:
    """When and how a stream moves."""

    asked: int
    """Tokens that it has when the other engine is asked to take it."""
    frozen: int
    """And when it is frozen, at least."""
    page: int
    """Tokens of one payload."""
    pages_a_step: int


moves = st.builds(
    Move, st.integers(1, 20), st.integers(1, 20), st.integers(1, 40), st.integers(0, 3)
)
samplings = st.builds(
    Sampling,
    max_tokens=st.integers(2, 24),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
    min_tokens=st.sampled_from([0, 6]),
    stop_token_ids=st.sampled_from([(), (3, 5)]),
    seed=st.integers(0, 2**64 - 1),
    ignore_eos=st.just(True),
    logprobs=st.just(1),
)
prompts = st.lists(st.integers(0, 100), min_size=1, max_size=70)


def drain(engine: Engine, name: str) -> Tokens:
    tokens = []
    while engine.has_work:
        tokens += [s.token for s in engine.step().streams if s.request_id == name and s.token]
        engine.check_integrity()
    return tokens


def alone(engine: Engine, request: Request) -> Tokens:
    assert engine.add(request) is None
    return drain(engine, request.request_id)


def migrate(
    source: Engine,
    target: Engine,
    request: Request,
    move: Move,
    grammar: Grammar | None = None,
) -> Tokens:
    """All tokens of the stream: begun on `source`, ended on `target` unless it ended before."""
    name = request.request_id
    assert source.add(request) is None
    tokens: Tokens = []

    def step() -> bool:
        """False once the stream has ended here."""
        outputs = [s for s in source.step().streams if s.request_id == name]
        tokens.extend(s.token for s in outputs if s.token)
        source.check_integrity()
        return not any(s.finish_reason for s in outputs)

    while len(tokens) < move.asked:
        if not step():
            return tokens
    ids = [token.token_id for token in tokens]
    taken = replace(request, output_ids=[*request.output_ids, *ids], grammar=grammar)
    assert target.expect(taken, headroom_tokens=request.sampling.max_tokens) is None
    grant = target.grant(name, len(request.prompt_ids) + request.sampling.max_tokens)
    assert grant is not None
    at, told = grant.have_tokens, len(ids)

    def send(limit: int) -> None:
        nonlocal at, told
        for _ in range(limit):
            end = min(at + move.page, source.computed_tokens(name))
            if at >= end:
                return
            target.extend(name, [token.token_id for token in tokens[told:]])
            told = len(tokens)
            target.write_kv(name, at, bytes(source.read_kv(name, at, end)))
            at = end

    while len(tokens) < move.frozen:
        send(move.pages_a_step)
        if not step():
            target.abort(name)
            return tokens
    while not source.freeze(name):
        if not step():
            target.abort(name)
            return tokens
    send(1000)
    target.extend(name, [token.token_id for token in tokens[told:]])
    assert source.abort(name)
    target.resume(name)
    tokens += drain(target, name)
    assert source.stats().held_blocks == target.stats().held_blocks == 0
    return tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    prompt=prompts,
    sampling=samplings,
    move=moves,
    budget=st.integers(5, 70),
    overlaps=st.tuples(st.booleans(), st.booleans()),
    warm=st.booleans(),
)
def test_a_migrated_stream_equals_the_undisturbed_run(
    make_engine: MakeEngine,
    dtype: str,
    prompt: list[int],
    sampling: Sampling,
    move: Move,
    budget: int,
    overlaps: tuple[bool, bool],
    warm: bool,
) -> None:
    """Frozen at any step, with one in flight, in pages of any size, onto a cache that knows it."""
    request = Request("s", prompt, sampling)
    whole = alone(make_engine(dtype=dtype, prefix_caching=False), request)
    source = make_engine(dtype=dtype, max_batch_tokens=budget, max_running=5, overlaps=overlaps[0])
    target = make_engine(dtype=dtype, overlaps=overlaps[1])
    if warm:
        alone(target, replace(request, request_id="earlier"))
    assert migrate(source, target, request, move) == whole


class Remainders(Grammar):
    """What may follow depends on all ids of the output; they only grow, as llguidance has it."""

    def __init__(self) -> None:
        self._seen: list[int] = []

    def allowed(self, output_ids: Sequence[int]) -> bytes:
        assert list(output_ids[: len(self._seen)]) == self._seen
        self._seen = list(output_ids)
        bits = sum(1 << n for n in range(101) if n % 7 == sum(output_ids) % 7)
        return bits.to_bytes(16, "little")


@pytest.mark.parametrize("asked", range(1, 12))
def test_a_grammar_s_state_is_rebuilt_from_the_ids(make_engine: MakeEngine, asked: int) -> None:
    source, target, other = (make_engine(overlaps=True) for _ in range(3))
    sampling = Sampling(16, temperature=1.0, seed=4, grammar="remainders", ignore_eos=True)
    request = Request("s", [1, 2, 3], sampling, grammar=Remainders())
    whole = alone(other, replace(request, grammar=Remainders()))
    assert len(whole) == 16
    assert migrate(source, target, request, Move(asked, asked + 2, 8, 1), Remainders()) == whole


def test_a_stream_twice_moved(make_engine: MakeEngine) -> None:
    """The second pod drains as well."""
    request = Request("s", list(range(40)), Sampling(max_tokens=20, temperature=0.9, seed=7))
    whole = alone(make_engine(), request)
    first, second, third = (make_engine(overlaps=True) for _ in range(3))
    begun = migrate(
        first, second, replace(request, sampling=Sampling(7, 0.9, seed=7)), Move(3, 4, 8, 1)
    )
    assert begun == whole[:7]
    again = replace(request, output_ids=[token.token_id for token in begun])
    assert begun + migrate(second, third, again, Move(5, 6, 16, 2)) == whole


class TestWithoutAModel:
    def test_a_preempted_stream_moves_without_kv(self) -> None:
        engine, other = make(blocks=4, budget=16), make()
        engine.add(ask("old", [1] * 7, max_tokens=9))
        engine.add(ask("young", [2] * 7, max_tokens=9))
        tokens: list[int] = []
        while engine.stats().waiting == 0 or not tokens:
            tokens += [
                s.token.token_id
                for s in engine.step().streams
                if s.request_id == "young" and s.token
            ]
        assert engine.freeze("young")
        assert engine.computed_tokens("young") == 0
        taken = replace(ask("young", [2] * 7, max_tokens=9), output_ids=tokens)
        assert other.expect(taken, headroom_tokens=4) is None
        assert other.grant("young", 50) is not None
        other.resume("young")
        engine.abort("young")
        rest = [t.token_id for t in drain(other, "young")]
        assert tokens + rest == expected([2] * 7, 9)
        assert [t.token_id for t in drain(engine, "old")][-1] == expected([1] * 7, 9)[-1]

    def test_a_frozen_stream_gives_its_blocks_for_a_promise_and_computes_them_again(self) -> None:
        engine = make(blocks=6, budget=16)
        engine.expect(ask("far", [9] * 16, max_tokens=1))
        assert engine.grant("far", 4) is not None
        engine.add(ask("near", [1] * 4, max_tokens=12))
        tokens = [s.token for _ in range(7) for s in engine.step().streams if s.token]
        assert engine.freeze("near")
        assert engine.grant("far", 16) is not None
        engine.check_integrity()
        assert engine.computed_tokens("near") == 0
        engine.abort("far")
        engine.thaw("near")
        assert [t.token_id for t in tokens + drain(engine, "near")] == expected([1] * 4, 12)

    def test_blocks_that_a_taken_over_stream_does_not_need_yet_are_not_lent(self) -> None:
        engine = make(blocks=10, budget=16)
        engine.expect(ask("far", [1, 2], max_tokens=12), headroom_tokens=12)
        assert engine.grant("far", 14) is not None
        engine.resume("far")
        engine.add(ask("near", [1] * 32, max_tokens=4))
        assert [t.token_id for t in drain(engine, "far")] == expected([1, 2], 12)

    def test_frozen_streams_leave_the_steps_to_others(self) -> None:
        engine = make(runner=DelayedRunner)
        engine.add(ask("still", [1, 2], max_tokens=8))
        engine.add(ask("goes on", [3, 4], max_tokens=4))
        engine.step()
        assert engine.freeze("still") is None, "a step in flight computes it"
        names = [s.request_id for s in engine.step().streams]
        assert names == ["still", "goes on"]
        assert engine.freeze("still")
        assert len(drain(engine, "goes on")) == 2
        assert not engine.has_work
        engine.thaw("still")
        assert len(drain(engine, "still")) == 6

    def test_what_cannot_be_frozen(self) -> None:
        engine = make()
        engine.add(ask("export", [1, 2], export=True))
        engine.expect(ask("far", [1, 2]))
        for name in ("export", "far"):
            with pytest.raises(ValueError, match=f"{name} is not decoded here"):
                engine.freeze(name)
        with pytest.raises(KeyError, match="there is no stream 'gone'"):
            engine.freeze("gone")
        engine.thaw("gone")

    def test_more_tokens_than_agreed(self) -> None:
        engine = make()
        engine.expect(ask("far", [1, 2], max_tokens=9), headroom_tokens=3)
        engine.extend("far", [4, 5])
        with pytest.raises(ValueError, match="2 more tokens came, and there is room for 1"):
            engine.extend("far", [6, 7])
        with pytest.raises(ValueError, match=r"a token is not in 0\.\.96"):
            engine.extend("far", [97])

    def test_the_headroom_ends_with_the_stream(self) -> None:
        engine = make()
        engine.expect(ask("far", [1, 2], max_tokens=4), headroom_tokens=100)
        with pytest.raises(ValueError, match="5 more tokens came, and there is room for 4"):
            engine.extend("far", [1] * 5)

    def test_the_last_known_token_is_computed_even_where_the_cache_has_it(self) -> None:
        engine = make(budget=16)
        drain_ids = [1, 2, 3, 4, 5, 6, 7, 8]
        engine.add(ask("earlier", drain_ids, max_tokens=1))
        drain(engine, "earlier")
        engine.expect(ask("far", drain_ids, max_tokens=4), headroom_tokens=4)
        grant = engine.grant("far", 8)
        assert grant is not None
        assert grant.have_tokens == 4


def test_a_stream_that_comes_from_another_engine_arrived_there() -> None:
    engine = make(blocks=8)
    engine.add(ask("own", [1, 2], max_tokens=4))
    engine.expect(ask("handed", [1, 2], max_tokens=4))
    for _ in range(3):
        engine.expect(ask("moving", [1, 2], max_tokens=4), headroom_tokens=4)
        assert engine.abort("moving")
    assert engine.stats().arrivals == 2


def test_a_frozen_stream_keeps_its_place_among_the_running() -> None:
    engine = make(blocks=8, running=1)
    engine.add(ask("a", [1, 2, 3], max_tokens=9))
    engine.step()
    engine.freeze("a")
    engine.add(ask("b", [4, 5, 6], max_tokens=9))
    engine.step()
    engine.thaw("a")
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (1, 1)


def test_spare_blocks_of_a_stream_that_came_are_not_taken_for_free_ones() -> None:
    """It was promised room for more tokens than it brought; that room is its own."""
    engine = make(blocks=8)
    engine.expect(replace(ask("came", [1, 2], max_tokens=30), output_ids=[7]), headroom_tokens=16)
    grant = engine.grant("came", 19)
    assert grant is not None
    engine.resume("came")
    engine.add(ask("long", list(range(1, 18)), max_tokens=2))
    while engine.has_work:
        engine.step()
        engine.check_integrity()
