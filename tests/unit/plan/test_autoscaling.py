"""Autoscaled pools in a fleet: from what pods say to sizes, statuses and sentences."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from autoscaled import (
    SCALING,
    STREAMS_AT_TARGET,
    Load,
    autoscaled_fleet,
    gateway_pod,
    policy,
    size,
)
from builders import NAMESPACE
from operator_world import World
from tandem_operator.keys import Key
from tandem_operator.logs import JsonFormatter
from tandem_operator.plan.queries import Answer
from tandem_operator.replay import main
from tandem_operator.resources import FLEETS, POOLS, SCALING_POLICIES, Ref
from tandem_runtime.protocol import FleetLatency, PodState, PodWork, StepSums


@pytest.fixture
async def world() -> World:
    return await autoscaled_fleet()


@pytest.fixture
def load(world: World) -> Load:
    return Load(world)


def status(world: World) -> dict[str, Any]:
    found: dict[str, Any] = world.body(POOLS, "chat-decode")["status"]["scaling"]
    return found


def always(**decode: Any) -> dict[str, Any]:
    """A schedule that is always open."""
    window = {"name": "day", "cron": "* * * * *", "durationSeconds": 3600}
    return {**window, "decode": decode}


def refer(world: World, name: str = "p") -> None:
    scaling = SCALING | {"policyRef": {"name": name}}
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(scaling=scaling))


async def test_a_pool_follows_its_load_and_says_why(world: World, load: Load) -> None:
    load.streams = 20.0
    for _ in range(6):
        await load.look()
    assert size(world) == 1
    assert world.condition("ScalingActive")[:2] == ("True", "Scaling")
    load.streams = 4 * STREAMS_AT_TARGET
    for _ in range(6):
        await load.look()
    assert 5 <= size(world) <= 6
    assert len(world.pods("chat-decode")) == size(world)
    assert size(world, "chat-prefill") == 1
    last = status(world)["decisions"][-1]
    assert last["replicas"] == size(world)
    assert last["reason"] == "LoadOverBand"
    # 272 streams, and their root for chance.
    assert last["demand"] == pytest.approx(272 + 272**0.5, abs=0.5)
    assert last["capacity"] == pytest.approx(STREAMS_AT_TARGET, rel=0.1)
    told = [e for e in world.events if e.reason == "Scaled"]
    assert told[-1].note.startswith("Pool chat-decode: ")
    assert "LoadOverBand: load of" in told[-1].note
    series = 'tandem_scaling_decision{namespace="team",pool="chat-decode",reason="'
    lines = world.metrics.text().decode().splitlines()
    assert [float(line.split()[-1]) for line in lines if line.startswith(series)] == [size(world)]
    # And back, by draining: nobody's stream is lost.
    load.streams = 10.0
    for _ in range(80):
        await load.look()
    assert size(world) == 1
    assert world.ended == []


async def test_constant_load_writes_nothing(world: World, load: Load) -> None:
    load.streams = 60.0
    for _ in range(60):
        await load.look()
    before = len(world.kube.writes)
    for _ in range(60):
        await load.look()
    assert world.kube.writes[before:] == []
    load.streams = 0.0
    for _ in range(60):
        await load.look()
    before = len(world.kube.writes)
    for _ in range(60):
        await load.look()
    assert world.kube.writes[before:] == []


async def test_a_restart_forgets_nothing(world: World, load: Load) -> None:
    load.streams = 4 * STREAMS_AT_TARGET
    for _ in range(30):
        await load.look()
    busy = size(world)
    world.restart()
    writes = len(world.kube.writes)
    await load.look()
    assert world.kube.writes[writes:] == [], "the first look of a new operator compares nothing"
    assert world.condition("ScalingActive")[:2] == ("True", "Scaling")
    # Load that falls in the same moment is held as long as without a restart.
    load.streams = 10.0
    for _ in range(15):
        await load.look()
    assert size(world) == busy
    for _ in range(80):
        await load.look()
    assert size(world) == 1


async def test_shadow_reports_and_leaves_the_size(world: World, load: Load) -> None:
    world.kube.user_write(policy(mode="Shadow"))
    refer(world)
    load.streams = 4 * STREAMS_AT_TARGET
    for _ in range(8):
        await load.look()
    assert size(world) == 1
    assert world.condition("ScalingActive")[:2] == ("False", "Shadow")
    last = status(world)["decisions"][-1]
    assert (last["replicasBefore"], last["shadow"]) == (1, True)
    assert last["replicas"] > 1
    assert len(status(world)["decisions"]) <= 4
    assert not [e for e in world.events if e.reason == "Scaled"]


async def test_another_writer_is_reported_and_not_fought(world: World, load: Load) -> None:
    load.streams = 10.0
    for _ in range(6):
        await load.look()
    await world.kube.scale(Ref(POOLS, NAMESPACE, "chat-decode"), 6, manager="hpa")
    for _ in range(20):
        await load.look()
    assert size(world) == 6
    said = world.condition("ScalingActive")
    assert said[:2] == ("False", "ReplicasContended")
    assert "Remove the other writer" in said.sentence
    assert [e.type for e in world.events if e.reason == "ReplicasContended"] == ["Warning"]
    # It stands back across a restart, too; and goes on from what it finds.
    world.restart()
    await load.look()
    await load.look()
    assert world.condition("ScalingActive").reason == "ReplicasContended"
    for _ in range(200):
        await load.look()
    assert size(world) == 1
    assert world.condition("ScalingActive")[:2] == ("True", "Scaling")


async def test_its_own_writes_are_no_other_writers(world: World, load: Load) -> None:
    for tick in range(120):
        load.streams = 300.0 if tick // 30 % 2 else 20.0
        await load.look()
        assert world.condition("ScalingActive").reason == "Scaling"


async def test_a_pool_that_was_deleted_comes_back_to_its_load(world: World, load: Load) -> None:
    load.streams = 4 * STREAMS_AT_TARGET
    for _ in range(6):
        await load.look()
    busy = size(world)
    await world.kube.delete(Ref(POOLS, NAMESPACE, "chat-decode"))
    await world.settle()
    assert size(world) == 1
    for _ in range(8):
        await load.look()
        assert world.condition("ScalingActive").reason == "Scaling"
    assert size(world) >= busy


@pytest.mark.parametrize(
    ("spec", "reason", "sentence"),
    [
        (None, "PolicyNotFound", "ScalingPolicy p does not exist in namespace team"),
        ({"gpuBudget": 1}, "BudgetTooSmall", "minReplicas of chat-decode take 2 GPUs"),
        (
            {"gpuBudget": 3, "schedules": [always(minReplicas=4)]},
            "BudgetTooSmall",
            "minReplicas of chat-decode take 4 GPUs in schedule day, and gpuBudget of",
        ),
        (
            {"schedules": [always(minReplicas=9)]},
            "ScheduleUnusable",
            "ScalingPolicy p: schedule day: minReplicas 9 of decode is not between "
            "spec.decode.scaling's 2 and 8; a schedule stays within the fleet's bounds, so change "
            "it or them; Pool chat-decode keeps its size",
        ),
        (
            {"schedules": [always(maxReplicas=1)]},
            "ScheduleUnusable",
            "maxReplicas 1 of decode is not between",
        ),
        (
            {"schedules": [always(minReplicas=5, maxReplicas=4)]},
            "ScheduleUnusable",
            "minReplicas of decode exceeds maxReplicas",
        ),
        ({"schedules": [always()]}, "ScheduleUnusable", "give minReplicas or maxReplicas of decod"),
        (
            {"schedules": [always(minReplicas=4) | {"cron": "0 8 * * 9"}]},
            "ScheduleUnusable",
            'cron "0 8 * * 9" is not understood (bad day-of-week)',
        ),
        (
            {"schedules": [always(minReplicas=4) | {"timeZone": "Mars"}]},
            "ScheduleUnusable",
            'timeZone "Mars" is not known',
        ),
        (
            {"schedules": [always(minReplicas=4) | {"durationSeconds": 604801}]},
            "ScheduleUnusable",
            "durationSeconds must be at most 604800, a week",
        ),
        (
            {"schedules": [always(minReplicas=4), always(minReplicas=3)]},
            "ScheduleUnusable",
            "two schedules have this name",
        ),
    ],
)
async def test_a_policy_that_cannot_work_holds(
    world: World, load: Load, spec: dict[str, Any] | None, reason: str, sentence: str
) -> None:
    if spec is not None:
        world.kube.user_write(policy(**spec))
    scaling = {"minReplicas": 2, "maxReplicas": 8, "policyRef": {"name": "p"}}
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(scaling=scaling))
    load.streams = 4 * STREAMS_AT_TARGET
    for _ in range(5):
        await load.look()
    assert size(world) == 1
    said = world.condition("ScalingActive")
    assert said[:2] == ("False", reason)
    assert sentence in said.sentence
    world.kube.user_write(policy())
    for _ in range(5):
        await load.look()
    assert size(world) > 1
    assert world.condition("ScalingActive")[:2] == ("True", "Scaling")


@pytest.mark.parametrize("mode", ["Active", "Shadow"])
async def test_a_schedule_sets_the_bounds_and_the_status_names_it(
    world: World, load: Load, mode: str
) -> None:
    schedule = always(minReplicas=3, maxReplicas=4)
    world.kube.user_write(policy(mode=mode, schedules=[schedule]))
    refer(world)
    load.streams = 0.0
    await load.look()
    await load.look()
    assert size(world) == (3 if mode == "Active" else 1)
    found = status(world)
    assert found["schedule"] == {"name": "day", "minReplicas": 3, "maxReplicas": 4}
    (last,) = found["decisions"]
    assert (last["replicas"], last["reason"], last["limitedBy"], last["schedule"]) == (
        3,
        "Schedule",
        "minReplicas",
        "day",
    )
    assert last["shadow"] is (mode == "Shadow")
    # Without it the bounds are the fleet's again.
    world.kube.user_write(policy(mode=mode))
    await load.look()
    assert "schedule" not in status(world)


async def test_pods_that_do_not_answer_hold_the_size(world: World, load: Load) -> None:
    load.streams = 4 * STREAMS_AT_TARGET
    for _ in range(10):
        await load.look()
    busy = size(world)
    world.work.clear()
    await world.look()
    assert world.condition("ScalingActive").reason == "Scaling", "one failed look is nothing"
    for _ in range(40):
        await world.look()
    assert size(world) == busy
    said = world.condition("ScalingActive")
    assert said[:2] == ("False", "NoLoadData")
    assert "do not say how much work they have" in said.sentence


async def test_every_change_of_mode_starts_from_the_live_size(world: World, load: Load) -> None:
    load.streams = 4 * STREAMS_AT_TARGET
    for _ in range(10):
        await load.look()
    busy = size(world)
    modes = [
        ({"replicas": 2}, 2),
        ({"scaling": SCALING}, busy),
        ({}, busy),
        ({"scaling": SCALING}, busy),
        ({"replicas": 3}, 3),
        ({}, 3),
        ({"replicas": 3}, 3),
    ]
    for decode, expected in modes:
        world.edit(FLEETS, "chat", lambda b, d=decode: b["spec"].update(decode=dict(d)))
        for _ in range(6):
            await load.look()
        assert abs(size(world) - expected) <= ("scaling" in decode)
        assert not [e for e in world.events if e.type == "Warning"]
        scaled = world.body(POOLS, "chat-decode")["status"].get("scaling")
        assert (scaled is not None) == ("scaling" in decode)


async def test_the_log_replays_to_the_same_decisions(
    world: World,
    load: Load,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO, "tandem_operator.decisions")
    for tick in range(180):
        load.streams = 300.0 if tick // 60 % 2 else 20.0
        await load.look()
    records = [r for r in caplog.records if r.name == "tandem_operator.decisions"]
    lines = [JsonFormatter().format(record) for record in records]
    log = tmp_path / "operator.log"
    log.write_text("not JSON\n" + "\n".join(lines))
    assert main([str(log)]) == 0
    looks = int(capsys.readouterr().out.split()[0])
    assert 5 < looks < len(lines)
    # A log that says something else is noticed.
    log.write_text(log.read_text().replace('"target": 5', '"target": 7'))
    assert main([str(log)]) == 1
    assert "team/chat: logged {'chat-decode': (7," in capsys.readouterr().out
    log.write_text("")
    assert main([str(log)]) == 2


@dataclass
class Answers:
    """A Prometheus that answers each query by what it is about."""

    streams: float = 20.0
    wrong: Answer | None = None
    asked: list[str] = field(default_factory=list)

    async def ask(self, query: str) -> Answer:
        self.asked.append(query)
        if "running" not in query:
            return Answer((0.0,)) if "waiting" in query else Answer((float("nan"),))
        return self.wrong or Answer((self.streams,))


async def test_a_prometheus_says_what_the_load_is(world: World, load: Load) -> None:
    prometheus = Answers()
    world.prometheus = prometheus
    world.restart()
    load.streams = 60.0
    for _ in range(6):
        await load.look()
    assert size(world) == 1
    prometheus.streams = 4 * STREAMS_AT_TARGET
    for _ in range(3):
        await load.look()
    assert size(world) >= 5
    assert len(prometheus.asked) == 9 * 3
    assert all('namespace="team"' in query for query in prometheus.asked)
    assert any(
        '{namespace="team",pod=~"chat-decode-[a-z0-9]+-[0-9]+"}' in q for q in prometheus.asked
    )
    assert any('{namespace="team",fleet="chat"}' in q for q in prometheus.asked)


@pytest.mark.parametrize(
    ("wrong", "reason", "sentence"),
    [
        (
            Answer(error="Prometheus at http://p does not answer: the connection fails"),
            "PrometheusFailed",
            "runningRequests of Pool chat-decode: Prometheus at http://p does not answer",
        ),
        (Answer((1.0, 2.0)), "QueryUnusable", "returns 2 series where one is needed; wrap it in"),
        (Answer((float("nan"),)), "QueryUnusable", "its query returns nan"),
        (Answer(), "QueryUnusable", "no series; see whether Prometheus scrapes the pods"),
    ],
)
async def test_a_prometheus_that_cannot_be_used_holds_and_says_so(
    world: World, load: Load, wrong: Answer, reason: str, sentence: str
) -> None:
    prometheus = Answers(4 * STREAMS_AT_TARGET)
    world.prometheus = prometheus
    world.restart()
    load.streams = 60.0
    for _ in range(6):
        await load.look()
    busy = size(world)
    assert busy > 1
    prometheus.wrong = wrong
    await load.look()
    assert world.condition("ScalingActive").reason == "Scaling", "one failed look is nothing"
    for _ in range(40):
        await load.look()
    assert size(world) == busy
    said = world.condition("ScalingActive")
    assert said[:2] == ("False", reason)
    assert sentence in said.sentence
    prometheus.wrong = None
    await load.look()
    assert world.condition("ScalingActive")[:2] == ("True", "Scaling")


async def test_a_policys_own_queries(world: World, load: Load) -> None:
    queries = {"runningRequests": 'sum(mine{pool="$pool",fleet="$fleet"}) + 0 * running'}
    world.kube.user_write(policy(promql=queries))
    refer(world)
    for _ in range(4):
        await load.look()
    said = world.condition("ScalingActive")
    assert said[:2] == ("False", "PrometheusMissing")
    assert "Set TANDEM_PROMETHEUS_URL of the operator, or remove promql" in said.sentence
    prometheus = Answers()
    world.prometheus = prometheus
    world.restart()
    for _ in range(4):
        await load.look()
    assert world.condition("ScalingActive")[:2] == ("True", "Scaling")
    mine = 'sum(mine{namespace="team",pool="chat-decode",fleet="chat"}) + 0 * running'
    assert mine + '{namespace="team"}' in prometheus.asked
    world.edit(
        SCALING_POLICIES, "p", lambda b: b["spec"].update(promql={"runningRequests": "1 # up"})
    )
    for _ in range(6):
        await load.look()
    said = world.condition("ScalingActive")
    assert said[:2] == ("False", "QueryRefused")
    assert said.sentence.startswith("promql.runningRequests is refused: '# up' is no PromQL")


async def test_to_zero_when_idle_and_back_with_the_first_request(world: World, load: Load) -> None:
    gateway_pod(world)
    zero = {"minReplicas": 0, "maxReplicas": 4, "policyRef": {"name": "p"}}
    world.kube.user_write(policy(windows={"idleSeconds": 60}))
    pools = {"prefill": {"scaling": zero}, "decode": {"scaling": zero}}
    world.edit(FLEETS, "chat", lambda b: b["spec"].update(pools))
    load.streams = 20.0
    for _ in range(20):
        await load.look()
    assert size(world) == 1
    assert world.told == {"chat": ("smollm2",)}
    load.streams = 0.0
    for _ in range(14):
        await load.look()
    assert (size(world), size(world, "chat-prefill")) == (0, 0)
    assert world.pods("chat-decode") == {}
    assert status(world)["decisions"][-1]["reason"] == "Idle"
    assert world.condition("Ready")[:2] == ("True", "ScaledToZero")
    assert world.condition("ScalingActive")[:2] == ("True", "Scaling")
    assert world.autoscaler.asleep == {NAMESPACE}
    # Nothing happens for a long time, across a restart, and nothing is written.
    writes = len(world.kube.writes)
    for _ in range(30):
        await load.look(60.0)
    world.restart()
    await load.look()
    await load.look()
    assert (size(world), world.kube.writes[writes:]) == (0, [])
    world.held = {"chat": 1}
    await load.look(1.0)
    assert (size(world), size(world, "chat-prefill")) == (1, 1)
    assert status(world)["decisions"][-1]["reason"] == "Wake"
    assert len(world.pods("chat-decode")) == 1
    world.held = {}
    for _ in range(5):
        await load.look()
    assert size(world) == 1
    assert world.autoscaler.asleep == set()


async def test_a_gateway_that_does_not_answer_wakes_and_ends_nothing(
    world: World, load: Load
) -> None:
    zero = {"minReplicas": 0, "maxReplicas": 4}
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(scaling=zero))
    await world.kube.scale(Ref(POOLS, NAMESPACE, "chat-decode"), 0, manager="kubectl")
    world.restart()
    world.held = {"chat": 1}
    for _ in range(5):
        await load.look()
    assert size(world) == 0
    assert world.condition("ScalingActive")[:2] == ("True", "Scaling")


@pytest.mark.parametrize("number", [10**400, 10**308])
async def test_numbers_that_nobody_measured_end_nothing(
    world: World, load: Load, number: int
) -> None:
    gateway_pod(world)
    world.held = {"chat": number}
    load.streams = 20.0
    for _ in range(4):
        await load.look()
    assert world.condition("ScalingActive")[:2] == ("True", "Scaling")
    for pod in world.pods("chat-decode"):
        world.work[pod] = PodWork(number, number, number, StepSums(1e308, 1e308), number, 0, 0, 0)
    for _ in range(6):
        await world.look()
    assert size(world) == 1
    said = world.condition("ScalingActive")
    assert said[:2] == ("False", "NoLoadData")
    world.prometheus = Answers(streams=float(min(number, 10**308)))
    world.restart()
    for _ in range(6):
        await load.look()
    assert size(world) == 1
    said = world.condition("ScalingActive")
    assert said[:2] == ("False", "QueryUnusable")
    assert "its query returns 1e+308" in said.sentence


async def test_a_fleet_that_cannot_be_decided_on_ends_nothing(
    world: World, load: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(host: str) -> PodState:
        raise RuntimeError("of no kind that anybody expects")

    with monkeypatch.context() as patch:
        patch.setattr(world, "state", broken)
        assert await world.autoscaler.look(NAMESPACE) == []
    assert "fleet team/chat is not scaled" in caplog.text
    load.streams = 4 * STREAMS_AT_TARGET
    for _ in range(6):
        await load.look()
    assert size(world) >= 5


async def test_an_older_gateway_still_says_what_it_measured(world: World, load: Load) -> None:
    gateway_pod(world)
    world.old_gateway = True
    zero = {"minReplicas": 0, "maxReplicas": 4}
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(scaling=zero))
    world.latency = {"chat": FleetLatency(10, 0.2, 0.4, 0.01, 0.02)}
    load.streams = 120.0
    for _ in range(4):
        await load.look()
    assert world.told is None
    assert status(world)["decisions"][-1]["latencyMilliseconds"] == 20


async def test_shadow_holds_no_request_for_a_pod_that_nobody_wakes(
    world: World, load: Load
) -> None:
    gateway_pod(world)
    world.kube.user_write(policy(mode="Shadow"))
    zero = {"minReplicas": 0, "maxReplicas": 4, "policyRef": {"name": "p"}}
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(scaling=zero))
    for _ in range(3):
        await load.look()
    assert world.told == {}


async def test_a_fleet_that_is_not_woken_any_more_holds_nothing(world: World, load: Load) -> None:
    gateway_pod(world)
    zero = {"scaling": {"minReplicas": 0, "maxReplicas": 4}}
    for change in ({"replicas": 1}, {"scaling": SCALING}, {"replicas": 1}):
        world.edit(FLEETS, "chat", lambda b: b["spec"].update(decode=dict(zero)))
        await load.look()
        assert world.told == {"chat": ("smollm2",)}
        if change == {"scaling": SCALING}:
            world.restart()  # What the operator before it told stands until it is taken back.
        world.edit(FLEETS, "chat", lambda b, c=change: b["spec"].update(decode=dict(c)))
        world.old_gateway = True  # It does not answer at first.
        await load.look()
        world.old_gateway = False
        await load.look()
        assert world.told == {}
        world.told = None
        await load.look()
        assert world.told is None, "said once"


async def test_of_a_namespace_whose_fleets_are_gone_nothing_is_remembered(
    world: World, load: Load
) -> None:
    load.streams = 20.0
    for _ in range(3):
        await load.look()
    assert world.autoscaler.known == {NAMESPACE}
    assert "tandem_scaling_decision{" in world.metrics.text().decode()
    await world.kube.delete(Ref(FLEETS, NAMESPACE, "chat"))
    await world.settle()
    await load.look()
    assert world.autoscaler.known == set()
    assert "tandem_scaling_decision{" not in world.metrics.text().decode()


async def test_silent_pods_of_many_namespaces_do_not_add_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(namespace: str) -> list[Key]:
        await asyncio.sleep(0.3)
        return [Key("InferenceFleet", namespace, "chat")]

    monkeypatch.setattr(world.autoscaler, "look", slow)
    names = {str(n) for n in range(100)}
    async with asyncio.timeout(15):
        looked = [keys async for keys in world.autoscaler.look_at(names)]
    assert {key.namespace for keys in looked for key in keys} == names
