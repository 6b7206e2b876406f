"""The engine: streams in, tokens out, one `step` at a time.

Single-threaded: every method is called from one thread, between steps. Nothing here knows torch;
what computes is behind `Runner`. Where that can work on its own, the engine keeps one step *in
flight*: `step` launches the next one, then collects the tokens of the one before. A stream's life:

    add ---> waiting ---> running ---> gone, with its finish reason      (serve it here)
    add(export) --------> running ---> held ---> release                 (prefill for another pod)
    add, with cache tiers ---> fetching ---> waiting ...
    expect ---> receiving: grant, write_kv ... start_decode ---> running (decode after a handoff)
    running --> freeze ---> frozen: read_kv ---> abort, or thaw          (another pod goes on)
    expect ---> receiving: grant, extend, write_kv ... resume ---> running      (that pod)

`abort` ends a stream in any of these states; its blocks are free when no step in flight uses them.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import replace

from tandem_runtime.engine.admission import Capacity, check_request
from tandem_runtime.engine.batch import Work, build_batch
from tandem_runtime.engine.flight import Flight, Probe, Runner
from tandem_runtime.engine.keeping import Keeping
from tandem_runtime.engine.lending import Lending
from tandem_runtime.engine.received import (
    check_extension,
    check_first,
    check_payload,
    check_resume,
)
from tandem_runtime.engine.scheduler import Scheduler
from tandem_runtime.engine.sequence import (
    FinishReason,
    Grant,
    Request,
    RequestRefused,
    SampledToken,
    Sequence,
    Span,
    State,
    StepOutput,
    StreamOutput,
    finish_reason,
)
from tandem_runtime.engine.stats import EngineStats, Totals, engine_stats
from tandem_runtime.engine.tiered import Tiered
from tandem_runtime.kv.layout import KvLayout, Payload
from tandem_runtime.kv.tiers.cache import TierCache
from tandem_runtime.prefix import root_key


class Engine:
    """One replica's engine. See the module for the states of a stream."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        layout: KvLayout,
        layout_hash: bytes,
        vocab_size: int,
        max_context_tokens: int,
        eos_token_ids: frozenset[int],
        prefix_secret: bytes = b"",
        tiers: TierCache | None = None,
        probe: Probe | None = None,
    ) -> None:
        self.tiers = tiers
        self.layout, self.layout_hash = layout, layout_hash
        self.vocab_size, self.max_context_tokens = vocab_size, max_context_tokens
        self.eos_token_ids = eos_token_ids
        self._scheduler, self._runner = scheduler, runner
        self.pages, self.probe = scheduler.pool.pages, probe
        self.lending = Lending(scheduler.pool, runner, scheduler.block_tokens)
        self._tiered = Tiered(tiers, scheduler, runner, self.lending, layout.layers)
        self.keeping = Keeping(scheduler, self._tiered, self._stream)
        self._prefix_secret = prefix_secret
        self._flight: Flight | None = None
        self._early: StepOutput | None = None
        """Of a step that had to end before its turn; the next `step` gives it."""
        self._sequences: dict[str, Sequence] = {}
        self._totals = Totals()
        self.on_admission: Callable[[Sequence], None] = lambda sequence: None
        """Told of streams whose first step is about to begin."""

    # -- streams ----------------------------------------------------------------------------------
    def add(self, request: Request) -> FinishReason | None:
        """Queue a stream to be computed here.

        Returns:
            None, or the reason why `output_ids` already ends the stream; it is then not queued.

        Raises:
            RequestRefused: it can never be served (too long, unknown tokens, name in use).
        """
        self._check(request)
        ended = self._ended(request)
        if ended is None:
            self._tiered.queue(self._sequence(request))
        return ended

    def abort(self, request_id: str) -> bool:
        """End a stream, its blocks are freed once no step uses them; False if there is none."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        self._tiered.leave(sequence)
        self._scheduler.remove(sequence)
        return True

    def step(self) -> StepOutput:
        """Collect one batch; the next one is launched before, where the runner overlaps.

        `batch_tokens` is 0 when nothing could be done: no work, or the queue waits for blocks that
        held and receiving streams keep. Wait for the next call of another method then.
        """
        output, self._early = self._early, None
        if output is not None:
            return output
        self._tiered.before_step()
        preemptions = self._totals.preemptions
        self._flight = flight = self._flight or self._launch()
        if flight is not None:
            self._flight = self._launch() if self._runner.overlaps else None
            output = self._collect(flight)
        return replace(output or StepOutput(), preempted=self._totals.preemptions - preemptions)

    def observe_loading(self, observe: Callable[[float], None]) -> None:
        """Tell how long a step waited for what came from cache tiers, in seconds."""
        self._tiered.observe = observe

    @property
    def loads_kv(self) -> bool:
        """Whether the next `step` writes pages of a cache tier, though it may compute nothing."""
        return self._tiered.loads_kv

    def _launch(self) -> Flight | None:
        plan = self._scheduler.schedule(settled=self._flight is None)
        if plan is None:
            return None
        self._totals.preemptions += len(plan.preempted)
        for sequence in plan.admitted:
            if sequence.preemptions == 0:
                self._totals.count(sequence)
                self._tiered.count(sequence)
                self.on_admission(sequence)
        if not plan.works:
            return None
        batch, works = build_batch(plan.works, self._scheduler.block_tokens)
        self._scheduler.launch(works)
        return Flight(self._runner.launch(batch), works, batch.rows)

    def _collect(self, flight: Flight) -> StepOutput:
        """Its rows of streams that have ended meanwhile were for nothing."""
        sampled = iter(self._runner.collect(flight.launched))
        outputs = []
        for work in flight.works:
            token = next(sampled) if work.samples else None
            if self._scheduler.land(work):
                outputs.append(self._sampled(work, token) if work.samples else self._computed(work))
        next_tokens = sum(work.samples and work.count == 1 for work in flight.works)
        return StepOutput(tuple(outputs), flight.rows, next_tokens=next_tokens)

    @property
    def has_work(self) -> bool:
        """Whether `step` could do something; held and receiving streams need no step."""
        under_way = self._flight or self._early or self._tiered.ready
        return bool(under_way or self._scheduler.running or self._scheduler.waiting)

    def stats(self) -> EngineStats:
        """Counts for metrics and for the pod's state."""
        return engine_stats(self._scheduler, self._totals)

    @property
    def block_tokens(self) -> int:
        return self._scheduler.block_tokens

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that the whole pool holds."""
        return self._scheduler.pool.total_blocks * self.block_tokens

    @property
    def max_batch_tokens(self) -> int:
        """Tokens that one step computes at most."""
        return self._scheduler.max_batch_tokens

    @property
    def max_running(self) -> int:
        """Streams that run at the same time at most."""
        return self._scheduler.max_running

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks and streams agree; cheap enough for idle moments."""
        self._scheduler.check_integrity()

    def close(self) -> None:
        """Ends what the runner started; the engine is of no use afterwards."""
        self._tiered.close()
        self._runner.close()

    # -- KV out: prefill for another pod ----------------------------------------------------------
    def read_kv(self, request_id: str, start_token: int, end_token: int) -> memoryview:
        """Canonical KV of a stream's tokens [start, end), all of them computed.

        Returns:
            `(end - start) * layout.token_bytes` bytes, [layer, k|v, kv head, token, head dim].
        """
        sequence = self._stream(request_id)
        if not 0 <= start_token < end_token <= sequence.computed_tokens:
            raise ValueError(
                f"{request_id}: KV of tokens [{start_token}, {end_token}) was asked for, but "
                f"{sequence.computed_tokens} are computed"
            )
        return self._runner.read_kv(sequence.block_ids, start_token, end_token)

    def release(self, request_id: str) -> bool:
        """Let an export's blocks go (its KV has arrived); False if there is none of that name."""
        return self.abort(request_id)

    # -- KV out: a running stream for another pod --------------------------------------------------
    def computed_tokens(self, request_id: str) -> int:
        """Known tokens whose KV can be read."""
        return self._stream(request_id).computed_tokens

    def freeze(self, request_id: str) -> bool | None:
        """Stop a running, waiting or fetching stream between two steps, with its KV.

        None while a step in flight computes it: its token still comes, ask again after the step.
        Raises KeyError once the stream has ended.
        """
        sequence = self._stream(request_id)
        self._scheduler.freeze(sequence)
        return None if sequence.in_flight_tokens else True

    def thaw(self, request_id: str) -> None:
        """A frozen stream goes on here; others, and such as have ended, are left alone."""
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.state is State.FROZEN:
            self._scheduler.thaw(sequence)

    # -- KV in: decode after a handoff ------------------------------------------------------------
    def expect(self, request: Request, headroom_tokens: int = 0) -> FinishReason | None:
        """Register a stream whose KV another pod computes; it takes no blocks yet.

        `headroom_tokens`: how many more `extend` may make known, for a stream that is being
        decoded. Returns and raises as `add`.
        """
        self._check(request)
        ended = self._ended(request)
        if ended is None:
            sequence = self._sequence(request)
            self._totals.taken_over += headroom_tokens > 0
            sequence.headroom_tokens = min(headroom_tokens, sequence.growth_tokens)
            self._scheduler.expect(sequence)
        return ended

    def grant(self, request_id: str, upto_tokens: int) -> Grant | None:
        """Blocks for the KV of the stream's first `upto_tokens` tokens, its headroom included.

        The first grant says how many tokens the prefix cache holds. None: no room now, ask again
        after a step. Once a first grant was given, later ones always succeed.
        """
        sequence = self._receiving(request_id)
        if self._flight is not None and self._scheduler.lacks_room(sequence, upto_tokens):
            flight, self._flight = self._flight, None
            self._early = self._collect(flight)
        return self._scheduler.grant(sequence, upto_tokens)

    def write_kv(self, request_id: str, start_token: int, payload: Payload) -> None:
        """Store canonical KV from token `start_token` on; pages arrive in order, without gaps.

        Raises:
            ValueError: the payload is no whole number of tokens, out of order, or not granted.
        """
        sequence = self._receiving(request_id)
        end_token = check_payload(
            sequence,
            start_token,
            memoryview(payload).nbytes,
            token_bytes=self.layout.token_bytes,
            block_tokens=self.block_tokens,
        )
        self._runner.write_kv(sequence.block_ids, start_token, payload)
        sequence.computed_tokens = end_token

    def extend(self, request_id: str, token_ids: Ids[int]) -> None:
        """The pod that decodes a receiving stream has chosen these meanwhile.

        Raises:
            ValueError: they are more than the headroom, or not in the vocabulary.
        """
        sequence = self._receiving(request_id)
        check_extension(sequence, token_ids, self.vocab_size)
        sequence.token_ids.extend(token_ids)
        sequence.headroom_tokens -= len(token_ids)

    def resume(self, request_id: str) -> None:
        """The other pod has frozen a receiving stream: go on after its last known token.

        KV that has not come is computed here; that of the last known token always is.
        """
        sequence = self._receiving(request_id)
        check_resume(sequence)
        self._scheduler.start(sequence)

    def start_decode(self, request_id: str, first: SampledToken) -> StreamOutput:
        """All KV is written: go on from `first`, which the prefill pod sampled.

        Returns:
            The output to send for that token; it may already end the stream.

        Raises:
            ValueError: KV is missing, or the token is none of the vocabulary.
        """
        sequence = self._receiving(request_id)
        check_first(sequence, first, self.vocab_size)
        self._scheduler.start(sequence)
        return self._append(sequence, first, None)

    # -- the inside -------------------------------------------------------------------------------
    def _check(self, request: Request) -> None:
        if request.request_id in self._sequences:
            raise RequestRefused(f"stream {request.request_id!r} is already in the engine")
        capacity = Capacity(self.vocab_size, self.max_context_tokens, self.kv_capacity_tokens)
        check_request(request, capacity)

    def _ended(self, request: Request) -> FinishReason | None:
        if not request.output_ids:
            return None
        generated = len(request.output_ids)
        return finish_reason(request, generated, request.output_ids[-1], self.eos_token_ids)

    def _sequence(self, request: Request) -> Sequence:
        root = root_key(self.layout_hash, self._prefix_secret, request.tenant, request.cache_salt)
        sequence = Sequence(request, self._totals.arrivals, root)
        self._totals.arrivals += 1
        self._sequences[request.request_id] = sequence
        return sequence

    def _stream(self, request_id: str) -> Sequence:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            raise KeyError(f"there is no stream {request_id!r}")
        return sequence

    def _receiving(self, request_id: str) -> Sequence:
        sequence = self._stream(request_id)
        if sequence.state is not State.RECEIVING:
            raise ValueError(f"{request_id} is {sequence.state.value}, it awaits no KV")
        return sequence

    def _computed(self, work: Work) -> StreamOutput:
        """A part of the known tokens is computed; more is to come before the next one."""
        self._scheduler.commit(work)
        sequence = work.sequence
        self._tiered.offer(sequence)
        return StreamOutput(
            sequence.request_id,
            computed=self._publish(sequence),
            cached_tokens=sequence.cached_tokens,
        )

    def _sampled(self, work: Work, token: SampledToken | None) -> StreamOutput:
        """All known tokens are computed, and the next one is chosen unless there is none."""
        if token is None:
            self.abort(work.sequence.request_id)
            return StreamOutput(work.sequence.request_id, finish_reason="abort")
        self._scheduler.commit(work)
        self._tiered.offer(work.sequence)
        return self._append(work.sequence, token, self._publish(work.sequence))

    def _publish(self, sequence: Sequence) -> Span | None:
        start, end = sequence.published_tokens, sequence.computed_tokens
        if not sequence.request.export or end <= start:
            return None
        sequence.published_tokens = end
        return Span(start, end)

    def _append(self, sequence: Sequence, token: SampledToken, span: Span | None) -> StreamOutput:
        """Take a sampled token: the stream goes on, ends, or is held."""
        self._totals.generated_tokens += 1
        sequence.token_ids.append(token.token_id)
        generated = len(sequence.token_ids) - sequence.prompt_tokens
        reason = finish_reason(sequence.request, generated, token.token_id, self.eos_token_ids)
        if sequence.request.export:
            self._scheduler.hold(sequence)
        elif reason is not None:
            self.abort(sequence.request_id)
        return StreamOutput(
            sequence.request_id,
            token=token,
            finish_reason=reason,
            computed=span,
            cached_tokens=sequence.cached_tokens,
        )
