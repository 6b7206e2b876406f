"""One replica's engine: a queue of prompts, running streams, steps.

While prompts wait, each step is an event of its own: a chunk of prompts beside one token for each
stream, as the runtime's scheduler makes it. While none waits, nothing changes until a stream ends
or another one comes, so all steps until then are one event (an *epoch*): a step's time is linear in
the streams' context, which grows by one token a stream and step, so k steps take

    T(k) = k x first + slope x streams x k (k - 1) / 2

and what has been done at any moment in between follows from the inverse.

The engine knows no other engine and no clock: it is told the time and answers with its next event.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from heapq import heappop, heappush
from itertools import islice

from tandem_operator.plan.scaling.window import NO_STEPS, StepSums

from tandem.simulate.engine_spec import EngineSpec, Piece, StepOutcome
from tandem.simulate.requests import Requests

GROWTH_RESERVE_TOKENS = 64
"""Room that admission leaves for each stream, as the runtime's scheduler does."""
_ALMOST = 1e-9


class Engine:
    """Steps of one replica."""

    def __init__(self, spec: EngineSpec, requests: Requests, expiry_s: float) -> None:
        self.spec = spec
        self._requests = requests
        self._expiry_s = expiry_s
        self.queue: deque[int] = deque()
        self.queued_tokens = 0
        """Uncached tokens of prompts that wait or are being computed."""
        self._head_done = 0
        self.context_tokens = 0
        """KV of the running streams."""
        self.joining: list[int] = []
        self.joining_tokens = 0
        self.running = 0
        self._ends: list[tuple[int, int, int]] = []
        """(step at which it ends, request, its join) of running streams."""
        self._order: list[tuple[int, int]] = []
        self._joins: dict[int, tuple[int, int, int]] = {}
        """Running stream: (join number, step at which it joined, context then)."""
        self._join_count = 0
        self._step = 0
        self._base: list[float] = [0.0]
        self._rated, self._next_spec = spec, spec
        """As it was made, and from the next event on."""
        # -- the event in flight
        self.busy = False
        self.version = 0
        self.ends_s = 0.0
        self._begun_s = 0.0
        self._steps = 0
        self._first_s = 0.0
        self._pieces: list[Piece] = []
        self._mixed = False
        # -- counted since the last look
        self.sums = NO_STEPS
        self.output_tokens = 0
        self.busy_s = 0.0

    # -- asked from outside ------------------------------------------------------------------------

    @property
    def streams(self) -> int:
        """Running, or about to at the next step."""
        return self.running + len(self.joining)

    @property
    def waiting_requests(self) -> int:
        """Prompts of which nothing is being computed."""
        return len(self.queue) - len(self._pieces)

    @property
    def waiting_tokens(self) -> int:
        """Uncached prompt tokens that are not in the step in flight."""
        return self.queued_tokens - sum(piece.tokens for piece in self._pieces)

    @property
    def empty(self) -> bool:
        return not self.busy and not self.queue and not self.joining

    @property
    def outstanding_tokens(self) -> int:
        """What routing compares."""
        return self.queued_tokens + self.context_tokens + self.joining_tokens

    def has_room(self, context_tokens: int) -> bool:
        """Whether a stream of so much context may join."""
        streams = self.running + len(self.joining)
        if streams >= self.spec.max_running:
            return False
        held = self.context_tokens + self.joining_tokens
        reserve = GROWTH_RESERVE_TOKENS * (streams + 1)
        return held + context_tokens + reserve <= self.spec.capacity_tokens or streams == 0

    def add_prompt(self, request: int, now_s: float) -> bool:
        """Queues a prompt. True: the engine's next event has changed."""
        self.queue.append(request)
        self.queued_tokens += self._requests.uncached(request)
        return self._interrupt(now_s)

    def add_stream(self, request: int, now_s: float) -> bool:
        """Lets a stream join at the next step. True: the engine's next event has changed."""
        self.joining.append(request)
        self.joining_tokens += self._requests.context[request]
        return self._interrupt(now_s)

    def slow_down(self, factor: float, now_s: float) -> bool:
        """Steps take that much longer than they were made to, from the next event on. True: the
        engine's next event has changed."""
        self._next_spec = replace(self._rated, slowdown=factor * self._rated.slowdown)
        return self._interrupt(now_s)

    def look(self, now_s: float) -> None:
        """Counts the steps that an epoch has done by now."""
        if self.busy and not self._mixed:
            self._commit(self._steps_within(now_s - self._begun_s, whole=True))

    def fail(self, now_s: float) -> list[int]:
        """Everything on the engine, to be computed elsewhere; what it has generated is known."""
        self.look(now_s)
        lost = [*self.queue, *self.joining, *self._joins]
        for request in self._joins:
            self._leave_midway(request)
        self.queue.clear()
        self._pieces = []
        self.busy = False
        self.version += 1
        return lost

    # -- events ------------------------------------------------------------------------------------

    def finish_event(self, now_s: float) -> StepOutcome:
        """The event in flight has ended; the next one begins if there is work."""
        outcome = StepOutcome()
        if self._mixed:
            self._end_mixed(outcome)
        else:
            self._commit(self._steps)
        self._collect_ended(outcome)
        self._begin(now_s, outcome)
        return outcome

    def start(self, now_s: float) -> StepOutcome:
        """Begins an event if the engine idles and has work."""
        outcome = StepOutcome()
        if not self.busy:
            self._begin(now_s, outcome)
        return outcome

    def _interrupt(self, now_s: float) -> bool:
        """Ends an epoch at its next step; an idle engine has to be started."""
        if not self.busy:
            return True
        if self._mixed:
            return False
        steps = self._steps_within(now_s - self._begun_s, whole=False)
        if steps >= self._steps:
            return False
        self._steps = steps
        self.version += 1
        self.ends_s = self._begun_s + self._epoch_s(steps)
        return True

    def _begin(self, now_s: float, outcome: StepOutcome) -> None:
        if self._next_spec is not self.spec:
            self.spec, self._base = self._next_spec, [0.0]
        self._admit()
        self._drop_expired(now_s, outcome)
        if self.queue and (self._head_done or self.has_room(self._requests.context[self.queue[0]])):
            self._begin_mixed()
        elif self.running:
            self._begin_epoch(outcome)
        else:
            self.busy = False
            return
        self.busy = True
        self.version += 1
        self._begun_s = now_s
        self.ends_s = now_s + self._epoch_s(self._steps)

    def _admit(self) -> None:
        context, left = self._requests.context, self._requests.left
        for request in self.joining:
            self._join_count += 1
            tokens = context[request]
            self._joins[request] = (self._join_count, self._step, tokens)
            self._order.append((self._join_count, request))
            heappush(self._ends, (self._step + left[request], request, self._join_count))
            self.running += 1
            self.context_tokens += tokens
        self.joining.clear()
        self.joining_tokens = 0

    def _drop_expired(self, now_s: float, outcome: StepOutcome) -> None:
        """Prompts that waited for too long and were not begun."""
        queue, first = self.queue, 1 if self._head_done else 0
        while len(queue) > first and self._requests.expired(queue[first], now_s, self._expiry_s):
            request = queue[first]
            del queue[first]
            self.queued_tokens -= self._requests.uncached(request)
            outcome.expired.append(request)

    # -- steps with prompts ------------------------------------------------------------------------

    def _begin_mixed(self) -> None:
        requests, spec = self._requests, self.spec
        budget = max(spec.chunk_tokens - self.running, 1)
        done = self._head_done
        pieces: list[Piece] = []
        tokens = pairs = context = 0
        room = spec.capacity_tokens - self.context_tokens
        for request in islice(self.queue, max(spec.max_running - self.running, 1)):
            room -= requests.context[request] + GROWTH_RESERVE_TOKENS
            if room < 0 and pieces:
                break
            uncached = requests.uncached(request)
            share = min(uncached - done, budget)
            before = requests.cached[request] + done
            pieces.append(Piece(request, share, last=done + share == uncached))
            tokens += share
            pairs += share * before + share * share // 2
            context += before + share
            budget -= share
            done = 0
            if budget <= 0:
                break
        self._mixed, self._steps, self._pieces = True, 1, pieces
        self._first_s = spec.slowdown * spec.replica.step_s(
            prompt_tokens=tokens,
            prompt_pairs=pairs,
            prompt_context_tokens=context,
            decodes=self.running,
            decode_context_tokens=self.context_tokens,
        )

    def _end_mixed(self, outcome: StepOutcome) -> None:
        tokens = 0
        for piece in self._pieces:
            tokens += piece.tokens
            if piece.last:
                self.queue.popleft()
                self._head_done = 0
                self._prompt_done(piece.request)
                outcome.prompts_done.append(piece.request)
            else:
                self._head_done += piece.tokens
        self.queued_tokens -= tokens
        self._count(1, tokens, self._first_s)
        self._pieces = []

    def _prompt_done(self, request: int) -> None:
        """Its last step sampled a token."""
        self._requests.left[request] -= 1
        if self.spec.keeps_streams and self._requests.left[request]:
            self.joining.append(request)
            self.joining_tokens += self._requests.context[request]

    # -- epochs of decode steps --------------------------------------------------------------------

    def _begin_epoch(self, outcome: StepOutcome) -> None:
        spec = self.spec
        while True:
            steps = self._next_end() - self._step
            room = (spec.capacity_tokens - self.context_tokens) // self.running
            if room >= 1 or self.running == 1:
                break
            self._preempt(outcome)
        self._mixed = False
        self._steps = steps if self.running == 1 else min(steps, room)
        self._first_s = self._base_s(self.running) + spec.slope_s * self.context_tokens

    def _base_s(self, streams: int) -> float:
        """A step of so many streams without context."""
        while len(self._base) <= streams:
            count = len(self._base)
            self._base.append(self.spec.slowdown * self.spec.replica.decode_s(count, 0))
        return self._base[streams]

    def _epoch_s(self, steps: int) -> float:
        if self._mixed:
            return self._first_s
        growth = self.spec.slope_s * self.running
        return steps * self._first_s + growth * steps * (steps - 1) / 2

    def _steps_within(self, seconds: float, *, whole: bool) -> int:
        """Steps that fit into so much time, or, not whole, that have begun in it."""
        if seconds <= 0:
            return 0
        half = self.spec.slope_s * self.running / 2
        linear = self._first_s - half
        if half > 1e-15 * linear:
            steps = (math.sqrt(linear * linear + 4 * half * seconds) - linear) / (2 * half)
        else:
            steps = seconds / self._first_s
        count = math.floor(steps + _ALMOST) if whole else math.ceil(steps - _ALMOST)
        return min(count, self._steps)

    def _commit(self, steps: int) -> None:
        """So many steps of the epoch are done; the rest goes on from there."""
        if steps <= 0:
            return
        seconds = self._epoch_s(steps)
        self._count(steps, 0, seconds)
        self._begun_s += seconds
        self._steps -= steps
        self._first_s += self.spec.slope_s * self.running * steps

    def _count(self, steps: int, prompt_tokens: int, seconds: float) -> None:
        streams = self.running
        self._step += steps
        self.context_tokens += steps * streams
        self.output_tokens += steps * streams
        self.busy_s += seconds
        p, s, n = float(prompt_tokens), float(streams), float(steps)
        sums = self.sums
        self.sums = StepSums(
            sums.steps + n,
            sums.seconds + seconds,
            sums.prompt + p,
            sums.streams + n * s,
            sums.prompt_prompt + p * p,
            sums.prompt_streams + p * s,
            sums.streams_streams + n * s * s,
            sums.seconds_prompt + seconds * p,
            sums.seconds_streams + seconds * s,
        )

    # -- streams that leave ------------------------------------------------------------------------

    def _next_end(self) -> int:
        ends = self._ends
        while True:
            step, request, join = ends[0]
            held = self._joins.get(request)
            if held is not None and held[0] == join:
                return step
            heappop(ends)

    def _collect_ended(self, outcome: StepOutcome) -> None:
        while self.running and self._next_end() <= self._step:
            _, request, _ = heappop(self._ends)
            self._leave(request)
            self._requests.left[request] = 0
            outcome.streams_done.append(request)

    def _leave(self, request: int) -> int:
        """Takes a stream off the batch; the tokens that it got here."""
        _, joined, context = self._joins.pop(request)
        generated = self._step - joined
        self.running -= 1
        self.context_tokens -= context + generated
        return generated

    def _preempt(self, outcome: StepOutcome) -> None:
        """The youngest stream gives way; its KV is copied out, not computed again."""
        while True:
            join, request = self._order.pop()
            held = self._joins.get(request)
            if held is not None and held[0] == join:
                break
        generated = self._leave(request)
        self._requests.generated(request, generated)
        outcome.preempted.append(request)

    def _leave_midway(self, request: int) -> None:
        _, joined, _ = self._joins[request]
        self._requests.generated(request, self._step - joined)
