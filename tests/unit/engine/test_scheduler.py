"""The scheduler's policies, by example, without a model."""

from __future__ import annotations

import pytest
from ledger_engine import BLOCK, LedgerRunner, ask, expected, make, next_token
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request, SampledToken, StepOutput
from tandem_runtime.protocol import Sampling


def rows(output: StepOutput) -> list[str]:
    return [stream.request_id for stream in output.streams]


def test_decodes_come_first_and_a_prompt_fills_the_rest_in_chunks() -> None:
    engine = make(budget=8)
    engine.add(ask("short", [1, 2, 3], max_tokens=9))
    engine.step()
    engine.add(ask("long", list(range(1, 18))))
    sizes = [engine.step().batch_tokens for _ in range(3)]
    assert sizes == [8, 8, 4]  # 1 decode + 7, 1 + 7, 1 + 3


def test_the_queue_is_first_come_first_served() -> None:
    engine = make(running=1)
    for name in "abc":
        engine.add(ask(name, [1, 2], max_tokens=1))
    assert [rows(engine.step()) for _ in range(3)] == [["a"], ["b"], ["c"]]


def test_a_long_prompt_is_not_overtaken_while_it_waits_for_blocks() -> None:
    engine = make(blocks=6, budget=16)
    engine.add(ask("first", [1] * 12, max_tokens=6))
    engine.step()
    engine.add(ask("big", [2] * 16, max_tokens=2))
    engine.add(ask("small", [3], max_tokens=1))
    order = []
    while engine.has_work:
        order += [name for name in rows(engine.step()) if name != "first"]
    assert order.index("big") < order.index("small")


def test_the_youngest_is_preempted_and_goes_on_later() -> None:
    engine = make(blocks=4, budget=16)
    engine.add(ask("old", [1] * 7, max_tokens=8))
    engine.add(ask("young", [2] * 7, max_tokens=8))
    tokens: dict[str, list[int]] = {"old": [], "young": []}
    preempted = 0
    while engine.has_work:
        output = engine.step()
        preempted += output.preempted
        for stream in output.streams:
            assert stream.cached_tokens == 0, "its own blocks, found again, are no prompt cache hit"
            if stream.token:
                tokens[stream.request_id].append(stream.token.token_id)
    assert preempted >= 1
    assert tokens == {"old": expected([1] * 7, 8), "young": expected([2] * 7, 8)}


def test_a_preempted_stream_s_own_blocks_are_no_cached_prompt() -> None:
    engine = make(blocks=5, budget=16)
    engine.add(ask("old", [1] * 8, max_tokens=5))
    engine.add(ask("young", [2] * 8, max_tokens=9))
    computed = []
    while engine.has_work:
        output = engine.step()
        computed.append(output.batch_tokens)
        assert all(stream.cached_tokens == 0 for stream in output.streams)
    assert engine.stats().preemptions == 1
    assert engine.stats().cached_tokens == 0
    assert computed == [16, 1, 1, 1, 1, *[1] * 8], "its two full blocks were found again"


def preemptions(reserve: int) -> int:
    engine = make(blocks=24, budget=64, running=8, reserve=reserve, caching=False)
    for index in range(8):
        engine.add(ask(str(index), [index + 1] * 3, max_tokens=60))
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    return engine.stats().preemptions


def test_the_growth_reserve_keeps_admission_from_thrashing() -> None:
    assert preemptions(reserve=0) > 3 * preemptions(reserve=64)


def test_a_prefix_hit_is_not_computed_again_but_for_the_last_token() -> None:
    engine = make(budget=32)
    prompt = list(range(1, 17))
    engine.add(ask("first", prompt, max_tokens=1))
    engine.step()
    engine.add(ask("second", prompt, max_tokens=1))
    output = engine.step()
    assert output.batch_tokens == BLOCK  # the last block: its last token gives the logits
    assert output.streams[0].cached_tokens == 12
    assert engine.stats().cached_tokens == 12


def test_tenants_and_salts_do_not_share() -> None:
    engine = make(budget=32)
    prompt = list(range(1, 17))
    sampling = Sampling(max_tokens=1, temperature=0.0)
    for tenant, salt, hit in [("a", "", 0), ("b", "", 0), ("a", "s", 0), ("a", "", 12)]:
        name = f"{tenant}{salt}{hit}"
        engine.add(Request(name, prompt, sampling, tenant=tenant, cache_salt=salt))
        assert engine.step().streams[0].cached_tokens == hit


def test_without_prefix_caching_nothing_is_shared() -> None:
    engine = make(budget=32, caching=False)
    for name in "ab":
        engine.add(ask(name, list(range(1, 17)), max_tokens=1))
        assert engine.step().batch_tokens == 16
    assert engine.stats().cached_blocks == 0


