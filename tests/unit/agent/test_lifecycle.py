"""`decide`: tables for each rule, then a simulated pod under every order of events."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tandem.agent.lifecycle import (
    Container,
    Exit,
    Fate,
    Kind,
    Outcome,
    Policy,
    Run,
    Waiting,
    decide,
)

NOW_S = 1000.0


def make(
    name: str = "c",
    kind: Kind = Kind.MAIN,
    policy: Policy = Policy.ALWAYS,
    *,
    code: int | None = None,
    running: bool = False,
    strikes: int = 0,
    ended_at_s: float = NOW_S,
    ran_s: float = 1.0,
    **changes: object,
) -> Container:
    """A container that never ran, runs, or ended with `code` at `ended_at_s`."""
    latest = None
    if code is not None:
        end = Exit(code, 0, ended_at_s, "Error" if code else "Completed")
        latest = Run(0, f"id/{name}/0", strikes, ended_at_s - ran_s, end)
    elif running:
        latest = Run(0, f"id/{name}/0", strikes, NOW_S)
    return dataclasses.replace(Container(name, kind, policy, latest=latest), **changes)


def started(*containers: Container, fate: Fate = Fate.RUN, now_s: float = NOW_S) -> tuple[str, ...]:
    return decide(containers, fate, now_s).start


def test_main_containers_start_side_by_side() -> None:
    assert started(make("a"), make("b")) == ("a", "b")


def test_nothing_starts_twice() -> None:
    assert started(make(busy=True)) == ()
    assert started(make(running=True)) == ()


def test_init_containers_run_one_after_the_other() -> None:
    first, second, main = make("i", Kind.INIT), make("j", Kind.INIT), make()
    assert started(first, second, main) == ("i",)
    assert started(make("i", Kind.INIT, running=True), second, main) == ()
    done = make("i", Kind.INIT, code=0)
    assert started(done, second, main) == ("j",)
    assert started(done, make("j", Kind.INIT, code=0), main) == ("c",)


def test_a_failed_init_container_is_tried_again() -> None:
    failed = make("i", Kind.INIT, code=1)
    assert started(failed, make()) == ("i",)


def test_a_failed_init_container_ends_a_pod_that_never_restarts() -> None:
    containers = [
        make("i", Kind.INIT, Policy.NEVER, code=1),
        make(policy=Policy.NEVER),
    ]
    step = decide(containers, Fate.RUN, NOW_S)
    assert step.outcome is Outcome.FAILED
    assert step.start == ()


def test_init_containers_do_not_run_again_once_a_main_container_ran() -> None:
    lost_record = make("i", Kind.INIT)
    assert started(lost_record, make(running=True)) == ()
    assert started(lost_record, make(code=1)) == ("c",)


def test_a_sidecar_has_to_be_started_before_what_follows() -> None:
    sidecar = make("s", Kind.SIDECAR)
    assert started(sidecar, make()) == ("s",)
    assert started(make("s", Kind.SIDECAR, running=True), make()) == ()
    assert started(make("s", Kind.SIDECAR, running=True, started=True), make()) == ("c",)


def test_a_sidecar_that_died_comes_back_beside_running_containers() -> None:
    assert started(make("s", Kind.SIDECAR, code=1), make(running=True)) == ("s",)


@pytest.mark.parametrize(
    ("policy", "code", "again"),
    [
        (Policy.ALWAYS, 0, True),
        (Policy.ALWAYS, 1, True),
        (Policy.ON_FAILURE, 0, False),
        (Policy.ON_FAILURE, 1, True),
        (Policy.NEVER, 0, False),
        (Policy.NEVER, 1, False),
    ],
)
def test_restart_policy(policy: Policy, code: int, again: bool) -> None:
    step = decide([make(policy=policy, code=code)], Fate.RUN, NOW_S)
    assert (step.start == ("c",)) is again
    if not again:
        assert step.outcome is (Outcome.SUCCEEDED if code == 0 else Outcome.FAILED)


def test_a_restart_waits_for_its_back_off() -> None:
    crashed = make(code=1, strikes=2)
    step = decide([crashed], Fate.RUN, NOW_S)
    assert step.start == ()
    assert step.wake_at_s == NOW_S + 20
    assert decide([crashed], Fate.RUN, NOW_S + 20).start == ("c",)


def test_a_long_run_restarts_at_once() -> None:
    assert started(make(code=1, strikes=6, ran_s=601.0)) == ("c",)


def test_a_failed_try_to_start_is_repeated_when_due() -> None:
    waiting = make(waiting=Waiting("ErrImagePull", "no such image", NOW_S + 5))
    step = decide([waiting], Fate.RUN, NOW_S)
    assert (step.start, step.wake_at_s) == ((), NOW_S + 5)
    assert started(waiting, now_s=NOW_S + 5) == ("c",)


def test_an_unhealthy_container_is_stopped_once() -> None:
    sick = make(running=True, unhealthy="liveness")
    step = decide([sick], Fate.RUN, NOW_S)
    assert [(stop.name, stop.reason) for stop in step.stop] == [("c", "liveness")]
    assert decide([dataclasses.replace(sick, busy=True)], Fate.RUN, NOW_S).stop == ()


def test_deleting_stops_main_containers_then_sidecars_in_reverse() -> None:
    sidecars = [
        make("s", Kind.SIDECAR, running=True, started=True),
        make("t", Kind.SIDECAR, running=True, started=True),
    ]
    step = decide([*sidecars, make(running=True)], Fate.DELETE, NOW_S)
    assert [stop.name for stop in step.stop] == ["c"]
    ended = make(code=0)
    step = decide([*sidecars, ended], Fate.DELETE, NOW_S)
    assert [stop.name for stop in step.stop] == ["t"]
    last = [sidecars[0], make("t", Kind.SIDECAR, code=0), ended]
    assert [stop.name for stop in decide(last, Fate.DELETE, NOW_S).stop] == ["s"]


def test_a_deleted_pod_has_ended_when_nothing_of_it_runs() -> None:
    assert decide([make(code=1), make("never")], Fate.DELETE, NOW_S).outcome is Outcome.ENDED
    assert decide([make(busy=True)], Fate.DELETE, NOW_S).outcome is Outcome.GOING


def test_an_expired_pod_fails_once_everything_has_stopped() -> None:
    step = decide([make(running=True)], Fate.EXPIRE, NOW_S)
    assert (step.outcome, [stop.name for stop in step.stop]) == (Outcome.GOING, ["c"])
    assert decide([make(code=0)], Fate.EXPIRE, NOW_S).outcome is Outcome.FAILED


def test_a_finished_pod_takes_its_sidecars_along() -> None:
    done = make(policy=Policy.NEVER, code=0)
    sidecar = make("s", Kind.SIDECAR, running=True, started=True)
    step = decide([sidecar, done], Fate.RUN, NOW_S)
    assert (step.outcome, [stop.name for stop in step.stop]) == (Outcome.GOING, ["s"])
    over = decide([make("s", Kind.SIDECAR, code=137), done], Fate.RUN, NOW_S)
    assert over.outcome is Outcome.SUCCEEDED


class SimulatedPod(RuleBasedStateMachine):
    """A pod whose containers start, crash, sicken and end in any order, driven by `decide`."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.fate = Fate.RUN
        self.outcome = Outcome.GOING
        self.containers: dict[str, Container] = {}
        self.started_after_delete = False

    @rule(
        inits=st.lists(st.sampled_from([Kind.INIT, Kind.SIDECAR]), max_size=3),
        mains=st.integers(1, 3),
        policy=st.sampled_from(list(Policy)),
    )
    @precondition(lambda self: not self.containers)
    def create(self, inits: list[Kind], mains: int, policy: Policy) -> None:
        kinds = [*inits, *[Kind.MAIN] * mains]
        for number, kind in enumerate(kinds):
            own = Policy.ALWAYS if kind is Kind.SIDECAR else policy
            self.containers[f"c{number}"] = Container(f"c{number}", kind, own)

    @rule()
    @precondition(lambda self: self.containers)
    def act(self) -> None:
        step = self._decide()
        again = self._decide()
        assert step == again, "deciding changes nothing"
        for name in step.start:
            container = self.containers[name]
            assert not container.running
            assert not container.busy
            assert not container.over
            assert self.fate is Fate.RUN
            self._change(name, busy=True)
        for stop in step.stop:
            assert self.containers[stop.name].running
            self._change(stop.name, busy=True)
        if self.outcome is Outcome.GOING:
            self.outcome = step.outcome

    @rule(data=st.data(), succeeds=st.booleans())
    @precondition(lambda self: self._starting())
    def start_completes(self, data: st.DataObject, succeeds: bool) -> None:
        name = data.draw(st.sampled_from(self._starting()))
        container = self.containers[name]
        if not succeeds:
            waiting = Waiting("ErrImagePull", "", self.now_s + 10)
            self._change(name, busy=False, waiting=waiting)
            return
        latest = container.latest
        number = 0 if latest is None else latest.number + 1
        strikes = 0 if latest is None else latest.next_strikes()
        run = Run(number, f"{name}/{number}", strikes, self.now_s)
        self._change(name, busy=False, waiting=None, latest=run, previous=latest, started=True)

    @rule(data=st.data(), code=st.sampled_from([0, 1, 137]))
    @precondition(lambda self: self._running())
    def container_exits(self, data: st.DataObject, code: int) -> None:
        name = data.draw(st.sampled_from(self._running()))
        latest = self.containers[name].latest
        assert latest is not None
        run = dataclasses.replace(latest, exit=Exit(code, 0, self.now_s, "Error"))
        self._change(name, latest=run, busy=False, started=False, unhealthy=None)

    @rule(data=st.data())
    @precondition(lambda self: self._running())
    def container_sickens(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self._running()))
        self._change(name, unhealthy="liveness")

    @rule(seconds=st.sampled_from([1.0, 10.0, 301.0, 700.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def is_deleted(self) -> None:
        self.fate = Fate.DELETE

    @invariant()
    def one_init_container_at_a_time(self) -> None:
        active = [
            c for c in self.containers.values() if c.kind is Kind.INIT and (c.running or c.busy)
        ]
        assert len(active) <= 1

    @invariant()
    def main_containers_wait_for_init_containers(self) -> None:
        if any(c.kind is Kind.MAIN and c.latest is not None for c in self.containers.values()):
            inits = [c for c in self.containers.values() if c.kind is Kind.INIT]
            assert all(c.succeeded for c in inits)

    @invariant()
    def an_outcome_is_final(self) -> None:
        if self.outcome in (Outcome.SUCCEEDED, Outcome.FAILED) and self.fate is Fate.RUN:
            assert not self._running()
            assert not self._starting()

    def teardown(self) -> None:
        """Whatever happened, a deleted pod ends in bounded steps."""
        if not self.containers:
            return
        self.fate = Fate.DELETE
        for _ in range(3 * len(self.containers) + 1):
            for name in self._starting():
                self._change(name, busy=False)
            step = self._decide()
            assert step.start == ()
            if step.outcome is Outcome.ENDED:
                return
            for name in [stop.name for stop in step.stop] or self._running():
                latest = self.containers[name].latest
                assert latest is not None
                run = dataclasses.replace(latest, exit=Exit(0, 0, self.now_s, "Completed"))
                self._change(name, latest=run, busy=False)
        raise AssertionError("the pod never ended")

    def _decide(self) -> object:
        return decide(list(self.containers.values()), self.fate, self.now_s)

    def _change(self, name: str, **changes: object) -> None:
        self.containers[name] = dataclasses.replace(self.containers[name], **changes)

    def _running(self) -> list[str]:
        return [c.name for c in self.containers.values() if c.running]

    def _starting(self) -> list[str]:
        return [c.name for c in self.containers.values() if c.busy and not c.running]


TestSimulatedPod = SimulatedPod.TestCase
