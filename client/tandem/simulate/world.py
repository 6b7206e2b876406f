"""The run: arrivals, engines' events, handoffs, start-ups, failures and looks, in order of time.

Requests are bound to a prefill replica when they arrive, by the gateway's rule: the least
outstanding tokens, this prompt's uncached ones included. Streams wait for their pool until a decode
replica has room. A stream whose replica dies is computed again from its prompt and what it had
generated. Where no prefill replica serves, decode replicas compute prompts themselves.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush
from random import Random

from tandem.simulate.engine_spec import StepOutcome
from tandem.simulate.observe import Counts, Recent, Waiting, window_of
from tandem.simulate.pool import Phase, PoolState, ReplicaState
from tandem.simulate.requests import Fate, Requests
from tandem.simulate.run import DECODE, PREFILL, Run, Sample, Setup, SimulationError
from tandem.simulate.scalers import Scaler
from tandem.traces.trace import Trace

_PATIENCE_S = 86_400.0
"""After the trace's end; a run that takes longer is stuck."""


class World:
    """One fleet and one trace."""

    def __init__(self, setup: Setup, trace: Trace, scaler: Scaler) -> None:
        self._setup = setup
        self._trace = trace
        self._scaler = scaler
        self._random = Random(setup.seed)
        self._requests = Requests(trace)
        self._pools = {spec.name: PoolState(spec, self._requests) for spec in setup.pools}
        self._decode = self._pools[DECODE]
        self._prefill = self._pools.get(PREFILL)
        self._counts = {name: Counts() for name in self._pools}
        self._events: list[tuple[float, int, str, ReplicaState | int | None, int]] = []
        self._sequence = 0
        self._held: deque[int] = deque()
        self._held_tokens = 0
        self._streams: deque[int] = deque()
        """That wait for a decode replica."""
        self._first_tokens, self._output_tokens = Recent(), Recent()
        self._last_look_s = 0.0
        self._woken = False
        self._open = len(trace)
        self._run = Run(setup, self._requests)
        for pool in self._pools.values():
            for replica in pool.replicas:
                self._plan_failure(pool, replica, 0.0)

    def run(self) -> Run:
        """To the trace's end, and until every request has ended. Raises SimulationError."""
        arrivals, count, following = self._trace.arrival_s, len(self._trace), 0
        end_s = self._trace.duration_s
        self._push(self._setup.look_every_s, "look")
        now_s = 0.0
        while self._open or now_s < end_s:
            if following < count and arrivals[following] <= self._events[0][0]:
                now_s = arrivals[following]
                self._arrive(following, now_s)
                following += 1
                continue
            now_s, _, kind, subject, version = heappop(self._events)
            if now_s > end_s + _PATIENCE_S:
                raise SimulationError(self._stuck())
            self._handle(kind, subject, version, now_s)
        return self._result(now_s)

    def _stuck(self) -> str:
        return (
            f"a day after the trace's end {self._open} requests have not ended: "
            f"{len(self._streams)} streams wait for a decode replica, of which "
            f"{len(self._decode.of_phase(Phase.READY))} serve; let the pool keep at least one"
        )

    def _result(self, now_s: float) -> Run:
        pools = self._pools.values()
        run = self._run
        for pool in pools:
            for replica in pool.replicas:
                replica.engine.look(now_s)
                pool.collect(replica)
        run.ended_s = now_s
        run.replica_s = tuple(pool.replica_s(now_s) for pool in pools)
        run.scale_events = tuple(pool.scale_events for pool in pools)
        run.busy_s = tuple(pool.busy_s for pool in pools)
        return run

    # -- events ------------------------------------------------------------------------------------

    def _push(
        self, at_s: float, kind: str, subject: ReplicaState | int | None = None, version: int = 0
    ) -> None:
        self._sequence += 1
        heappush(self._events, (at_s, self._sequence, kind, subject, version))

    def _handle(
        self, kind: str, subject: ReplicaState | int | None, version: int, now_s: float
    ) -> None:
        if isinstance(subject, ReplicaState):
            if subject.phase is Phase.GONE:
                return
            if kind == "step":
                if subject.engine.version == version:
                    self._step(subject, now_s)
            elif kind == "ready":
                self._ready(subject, now_s)
            else:
                self._fail(subject, now_s)
        elif subject is None:
            self._look(now_s)
            self._push(now_s + self._setup.look_every_s, "look")
        else:
            self._streams.append(subject)
            self._admit(now_s)

    def _step(self, replica: ReplicaState, now_s: float) -> None:
        self._follow(replica, replica.engine.finish_event(now_s), now_s)

    def _follow(self, replica: ReplicaState, outcome: StepOutcome, now_s: float) -> None:
        """What an engine's event means for the others."""
        engine = replica.engine
        if engine.busy:
            self._push(engine.ends_s, "step", replica, engine.version)
        for request in outcome.prompts_done:
            self._prompt_done(replica, request, now_s)
        for request in outcome.streams_done:
            self._finish(request, now_s)
        for request in outcome.expired:
            self._end(request, Fate.EXPIRED, now_s)
        for request in outcome.preempted:
            self._run.preemptions += 1
            self._streams.appendleft(request)
        if self._streams and outcome.streams_done:
            self._admit(now_s)
        if replica.phase is Phase.DRAINING and engine.empty:
            self._pool_of(replica).end(replica, now_s)

    def _pool_of(self, replica: ReplicaState) -> PoolState:
        return self._pools[replica.pool]

    # -- requests ----------------------------------------------------------------------------------

    def _arrive(self, request: int, now_s: float) -> None:
        requests = self._requests
        if not self._fits(request):
            self._end(request, Fate.REFUSED, now_s)
            return
        self._route(request, now_s)
        self._run.prompt_tokens += requests.context[request]
        self._run.cached_tokens += requests.cached[request]

    def _fits(self, request: int) -> bool:
        """Whether the KV caches hold its prompt, and where it decodes its answer too."""
        prompt, answer = self._requests.context[request], self._requests.left[request]
        return all(
            prompt + (answer if spec.engine.keeps_streams else 0) <= spec.engine.capacity_tokens
            for spec in self._setup.pools
        )

    def _route(self, request: int, now_s: float) -> None:
        """To a replica, or to wait until one serves."""
        first = self._prefill or self._decode
        counts = self._counts[first.spec.name]
        counts.requests += 1
        servers = first.of_phase(Phase.READY) or self._decode.of_phase(Phase.READY)
        if servers:
            self._place(request, servers, now_s)
        else:
            self._held.append(request)
            self._held_tokens += self._requests.context[request]
        counts.prompt_tokens += self._requests.uncached(request)
        if not servers and not self._woken and any(p.size == 0 for p in self._pools.values()):
            self._woken = True
            self._look(now_s)

    def _place(self, request: int, servers: Sequence[ReplicaState], now_s: float) -> None:
        requests, trace = self._requests, self._trace
        blocks = () if trace.blocks is None else trace.blocks[request]
        tokens = requests.context[request]
        best, best_cost, best_cached = servers[0], math.inf, 0
        for replica in servers:
            held = replica.cache.leading(blocks) * trace.block_tokens if blocks else 0
            cached = min(held, tokens - 1)
            cost = replica.engine.outstanding_tokens + tokens - cached
            if cost < best_cost:
                best, best_cost, best_cached = replica, cost, cached
        requests.cached[request] = best_cached
        if best.engine.add_prompt(request, now_s):
            self._wake_engine(best, now_s)

    def _wake_engine(self, replica: ReplicaState, now_s: float) -> None:
        """Its next event has changed."""
        engine = replica.engine
        if engine.busy:
            self._push(engine.ends_s, "step", replica, engine.version)
        else:
            self._follow(replica, engine.start(now_s), now_s)

    def _prompt_done(self, replica: ReplicaState, request: int, now_s: float) -> None:
        requests, trace = self._requests, self._trace
        if trace.blocks is not None:
            pool = self._pool_of(replica)
            most = pool.cache_blocks(replica, trace.block_tokens)
            replica.cache.store(trace.blocks[request], most)
        local = replica.engine.spec.keeps_streams
        moved_s = 0.0 if local else self._handoff_s(replica, request)
        if not requests.left[request]:
            self._first_token(request, now_s + moved_s)
            self._finish(request, now_s + moved_s)
        elif local:
            self._first_token(request, now_s)
        else:
            self._counts[DECODE].requests += 1
            self._push(now_s + moved_s, "stream", request)

    def _first_token(self, request: int, at_s: float) -> None:
        """The user sees it; a stream that moves has shown its own long ago."""
        requests = self._requests
        if requests.first_token_s[request] < 0:
            requests.first_token_s[request] = at_s - requests.arrival_s[request]
            self._first_tokens.add(at_s, requests.first_token_s[request])

    def _handoff_s(self, replica: ReplicaState, request: int) -> float:
        """The last chunk's KV; earlier chunks travelled while later ones were computed."""
        spec = replica.engine.spec
        last = (self._requests.uncached(request) - 1) % spec.chunk_tokens + 1
        return last * spec.replica.model.kv_token_bytes / self._setup.handoff_bytes_per_s

    def _admit(self, now_s: float) -> None:
        """Streams that wait, in order, to the emptiest decode replica with room.

        The first token follows the last page, which a replica takes only with room for it.
        """
        while self._streams:
            if self._requests.expired(self._streams[0], now_s, self._setup.expiry_s):
                self._end(self._streams.popleft(), Fate.EXPIRED, now_s)
                continue
            tokens = self._requests.context[self._streams[0]]
            fitting = [r for r in self._decode.of_phase(Phase.READY) if r.engine.has_room(tokens)]
            if not fitting:
                return
            replica = min(fitting, key=lambda r: r.engine.outstanding_tokens)
            request = self._streams.popleft()
            self._first_token(request, now_s)
            if replica.engine.add_stream(request, now_s):
                self._wake_engine(replica, now_s)

    def _finish(self, request: int, now_s: float) -> None:
        requests = self._requests
        more = self._trace.output_tokens[request] - 1
        if more:
            spent_s = now_s - requests.arrival_s[request] - requests.first_token_s[request]
            self._output_tokens.add(now_s, spent_s / more)
        self._end(request, Fate.FINISHED, now_s)

    def _end(self, request: int, fate: Fate, now_s: float) -> None:
        self._requests.end(request, fate, now_s)
        self._open -= 1

    # -- replicas ----------------------------------------------------------------------------------

    def _ready(self, replica: ReplicaState, now_s: float) -> None:
        pool = self._pool_of(replica)
        replica.phase = Phase.READY
        self._counts[pool.spec.name].startups_s.append(now_s - replica.created_s)
        held, self._held, self._held_tokens = self._held, deque(), 0
        servers = (self._prefill or self._decode).of_phase(Phase.READY)
        servers = servers or self._decode.of_phase(Phase.READY)
        for request in held:
            if self._requests.expired(request, now_s, self._setup.expiry_s):
                self._end(request, Fate.EXPIRED, now_s)
            elif servers:
                self._place(request, servers, now_s)
            else:
                self._held.append(request)
                self._held_tokens += self._requests.context[request]
        self._admit(now_s)

    def _plan_failure(self, pool: PoolState, replica: ReplicaState, now_s: float) -> None:
        mean_s = self._setup.failures_s
        if mean_s is not None:
            self._push(now_s + self._random.expovariate(1 / mean_s), "fail", replica)

    def _fail(self, replica: ReplicaState, now_s: float) -> None:
        """The pod is gone at once; the operator asks for another one at once."""
        pool = self._pool_of(replica)
        self._run.failures += 1
        lost = replica.engine.fail(now_s)
        replacing = replica.phase is not Phase.DRAINING
        pool.end(replica, now_s)
        if replacing:
            self._create(pool, now_s)
        for request in lost:
            self._requests.moves[request] += 1
            self._requests.cached[request] = 0
            self._route(request, now_s)

    def _create(self, pool: PoolState, now_s: float) -> None:
        replica = pool.create(now_s, pool.spec.startup_s)
        self._push(replica.ready_s, "ready", replica)
        self._plan_failure(pool, replica, now_s)

    def _resize(self, pool: PoolState, target: int, now_s: float) -> None:
        if target == pool.size:
            return
        pool.scale_events += 1
        pool.size = target
        live = len(pool.live)
        for _ in range(target - live):
            self._create(pool, now_s)
        for replica in pool.victims(max(live - target, 0)):
            starting = replica.phase is Phase.STARTING
            replica.phase = Phase.DRAINING
            if starting or replica.engine.empty:
                pool.end(replica, now_s)

    # -- looks -------------------------------------------------------------------------------------

    def _look(self, now_s: float) -> None:
        self._give_up_held(now_s)
        self._admit(now_s)
        latencies_s = (
            self._first_tokens.quantile(self._setup.ttft_quantile, now_s),
            self._output_tokens.quantile(self._setup.tpot_quantile, now_s),
        )
        window_s = now_s - self._last_look_s
        windows = {
            name: window_of(
                pool, self._counts[name], self._waiting(pool), latencies_s, window_s, now_s
            )
            for name, pool in self._pools.items()
        }
        first = self._counts[(self._prefill or self._decode).spec.name]
        self._counts = {name: Counts() for name in self._pools}
        self._last_look_s = now_s
        choices = self._scaler.decide(windows, now_s)
        for name, choice in choices.items():
            self._resize(self._pools[name], choice.target, now_s)
        self._woken = self._woken and bool(self._held)
        pools = self._pools
        per_s = 1 / window_s if window_s > 0 else 0.0
        self._run.samples.append(
            Sample(
                at_s=now_s,
                requests_per_s=first.requests * per_s,
                prompt_tokens_per_s=first.prompt_tokens * per_s,
                sizes=tuple(pool.size for pool in pools.values()),
                ready=tuple(window.ready for window in windows.values()),
                reasons=tuple(choices[n].reason if n in choices else "" for n in pools),
                replica_s=tuple(pool.replica_s(now_s) for pool in pools.values()),
                ttft_s=latencies_s[0],
                tpot_s=latencies_s[1],
            )
        )

    def _give_up_held(self, now_s: float) -> None:
        while self._held and self._requests.expired(self._held[0], now_s, self._setup.expiry_s):
            request = self._held.popleft()
            self._held_tokens -= self._requests.context[request]
            self._end(request, Fate.EXPIRED, now_s)

    def _waiting(self, pool: PoolState) -> Waiting:
        if self._prefill is None:
            return Waiting(len(self._held) + len(self._streams), self._held_tokens)
        if pool is self._decode:
            # From zero a decode replica is needed as soon as anything waits for the fleet.
            held = len(self._held) if pool.size == 0 else 0
            return Waiting(len(self._streams) + held, 0)
        return Waiting(len(self._held), self._held_tokens)
