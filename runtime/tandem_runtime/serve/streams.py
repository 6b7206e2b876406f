"""The pod's streams: a `GenerateRequest` in, its `GenerateEvent`s out.

All ways into the pod meet here (the gateway's, and the pod's own front end), so this is where
admission, epochs, draining and the count of streams in flight live.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec

from tandem_runtime.engine.grammar import Grammars
from tandem_runtime.engine.sequence import (
    NotFinite,
    Request,
    RequestRefused,
    SampledToken,
    StreamOutput,
)
from tandem_runtime.frontend.record import StreamRecord
from tandem_runtime.kv.handoff.departure import Running
from tandem_runtime.kv.handoff.exporter import Refusal
from tandem_runtime.kv.handoff.importer import Imported, Importer
from tandem_runtime.kv.handoff.link import HandoffFailed, NoRoom
from tandem_runtime.kv.wire import StreamKey
from tandem_runtime.prefix import compact
from tandem_runtime.protocol import GenerateEvent, GenerateRequest, TokenLogprob
from tandem_runtime.serve.lifecycle import Lifecycle
from tandem_runtime.serve.worker import EngineFailed, EngineWorker

log = logging.getLogger(__name__)

T = TypeVar("T")

Observer = Callable[[StreamRecord], None]


class StreamEnded(Exception):
    """The pod ends a stream before its finish."""

    def __init__(self, code: str, reason: str, *, retryable: bool = True) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.retryable = retryable


class StreamService:
    def __init__(
        self,
        worker: EngineWorker,
        importer: Importer | None,
        grammars: Grammars,
        lifecycle: Lifecycle,
        *,
        model: str,
        max_waiting: int,
        observe: Observer,
        observe_gap: Callable[[float], None],
    ) -> None:
        self._worker = worker
        self._importer = importer
        self._grammars = grammars
        self._lifecycle = lifecycle
        self._model = model
        self._max_waiting = max_waiting
        self._observe = observe
        self._observe_gap = observe_gap
        worker.failed.add_done_callback(
            lambda _: self.end_all("internal", "the pod's engine failed")
        )
        self._streams: dict[str, _Stream] = {}
        """By stream id: one attempt of each at a time."""

    @property
    def running(self) -> int:
        """Streams that have had a token."""
        return sum(stream.started for stream in self._streams.values())

    @property
    def waiting(self) -> int:
        """Streams accepted that have had none yet."""
        return len(self._streams) - self.running

    def refusal(self) -> Refusal | None:
        """Why nothing new is admitted now, if so."""
        if not self._lifecycle.admits:
            return Refusal("draining", f"this pod is {self._lifecycle.phase.value}")
        if self.waiting >= self._max_waiting:
            return Refusal("overloaded", f"{self.waiting} streams wait on this pod already")
        return None

    def find(self, stream_id: str, epoch: int) -> Running | Refusal:
        """The stream that another pod wants to take over, as an attempt of this epoch."""
        stream = self._streams.get(stream_id)
        if stream is None or not stream.started:
            return Refusal("not_moved", f"stream {stream_id} is not decoded on this pod")
        if stream.epoch >= epoch:
            return Refusal("not_moved", f"stream {stream_id} runs here in a newer attempt")
        return stream

    def renew(self, stream_id: str, epoch: int) -> None:
        """The stream goes on as a newer attempt: older ones have no say any more."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.epoch = epoch

    def end_all(self, code: str, reason: str) -> None:
        """Ends every stream with an error event that lets the gateway move it."""
        for stream in list(self._streams.values()):
            stream.end(StreamEnded(code, reason))

    async def generate(self, ask: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
        """Events up to a finish or an error event; raises nothing. Closing it cancels."""
        try:
            stream = self._begin(ask)
        except StreamEnded as ended:
            yield _error(ask, ended.code, ended.reason, ended.retryable)
            return
        record = StreamRecord(self._model, "", time.monotonic())
        record.prompt_tokens = len(ask.prompt_ids)
        try:
            event = await self._first_event(ask, stream)
            while True:
                self._note(record, event)
                yield event
                if event.finish_reason is not None:
                    return
                event = _event(ask, await stream.next())
        except (GeneratorExit, asyncio.CancelledError):
            # Nothing failed: whoever asked has the finish, or wants no more (a stop string, a
            # client that left), which vLLM calls `abort`. Or he has the stream from another pod.
            record.moved = stream.is_moved
            record.finish_reason = record.finish_reason or "abort"
            raise
        except StreamEnded as ended:
            record.moved = stream.is_moved
            yield _error(ask, ended.code, ended.reason, ended.retryable)
        except HandoffFailed as failed:
            event = _error(ask, failed.code, failed.reason, failed.retryable)
            if ask.prefill is not None and not isinstance(failed, NoRoom):
                event = msgspec.structs.replace(event, failed_pod=ask.prefill.pod)
            yield event
        except RequestRefused as refused:
            yield _error(ask, "bad_request", f"{refused}.", False)
        except EngineFailed as failed:
            yield _error(ask, "internal", str(failed), True)
        except Exception:
            log.exception("stream %s failed", stream.request_id)
            yield _error(ask, "internal", "the pod failed; its log has the details", True)
        finally:
            self._finish(stream, finished=record.finish_reason not in (None, "abort"))
            record.ended_s = time.monotonic()
            self._observe(record)

    def _begin(self, ask: GenerateRequest) -> _Stream:
        older = self._streams.get(ask.stream_id)
        if older is not None and older.epoch >= ask.epoch:
            reason = f"attempt {ask.epoch} of stream {ask.stream_id} is older than one that runs"
            raise StreamEnded("bad_request", reason, retryable=False)
        refusal = self.refusal()
        if refusal is not None:
            raise StreamEnded(refusal.code, refusal.reason)
        if older is not None:
            older.end(StreamEnded("internal", "a newer attempt of the stream runs"))
        stream = _Stream(ask)
        self._streams[ask.stream_id] = stream
        self._worker.route(stream.request_id, stream.put)
        return stream

    def _finish(self, stream: _Stream, *, finished: bool) -> None:
        self._worker.unroute(stream.request_id)
        if not finished:
            request_id = stream.request_id
            self._worker.call(lambda engine: engine.abort(request_id))
        if self._streams.get(stream.stream_id) is stream:
            del self._streams[stream.stream_id]

    async def _first_event(self, ask: GenerateRequest, stream: _Stream) -> GenerateEvent:
        request = Request(
            request_id=stream.request_id,
            prompt_ids=compact(ask.prompt_ids),
            sampling=ask.sampling,
            output_ids=ask.output_ids,
            tenant=ask.tenant,
            cache_salt=ask.cache_salt,
            holder=ask.holder,
            begins=ask.begins,
            grammar=await stream.unless_ended(self._grammars.follow(ask.sampling.grammar)),
        )
        prompt_tokens = len(ask.prompt_ids)
        if ask.take_from is not None:
            return await self._taken_over(request, ask, stream)
        if ask.prefill is None:
            ended = await stream.unless_ended(self._worker.call(lambda engine: engine.add(request)))
            if ended is not None:
                return GenerateEvent(ask.epoch, finish_reason=ended, prompt_tokens=prompt_tokens)
            outputs = await stream.next()
            event = _event(ask, outputs)
            queue_s, cached_tokens, handoff = stream.queue_s, outputs[0].cached_tokens, None
        else:
            if self._importer is None:
                reason = "this pod takes no KV from others; send no prefill pod with the request"
                raise StreamEnded("bad_request", reason, retryable=False)
            imported = await stream.unless_ended(self._importer.receive(request, ask))
            if not isinstance(imported, Imported):
                return GenerateEvent(ask.epoch, finish_reason=imported, prompt_tokens=prompt_tokens)
            stream.started = True
            stream.keep(imported.first)
            event = _event(ask, [imported.first])
            queue_s, cached_tokens = imported.queue_s, imported.cached_tokens
            handoff = imported.handoff
        return msgspec.structs.replace(
            event,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            queue_s=queue_s,
            handoff=handoff,
        )

    async def _taken_over(
        self, request: Request, ask: GenerateRequest, stream: _Stream
    ) -> GenerateEvent:
        """The event that the stream goes on here; its tokens are the other pod's."""
        if self._importer is None:
            reason = "this pod takes no streams from others; it has no handoff secret"
            raise StreamEnded("bad_request", reason, retryable=False)
        taken = await stream.unless_ended(self._importer.take_over(request, ask))
        outputs = [
            StreamOutput(stream.request_id, SampledToken(t.token_id, t.logprob, t.top_logprobs))
            for t in taken.tokens
        ]
        stream.takes_over(outputs)
        return msgspec.structs.replace(_event(ask, outputs), taken_over=True)

    def _note(self, record: StreamRecord, event: GenerateEvent) -> None:
        if event.taken_over:
            record.taken_over = True
            return  # its tokens were counted where they were generated
        now_s = time.monotonic()
        if event.token_ids and record.last_token_s is not None:
            self._observe_gap((now_s - record.last_token_s) / len(event.token_ids))
        record.observe(event, now_s)
        record.finish_reason = event.finish_reason


class _Stream:
    """One attempt: what the engine said of it, and whether the pod ended it.

    Also what another pod's takeover is to know of it (`Running` of the handoff).
    """

    def __init__(self, ask: GenerateRequest) -> None:
        self.is_moved = False
        self._begun_tokens = len(ask.prompt_ids) + len(ask.output_ids)
        self._sampled: list[SampledToken] = []
        """All tokens of this attempt."""
        self.stream_id = ask.stream_id
        self.epoch = ask.epoch
        self.request_id = str(StreamKey(ask.stream_id, ask.epoch))
        self.started = False
        self.queue_s = 0.0
        self._arrived_s = time.monotonic()
        self._computing = False
        self._outputs: list[StreamOutput] = []
        self._changed = asyncio.Event()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def put(self, output: StreamOutput, began_s: float) -> None:
        """From the worker: a step's output for this stream; `began_s` is when the step began."""
        if not self._computing:
            self._computing = True
            self.queue_s = max(0.0, began_s - self._arrived_s)
        if self._ended.done():
            return  # else a fast engine would put the end off
        if output.token is not None:
            self.started = True
            self.keep(output)
            self._outputs.append(output)
            self._changed.set()
        elif output.finish_reason is not None:
            reason = NotFinite()
            self.end(StreamEnded(reason.code, str(reason), retryable=False))

    @property
    def known_tokens(self) -> int:
        return self._begun_tokens + len(self._sampled)

    def tokens_from(self, position: int) -> Sequence[SampledToken]:
        return self._sampled[max(0, position - self._begun_tokens) :]

    def moved(self, pod: str) -> None:
        self.is_moved = True
        self.end(StreamEnded("moved", f"this stream goes on on pod {pod}"))

    def keep(self, output: StreamOutput) -> None:
        if output.token is not None:
            self._sampled.append(output.token)

    def takes_over(self, outputs: list[StreamOutput]) -> None:
        """What another pod generated comes before what was generated here since."""
        self.started = True
        tokens = [output.token for output in outputs if output.token is not None]
        self._sampled[:0] = tokens

    def end(self, ended: StreamEnded) -> None:
        if not self._ended.done():
            self._ended.set_exception(ended)
            self._ended.exception()  # seen: nobody else has to look
            self._changed.set()

    async def next(self) -> list[StreamOutput]:
        """All outputs that are there, at least one. Raises `StreamEnded` after the last one."""
        while not self._outputs and not self._ended.done():
            self._changed.clear()
            await self._changed.wait()
        outputs, self._outputs = self._outputs, []
        if not outputs:
            self._ended.result()
        return outputs

    async def unless_ended(self, work: Awaitable[T]) -> T:
        """Raises `StreamEnded` when that comes first; `work` is cancelled then."""
        task = asyncio.ensure_future(work)
        try:
            either: set[asyncio.Future[Any]] = {task, self._ended}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._ended.result()
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


def _event(ask: GenerateRequest, outputs: list[StreamOutput]) -> GenerateEvent:
    tokens = [output.token for output in outputs if output.token is not None]
    logprobs: tuple[TokenLogprob, ...] = ()
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    if ask.sampling.logprobs is not None:
        logprobs = tuple(TokenLogprob(t.token_id, t.logprob or 0.0) for t in tokens)
        top_logprobs = tuple(t.top_logprobs for t in tokens)
    return GenerateEvent(
        epoch=ask.epoch,
        token_ids=tuple(token.token_id for token in tokens),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        finish_reason=outputs[-1].finish_reason if outputs else None,
    )


def _error(ask: GenerateRequest, code: str, reason: str, retryable: bool) -> GenerateEvent:
    return GenerateEvent(ask.epoch, error=reason, error_code=code, retryable=retryable)
