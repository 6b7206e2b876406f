"""Any interleaving of what an engine is asked for, by a state machine, without a model."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ledger_engine import DelayedRunner, LedgerRunner, ask, expected, make, next_token
from tandem_runtime.engine.sequence import SampledToken
from tandem_runtime.protocol import Sampling

STOPS = tuple(range(0, 97, 5))
"""A fifth of what may come: such streams end when nobody expects it."""


class EngineMachine(RuleBasedStateMachine):
    """Streams come by every door and leave by every door; blocks and tokens stay right."""

    runner: type[LedgerRunner] = LedgerRunner
    blocks = 12
    caching = True
    swap_tokens = 0

    def __init__(self) -> None:
        super().__init__()
        self.engine = make(
            blocks=12, budget=7, running=4, runner=self.runner, swap_tokens=self.swap_tokens
        )
        self.prompts: dict[str, list[int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.sampling: dict[str, Sampling] = {}
        self.receiving: dict[str, int] = {}
        self.held: set[str] = set()
        self.frozen: set[str] = set()
        self.decoded: dict[str, int] = {}
        """Streams that another pod decodes: where the KV that is here ends; -1 before a grant."""
        self.count = 0

    def _name(self) -> str:
        self.count += 1
        return f"s{self.count}"

    prompts_drawn = st.one_of(
        st.lists(st.integers(0, 96), min_size=1, max_size=20),
        st.integers(1, 20).map(lambda n: list(range(n))),
    )

    @rule(
        prompt=prompts_drawn,
        max_tokens=st.integers(1, 12),
        export=st.booleans(),
        history=st.booleans(),
        stops=st.sampled_from([(), STOPS]),
    )
    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        export: bool,
        history: bool,
        stops: tuple[int, ...],
    ) -> None:
        name = self._name()
        request = ask(name, prompt, max_tokens, export, stops, history)
        assert self.engine.add(request) is None
        self.prompts[name], self.tokens[name] = prompt, []
        self.sampling[name] = request.sampling

    @rule(prompt=prompts_drawn, max_tokens=st.integers(1, 12))
    def expect(self, prompt: list[int], max_tokens: int) -> None:
        name = self._name()
        request = ask(name, prompt, max_tokens)
        assert self.engine.expect(request) is None
        self.sampling[name] = request.sampling
        self.prompts[name], self.tokens[name] = prompt, []
        self.receiving[name] = -1

    @precondition(lambda self: self.receiving)
    @rule(data=st.data(), upto=st.integers(1, 20))
    def receive(self, data: st.DataObject, upto: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.receiving)))
        prompt, at = self.prompts[name], self.receiving[name]
        grant = self.engine.grant(name, upto)
        if grant is None:
            assert at < 0, "a later grant was refused"
            return
        at = grant.have_tokens if at < 0 else at
        end = min(grant.granted_tokens, len(prompt))
        if at < end:
            payload = b"".join(token.to_bytes(8, "little") for token in prompt[at:end])
            self.engine.write_kv(name, at, payload)
        self.receiving[name] = at = max(at, end)
        if at == len(prompt):
            del self.receiving[name]
            first = SampledToken(next_token(prompt))
            self._take(name, first, self.engine.start_decode(name, first).finish_reason)

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            output = self.engine.step()
            assert output.batch_tokens <= 7
            for stream in output.streams:
                if stream.token is not None:
                    self._take(stream.request_id, stream.token, stream.finish_reason)
            self.engine.check_integrity()

    def _take(self, name: str, token: SampledToken, reason: str | None) -> None:
        self.tokens[name].append(token.token_id)
        prompt = self.prompts[name]
        assert self.tokens[name] == expected(prompt, len(self.tokens[name]))
        sampling, count = self.sampling[name], len(self.tokens[name])
        stops = token.token_id in sampling.stop_token_ids
        assert reason == ("stop" if stops else "length" if count == sampling.max_tokens else None)
        sequence = self.engine._sequences.get(name)
        if sequence is not None and sequence.request.export:
            assert len(self.tokens[name]) == 1
            data = bytes(self.engine.read_kv(name, 0, len(prompt)))
            assert data == b"".join(token.to_bytes(8, "little") for token in prompt)
            self.held.add(name)
        elif reason is not None:
            assert sequence is None
            del self.prompts[name]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        self.held.discard(name)
        del self.prompts[name]
        assert self.engine.release(name)
        assert not self.engine.release(name)

    @precondition(lambda self: self.engine.stats().running + self.engine.stats().waiting)
    @rule(data=st.data())
    def freeze(self, data: st.DataObject) -> None:
        """Until it stands still, its last step's token may come, and may be its last."""
        scheduler = self.engine._scheduler
        moving = [s for s in (*scheduler.running, *scheduler.waiting) if not s.request.export]
        if not moving:
            return
        name = data.draw(st.sampled_from(sorted(s.request_id for s in moving)))
        while not self.engine.freeze(name):
            self.step(1)
            if name not in self.prompts:
                return
        self.frozen.add(name)
        assert self.engine.freeze(name), "once more changes nothing"
        end = self.engine.computed_tokens(name)
        if end:
            known = [*self.prompts[name], *self.tokens[name]]
            data_read = bytes(self.engine.read_kv(name, 0, end))
            assert data_read == b"".join(token.to_bytes(8, "little") for token in known[:end])

    @precondition(lambda self: self.frozen)
    @rule(data=st.data())
    def thaw(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.frozen)))
        self.frozen.discard(name)
        self.engine.thaw(name)
        self.engine.thaw(name)

    @rule(prompt=prompts_drawn, done=st.integers(0, 8), more=st.integers(1, 6))
    def expect_decoded(self, prompt: list[int], done: int, more: int) -> None:
        name = self._name()
        output = expected(prompt, done)
        request = replace(ask(name, prompt, done + more), output_ids=output)
        assert self.engine.expect(request, headroom_tokens=5) is None
        self.sampling[name] = request.sampling
        self.prompts[name], self.tokens[name] = prompt, output
        self.decoded[name] = -1

    @precondition(lambda self: self.decoded)
    @rule(data=st.data(), told=st.integers(0, 5), upto=st.integers(1, 30), last=st.booleans())
    def take_over(self, data: st.DataObject, told: int, upto: int, last: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.decoded)))
        prompt, output = self.prompts[name], self.tokens[name]
        grant = self.engine.grant(name, upto)
        if grant is None:
            assert self.decoded[name] < 0, "a later grant was refused"
            return
        at = max(self.decoded[name], grant.have_tokens)
        headroom = self.engine._sequences[name].headroom_tokens
        told = min(told, headroom, self.sampling[name].max_tokens - 1 - len(output))
        news = expected([*prompt, *output], told)
        self.engine.extend(name, news)
        output += news
        known = [*prompt, *output]
        end = min(grant.granted_tokens, len(known) - 1)
        if at < end:
            payload = b"".join(token.to_bytes(8, "little") for token in known[at:end])
            self.engine.write_kv(name, at, payload)
        self.decoded[name] = max(at, end)
        if last:
            del self.decoded[name]
            self.engine.resume(name)

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.prompts)))
        self.held.discard(name)
        self.frozen.discard(name)
        self.receiving.pop(name, None)
        self.decoded.pop(name, None)
        del self.prompts[name]
        assert self.engine.abort(name)

    @invariant()
    def nothing_leaks(self) -> None:
        self.engine.check_integrity()
        if isinstance(runner := self.engine._runner, DelayedRunner):
            held = self.engine._scheduler.pool._references
            assert all(held[block] for block in runner.blocks_in_flight()), "freed in flight"
            assert len(runner.flights) <= 1
        stats = self.engine.stats()
        assert stats.held == len(self.held) + len(self.frozen)
        assert stats.receiving == len(self.receiving) + len(self.decoded)
        assert stats.running <= 4

    def teardown(self) -> None:
        """Once nobody holds back, every stream ends and every block is free."""
        for name in self.frozen:
            self.engine.thaw(name)
        self.frozen.clear()
        for name in [*self.held, *self.receiving, *self.decoded]:
            self.engine.abort(name)
            del self.prompts[name]
        self.held.clear()
        for _ in range(500):
            if not self.engine.has_work:
                break
            for stream in self.engine.step().streams:
                if stream.token is not None:
                    self._take(stream.request_id, stream.token, stream.finish_reason)
            for name in self.held:
                self.engine.release(name)
                del self.prompts[name]
            self.held.clear()
        assert not self.engine.has_work, "a stream never ends"
        assert not self.prompts
        assert self.engine.stats().held_blocks == 0


class PipelinedMachine(EngineMachine):
    """The same with one step in flight: no block of it is freed, reused or written by others."""

    runner = DelayedRunner


class SwappingMachine(PipelinedMachine):
    """And with room on the host for the KV of some of those that give way, which are many in a
    small pool; without a prefix cache, which would have most of it."""

    blocks = 8
    caching = False
    swap_tokens = 20

    @initialize(prompts=st.lists(st.integers(1, 8), min_size=2, max_size=5))
    def crowd(self, prompts: list[int]) -> None:
        """Streams that outgrow the pool, all at once."""
        for length in prompts:
            self.add(list(range(length)), 12, False, False, ())

    def teardown(self) -> None:
        super().teardown()
        swap = self.engine._scheduler.swap
        assert swap is not None
        assert swap.held_bytes == 0


EngineMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestEngineMachine = EngineMachine.TestCase
PipelinedMachine.TestCase.settings = EngineMachine.TestCase.settings
TestPipelinedMachine = PipelinedMachine.TestCase
SwappingMachine.TestCase.settings = EngineMachine.TestCase.settings
TestSwappingMachine = SwappingMachine.TestCase
