"""/healthz, /readyz and /metrics, from the start: also while another process leads.

Readiness says that this process could act: it reached the API server lately. A standby is ready
too, so that a Deployment of two becomes available and rolls. Liveness says that its loops turn; an
API server that is away stops none, and restarting the operator would not bring it back.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from aiohttp import web

from tandem_operator.metrics import Metrics

STALE_S = 60.0


@dataclass
class Pulse:
    """Which loops turned when, by their names; monotonic seconds."""

    monotonic_s: Callable[[], float]
    beats: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Name to (last beat, how long until the next one is overdue)."""
    answered_s: float = float("-inf")
    """When the API server last answered."""

    @property
    def ready(self) -> bool:
        """Whether this process could act: it reached the API server lately."""
        return self.monotonic_s() - self.answered_s <= STALE_S

    def answered(self) -> None:
        """The API server answered."""
        self.answered_s = self.monotonic_s()

    def beat(self, loop: str, expected_s: float = STALE_S) -> None:
        """The loop turned, and will again within `expected_s`."""
        self.beats[loop] = (self.monotonic_s(), expected_s)

    def overdue(self) -> list[str]:
        """Loops that should have turned again."""
        now_s = self.monotonic_s()
        return sorted(name for name, (at, within) in self.beats.items() if now_s - at > within)


@contextlib.asynccontextmanager
async def serve(pulse: Pulse, metrics: Metrics, host: str, port: int) -> AsyncIterator[None]:
    """Answer probes and scrapes while the context is open."""

    async def healthz(_: web.Request) -> web.Response:
        late = pulse.overdue()
        if late:
            return web.Response(status=503, text=f"no sign of life from: {', '.join(late)}\n")
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        if not pulse.ready:
            return web.Response(status=503, text="has not reached the API server lately\n")
        return web.Response(text="ok\n")

    async def exposition(_: web.Request) -> web.Response:
        content = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=metrics.text(), headers=content)

    app = web.Application()
    app.add_routes(
        [
            web.get("/healthz", healthz),
            web.get("/readyz", readyz),
            web.get("/metrics", exposition),
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        yield
    finally:
        await runner.cleanup()
