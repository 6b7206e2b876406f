"""What to do next for a pod: a pure function of its containers, its fate and the time.

The rules are a kubelet's: init containers run one after the other, restartable ones (sidecars)
stay; then all others run side by side; what ends is run again after its back-off as the restart
policy says; a pod whose containers have all ended for good is over, and a pod that is being
deleted only ends. `decide` is called after every event and says everything that is due now, so
calling it twice, or late, is harmless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from tandem.agent.backoff import delay_s, effective_strikes


class Kind(StrEnum):
    """What part of a pod a container plays."""

    INIT = "init"
    SIDECAR = "sidecar"
    """An init container with restartPolicy Always: stays while the others run."""
    MAIN = "main"


class Policy(StrEnum):
    """When a container that ended is run again."""

    ALWAYS = "Always"
    ON_FAILURE = "OnFailure"
    NEVER = "Never"

    def restarts(self, code: int) -> bool:
        """Whether a container that ended with `code` runs again."""
        return self is Policy.ALWAYS or (self is Policy.ON_FAILURE and code != 0)


@dataclass(frozen=True, slots=True)
class Exit:
    """How a run ended."""

    code: int
    signal: int
    finished_at_s: float
    reason: str
    """Completed, Error, StartError or ContainerStatusUnknown."""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a container."""

    number: int
    """0 for the first; the restart count of the container is the number of its latest run."""
    container_id: str
    strikes: int
    started_at_s: float
    exit: Exit | None = None

    def restart_at_s(self) -> float:
        """When this run, which ended, may be followed by the next."""
        assert self.exit is not None
        ran_s = self.exit.finished_at_s - self.started_at_s
        return self.exit.finished_at_s + delay_s(effective_strikes(self.strikes, ran_s))

    def next_strikes(self) -> int:
        """The strikes of the run that follows this one."""
        assert self.exit is not None
        return 1 + effective_strikes(self.strikes, self.exit.finished_at_s - self.started_at_s)


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a container could not be started, and when the next try is due."""

    reason: str
    message: str
    retry_at_s: float


@dataclass(frozen=True, slots=True)
class Container:
    """What is known of one container."""

    name: str
    kind: Kind
    policy: Policy
    latest: Run | None = None
    previous: Run | None = None
    """The run before the latest."""
    waiting: Waiting | None = None
    """Set while the latest try to start failed."""
    busy: bool = False
    """A start or a stop is under way."""
    started: bool = False
    """The startup probe passed (or there is none and the container runs)."""
    ready: bool = False
    unhealthy: str | None = None
    """Why the running container must be killed: a liveness or startup probe failed for good."""

    @property
    def running(self) -> bool:
        """A process of it exists."""
        return self.latest is not None and self.latest.exit is None

    @property
    def over(self) -> bool:
        """It ended and will not run again."""
        return self.latest is not None and self.latest.exit is not None and not self._restarts

    @property
    def succeeded(self) -> bool:
        """It ended for good with status 0."""
        return self.over and self.latest is not None and self._code == 0

    @property
    def _code(self) -> int:
        assert self.latest is not None
        assert self.latest.exit is not None
        return self.latest.exit.code

    @property
    def _restarts(self) -> bool:
        # An init container runs until it succeeded, whatever "Always" means for the others.
        if self.kind is Kind.INIT and self.policy is Policy.ALWAYS:
            return self._code != 0
        return self.policy.restarts(self._code)

    def due_at_s(self) -> float | None:
        """When it may (next) be started; None while it runs, is busy, or is over."""
        if self.busy or self.running or self.over:
            return None
        at_s = self.latest.restart_at_s() if self.latest else float("-inf")
        return max(at_s, self.waiting.retry_at_s) if self.waiting else at_s


class Fate(StrEnum):
    """What the world wants of the pod."""

    RUN = "run"
    EXPIRE = "expire"
    """Its activeDeadlineSeconds passed."""
    DELETE = "delete"


class Outcome(StrEnum):
    """How far the pod has come."""

    GOING = "going"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    ENDED = "ended"
    """Everything that had to be stopped has stopped."""


@dataclass(frozen=True, slots=True)
class Stop:
    """A running container to stop, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Step:
    """What is due now."""

    start: tuple[str, ...] = ()
    stop: tuple[Stop, ...] = ()
    outcome: Outcome = Outcome.GOING
    wake_at_s: float | None = None
    """When to ask again if nothing happens before."""


DELETING: Final = "the pod is being deleted"
EXPIRED: Final = "the pod was active for longer than its activeDeadlineSeconds"
FINISHED: Final = "the pod's other containers have ended"


def decide(containers: Sequence[Container], fate: Fate, now_s: float) -> Step:
    """What to start and to stop now, and whether the pod is over.

    `containers` are in the order of the spec: init containers (and sidecars) first.
    """
    if fate is not Fate.RUN:
        step = _wind_down(containers, DELETING if fate is Fate.DELETE else EXPIRED)
        over = Outcome.FAILED if fate is Fate.EXPIRE else Outcome.ENDED
        return replace(step, outcome=over) if step.outcome is Outcome.ENDED else step
    mains = [container for container in containers if container.kind is Kind.MAIN]
    failed_init = any(c.kind is Kind.INIT and c.over and not c.succeeded for c in containers)
    if failed_init or all(container.over for container in mains):
        step = _wind_down(containers, FINISHED)
        if step.outcome is not Outcome.ENDED:
            return step
        good = not failed_init and all(container.succeeded for container in mains)
        return replace(step, outcome=Outcome.SUCCEEDED if good else Outcome.FAILED)
    sick = tuple(
        Stop(c.name, c.unhealthy) for c in containers if c.unhealthy and c.running and not c.busy
    )
    due = {c.name: at_s for c in _allowed(containers) if (at_s := c.due_at_s()) is not None}
    later = [at_s for at_s in due.values() if at_s > now_s]
    return Step(
        start=tuple(name for name, at_s in due.items() if at_s <= now_s),
        stop=sick,
        wake_at_s=min(later, default=None),
    )


def _allowed(containers: Sequence[Container]) -> list[Container]:
    """The containers whose turn has come: all before and including the first unfinished init."""
    # Once a main container ran, the init containers had their time: a restarted agent must not
    # run one again whose record was lost.
    past_init = any(c.kind is Kind.MAIN and c.latest is not None for c in containers)
    turn = []
    for container in containers:
        if container.kind is Kind.INIT and (past_init or container.succeeded):
            continue
        turn.append(container)
        unstarted_sidecar = container.kind is Kind.SIDECAR and not container.started
        if container.kind is Kind.INIT or (unstarted_sidecar and not past_init):
            break
    return turn


def _wind_down(containers: Sequence[Container], reason: str) -> Step:
    """Stops everything: sidecars last, in reverse order, once all others have ended."""
    others = [c for c in containers if c.kind is not Kind.SIDECAR and (c.running or c.busy)]
    sidecars = [c for c in containers if c.kind is Kind.SIDECAR and (c.running or c.busy)]
    targets = others or sidecars[-1:]
    if not targets:
        return Step(outcome=Outcome.ENDED)
    return Step(stop=tuple(Stop(c.name, reason) for c in targets if c.running and not c.busy))