def test_an_export_is_never_preempted() -> None:
    engine = make(blocks=4, budget=2, running=2)
    engine.add(ask("decode", [1] * 4, max_tokens=12))
    for _ in range(3):
        engine.step()
    engine.add(ask("export", [2] * 8, export=True))
    spans = []
    while engine.stats().held == 0:
        output = engine.step()
        spans += [s.computed for s in output.streams if s.computed]
        engine.check_integrity()
    assert engine.stats().preemptions > 0, "the older decode gave way, having no other victim"
    assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
    assert spans[-1].end == 8
    assert engine._sequences["export"].preemptions == 0
    assert bytes(engine.read_kv("export", 0, 8))[:8] == (2).to_bytes(8, "little")
    assert engine.release("export")


def test_a_decode_is_in_every_step_though_an_older_prompt_is_long() -> None:
    engine = make(budget=4, running=4)
    engine.add(ask("long", list(range(40))))
    engine.expect(ask("far", [5] * 4, max_tokens=6))
    engine.step()
    receive(engine, "far", [5] * 4)
    assert [rows(engine.step()) for _ in range(4)] == [["far", "long"]] * 4


def receive(engine: Engine, name: str, prompt: list[int]) -> None:
    """Hand a whole prompt's KV over."""
    assert engine.grant(name, len(prompt)) is not None
    engine.write_kv(name, 0, b"".join(token.to_bytes(8, "little") for token in prompt))
    engine.start_decode(name, SampledToken(next_token(prompt)))


def test_received_blocks_serve_others_even_when_the_first_token_ends_the_stream() -> None:
    engine = make()
    engine.expect(ask("far", list(range(8)), max_tokens=1))
    receive(engine, "far", list(range(8)))
    assert not engine.has_work
    engine.add(ask("near", list(range(12)), max_tokens=1))
    assert engine.step().streams[0].cached_tokens == 8


def test_admission_leaves_promised_blocks_alone() -> None:
    engine = make(blocks=6, budget=32)
    engine.expect(ask("far", [9] * 16, max_tokens=1))
    assert engine.grant("far", 4) is not None
    engine.add(ask("near", [1] * 12, max_tokens=1))
    assert engine.step().batch_tokens == 0, "3 of the 5 free blocks are promised to far"
    engine.abort("far")
    assert engine.step().batch_tokens == 12


def test_a_first_grant_needs_room_for_the_whole_prompt() -> None:
    engine = make(blocks=5)
    for name in "ab":
        engine.expect(ask(name, [ord(name) % 97] * 12, max_tokens=1))
    granted = engine.grant("a", 4)
    assert granted is not None
    assert (granted.have_tokens, granted.granted_tokens) == (0, 4)
    assert engine.grant("b", 4) is None, "2 free blocks are promised to a, 2 are too few for b"
    assert engine.abort("a")
    assert engine.grant("b", 4) is not None


def test_a_later_grant_preempts_rather_than_fails() -> None:
    engine = make(blocks=6, budget=16)
    engine.expect(ask("far", [9] * 16, max_tokens=1))
    assert engine.grant("far", 4) is not None
    engine.add(ask("near", [1] * 4, max_tokens=12))
    for _ in range(7):
        engine.step()
    grant = engine.grant("far", 16)
    assert grant is not None
    assert grant.granted_tokens == 16
    assert engine.stats().waiting == 1, "the running stream had to give way"
    engine.check_integrity()


def test_a_first_grant_waits_for_older_streams_in_the_queue() -> None:
    engine = make(blocks=6, budget=16)
    engine.add(ask("running", [1] * 12, max_tokens=8))
    engine.step()
    engine.add(ask("queued", [2] * 16, max_tokens=1))
    engine.expect(ask("far", [3] * 4, max_tokens=1))
    assert engine.grant("far", 4) is None
    engine.abort("queued")
    assert engine.grant("far", 4) is not None


def test_the_queue_waits_for_an_older_stream_whose_grant_was_refused() -> None:
    engine = make(blocks=6, budget=16)
    engine.add(ask("running", [1] * 12, max_tokens=2))
    engine.step()
    engine.expect(ask("far", [3] * 20, max_tokens=1))
    assert engine.grant("far", 4) is None
    engine.add(ask("later", [4] * 4, max_tokens=1))
    assert rows(engine.step()) == ["running"]
    assert engine.step().batch_tokens == 0
    assert engine.grant("far", 4) is not None
    assert rows(engine.step()) == ["later"]


def test_the_stand_in_refuses_to_read_what_was_not_written() -> None:
    with pytest.raises(AssertionError, match="never written"):
        LedgerRunner(3).read_kv([1], 0, 1)
