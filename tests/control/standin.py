"""A stand-in for a runtime pod, for tests of the operator alone: it serves nothing but its state.

Run as the `runtime` container of a fleet's template. It reads from its environment:
STANDIN_FAIL (a sentence: leave it as the termination message and exit 64), STANDIN_READY_AFTER_S.
With STANDIN_WORK it reports steps of 8 ms and 0.25 ms for each stream.
It keeps whatever contexts it is given. `POST /standin/running?n=N` pretends that N streams run;
`POST /standin/metrics?running=X` says so in its metrics alone.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import msgspec
from aiohttp import web
from tandem_runtime import contract
from tandem_runtime.protocol import (
    Context,
    ContextCopies,
    ContextCopy,
    DrainRequest,
    PodState,
    PodWork,
    StepSums,
)


class Standin:
    """The state of the pod."""

    def __init__(self) -> None:
        self.started_s = time.time()
        self.running = 0
        self.measured: str | None = None
        """Of the metrics alone; None: what runs."""
        self.worked_s = time.time()
        self.sums = StepSums()
        self.draining = False
        self.contexts: dict[str, Context] = {}
        """Kept, it says, as soon as it is asked."""
        self.idle = asyncio.Event()
        self.idle.set()
        self.ended = asyncio.Event()
        self.ready_after_s = float(os.environ.get("STANDIN_READY_AFTER_S", "0"))

    @property
    def ready(self) -> bool:
        started = time.time() - self.started_s >= self.ready_after_s
        return started and not (self.draining and self.running == 0)

    def state(self) -> web.Response:
        state = PodState(
            pod=os.environ[contract.ENV_POD_NAME],
            role="standin",
            revision=os.environ[contract.ENV_REVISION],
            model="standin",
            ready=self.ready,
            draining=self.draining,
            running=self.running,
            waiting=0,
            exporting=0,
            kv_usage=0.0,
            kv_capacity_tokens=0,
            started_unix_s=self.started_s,
            work=self.work() if os.environ.get("STANDIN_WORK") else None,
        )
        return web.Response(body=msgspec.json.encode(state), content_type="application/json")

    def work(self) -> PodWork:
        """As of now, of streams that never end."""
        now_s, past = time.time(), self.sums
        for streams in (0.8 * self.running, 1.2 * self.running) if self.running else ():
            seconds = 0.008 + 0.00025 * streams
            steps = (now_s - self.worked_s) / 2 / seconds
            past = StepSums(
                steps=past.steps + steps,
                seconds=past.seconds + steps * seconds,
                streams=past.streams + steps * streams,
                streams_streams=past.streams_streams + steps * streams * streams,
                seconds_streams=past.seconds_streams + steps * seconds * streams,
            )
        self.worked_s, self.sums = now_s, past
        return PodWork(int(past.streams / 100), 0, int(past.streams), past, 0, 0, 8192, 256)

    def metrics(self) -> web.Response:
        """The metrics that the operator's queries read."""
        running = self.running if self.measured is None else self.measured
        values = {
            contract.METRIC_RUNNING: running,
            contract.METRIC_WAITING: 0,
            f"{contract.METRIC_PROMPT_TOKENS}_total": 0,
            f"{contract.METRIC_CACHED_TOKENS}_total": 0,
        }
        labels = '{model_name="standin",engine="0"}'
        lines = [f"{name}{labels} {value}\n" for name, value in values.items()]
        return web.Response(text="".join(lines))

    async def keep(self, request: web.Request) -> web.Response:
        context = msgspec.json.decode(await request.read(), type=Context)
        self.contexts[context.id] = context
        return self.json(kept(context))

    async def list_contexts(self, _: web.Request) -> web.Response:
        return self.json(ContextCopies(tuple(kept(c) for c in self.contexts.values())))

    async def context(self, request: web.Request) -> web.Response:
        return self.json(self.contexts[request.match_info["id"]])

    @staticmethod
    def json(content: object) -> web.Response:
        return web.Response(body=msgspec.json.encode(content), content_type="application/json")

    async def drain(self, request: web.Request) -> web.Response:
        if request.headers.get("authorization") != f"Bearer {os.environ[contract.ENV_POD_UID]}":
            raise web.HTTPForbidden
        asked = msgspec.json.decode(await request.read(), type=DrainRequest)
        self.draining = asked.mode != "cancel"
        if asked.mode == "end" and self.running:
            asyncio.get_running_loop().call_later(asked.deadline_s or 0.0, self._forget)
        return self.state()

    def _forget(self) -> None:
        self.pretend(0)

    def pretend(self, running: int) -> None:
        """That many streams run."""
        self.work()
        self.running = running
        self.idle.clear() if running else self.idle.set()

    async def until_empty(self) -> None:
        await self.idle.wait()
        self.ended.set()


def kept(context: Context) -> ContextCopy:
    """A token is a character, and takes 10 bytes."""
    chars = len(context.prompt) + sum(len(m["content"]) for m in context.messages)
    tier = context.tier or "memory"
    version = (context.created_unix_s, context.version)
    return ContextCopy(context.id, *version, "ready", "", chars, 10 * chars, tier)


async def main() -> None:
    standin = Standin()

    async def health(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def ready(_: web.Request) -> web.Response:
        return web.Response(status=200 if standin.ready else 503)

    async def state(_: web.Request) -> web.Response:
        return standin.state()

    async def running(request: web.Request) -> web.Response:
        standin.pretend(int(request.query["n"]))
        return standin.state()

    async def metrics(_: web.Request) -> web.Response:
        return standin.metrics()

    async def measured(request: web.Request) -> web.Response:
        standin.measured = request.query["running"]
        return standin.metrics()

    app = web.Application()
    app.add_routes(
        [
            web.get(contract.PATH_HEALTH, health),
            web.get(contract.PATH_READY, ready),
            web.get(contract.PATH_STATE, state),
            web.get(contract.PATH_METRICS, metrics),
            web.post(contract.PATH_DRAIN, standin.drain),
            web.put(contract.PATH_CONTEXTS, standin.keep),
            web.get(contract.PATH_CONTEXTS, standin.list_contexts),
            web.get(contract.PATH_CONTEXTS + "/{id}", standin.context),
            web.post("/standin/running", running),
            web.post("/standin/metrics", measured),
        ]
    )
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, os.environ[contract.ENV_POD_IP], contract.HTTP_PORT).start()
    loop = asyncio.get_running_loop()

    def terminate() -> None:
        standin.draining = True
        loop.create_task(standin.until_empty())  # noqa: RUF006 - the loop ends with it

    loop.add_signal_handler(signal.SIGTERM, terminate)
    await standin.ended.wait()
    await runner.cleanup()


if __name__ == "__main__":
    sentence = os.environ.get("STANDIN_FAIL")
    if sentence:
        Path(contract.TERMINATION_LOG).write_text(sentence)
        sys.exit(contract.EXIT_BAD_CONFIG)
    asyncio.run(main())
