"""One step in flight while the next is planned: what it costs and when blocks come free."""

from __future__ import annotations

from ledger_engine import DelayedRunner, ask, expected, make, next_token
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import SampledToken, StepOutput


def pipelined(**options: int) -> tuple[Engine, DelayedRunner]:
    engine = make(runner=DelayedRunner, **options)
    runner = engine._runner
    assert isinstance(runner, DelayedRunner)
    return engine, runner


def tokens(outputs: list[StepOutput], name: str) -> list[int]:
    mine = [s for output in outputs for s in output.streams if s.request_id == name]
    return [s.token.token_id for s in mine if s.token is not None]


def run(engine: Engine) -> list[StepOutput]:
    outputs = []
    while engine.has_work:
        outputs.append(engine.step())
        engine.check_integrity()
    return outputs


def test_the_next_step_is_launched_before_this_one_is_collected() -> None:
    engine, runner = pipelined()
    engine.add(ask("s", [1, 2, 3], max_tokens=5))
    outputs = run(engine)
    assert runner.deepest == 2
    assert tokens(outputs, "s") == expected([1, 2, 3], 5)
    assert [o.batch_tokens for o in outputs] == [3, 1, 1, 1, 1], "its last token was foreseen"


def test_an_unforeseen_end_costs_one_row_whose_blocks_stay_until_then() -> None:
    engine, _ = pipelined()
    prompt = [1, 2, 3]
    engine.add(ask("s", prompt, max_tokens=9, stops=(next_token(prompt),)))
    assert engine.step().streams[0].finish_reason == "stop"
    assert engine.stats().running == 0
    assert engine.stats().held_blocks == 1, "the step in flight writes there"
    assert engine.has_work
    assert engine.step() == StepOutput(batch_tokens=1, next_tokens=1), "a decode's row, for nothing"
    assert engine.stats().held_blocks == 0
    assert not engine.has_work


def test_an_aborted_stream_s_blocks_are_free_when_the_step_in_flight_has_ended() -> None:
    engine, runner = pipelined(blocks=4, budget=16)
    engine.add(ask("gone", [1] * 12, max_tokens=4))
    engine.step()
    assert runner.flights
    assert engine.abort("gone")
    assert not engine.abort("gone")
    assert engine.stats().held_blocks == 4
    engine.add(ask("gone", [2] * 12, max_tokens=4))
    assert tokens(run(engine), "gone") == expected([2] * 12, 4)
    assert engine.stats().held_blocks == 0


def test_a_stream_that_needs_its_history_waits_for_its_own_last_token_only() -> None:
    engine, _ = pipelined()
    engine.add(ask("ahead", [1, 2], max_tokens=8))
    engine.add(ask("waits", [3, 4], max_tokens=4, history=True))
    outputs = run(engine)
    rows = [[s.request_id for s in output.streams] for output in outputs]
    assert all("ahead" in names for names in rows[:8])
    assert [("waits" in names) for names in rows[:7]] == [True, False] * 3 + [True]
    assert tokens(outputs, "waits") == expected([3, 4], 4)


def test_preemption_waits_for_the_step_in_flight() -> None:
    engine, _ = pipelined(blocks=4, budget=16)
    engine.add(ask("old", [1] * 7, max_tokens=8))
    engine.add(ask("young", [2] * 7, max_tokens=8))
    outputs = run(engine)
    assert sum(output.preempted for output in outputs) >= 1
    assert tokens(outputs, "old") == expected([1] * 7, 8)
    assert tokens(outputs, "young") == expected([2] * 7, 8)


def test_a_promised_grant_that_must_preempt_ends_the_step_in_flight_early() -> None:
    engine, _ = pipelined(blocks=6, budget=16)
    engine.expect(ask("far", [9] * 16, max_tokens=1))
    assert engine.grant("far", 4) is not None
    engine.add(ask("near", [1] * 4, max_tokens=12))
    outputs = [engine.step() for _ in range(7)]
    assert engine.grant("far", 16) is not None
    assert engine.stats().waiting == 1, "the running stream had to give way"
    engine.check_integrity()
    engine.write_kv("far", 0, b"".join((9).to_bytes(8, "little") for _ in range(16)))
    assert engine.start_decode("far", SampledToken(7)).finish_reason == "length"
    outputs += run(engine)
    assert tokens(outputs, "near") == expected([1] * 4, 12), "no token of that step is lost"


def test_only_known_tokens_are_offered_to_the_prefix_cache() -> None:
    engine, _ = pipelined(budget=32)
    engine.add(ask("first", [1, 2, 3], max_tokens=6))
    text = [1, 2, 3, *tokens(run(engine), "first")]
    engine.add(ask("again", text, max_tokens=1))
    assert run(engine)[0].streams[0].cached_tokens == 8
