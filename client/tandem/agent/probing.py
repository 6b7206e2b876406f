"""Keeping one probe of a running container going, at its period, until the container ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from tandem.agent.checking import Target, Verdict, check
from tandem.agent.probes import Probe, ProbeKind, ProbeState, observe


@dataclass(frozen=True, slots=True)
class Prober:
    """Runs one probe against one run of a container."""

    probe: Probe
    target: Target
    age_s: Callable[[], float]
    """How long the container has been running."""
    is_due: Callable[[], bool]
    """Whether the probe applies now: a startup probe before the start, the others after it."""
    take: Callable[[Probe, ProbeState, Verdict], None]
    """Receives every result."""

    async def run(self) -> None:
        """Probes until cancelled, or until a startup probe has decided."""
        loop = asyncio.get_running_loop()
        state = ProbeState.initial(self.probe.kind)
        await asyncio.sleep(max(0.0, self.probe.initial_delay_s - self.age_s()))
        while True:
            next_s = loop.time() + self.probe.period_s
            if self.is_due():
                verdict = await check(self.probe.action, self.target, self.probe.timeout_s)
                state = observe(self.probe, state, verdict.success)
                self.take(self.probe, state, verdict)
                if self.probe.kind is ProbeKind.STARTUP and state.verdict is not None:
                    return
            await asyncio.sleep(max(0.0, next_s - loop.time()))
