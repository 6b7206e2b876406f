"""What a fleet's conditions and Events say, in detail."""

from __future__ import annotations

import pytest
from builders import fleet_body, model_body
from operator_world import ABSENT, World
from tandem_operator.api.fleet import Latency, Percentiles
from tandem_operator.plan.latency import Published
from tandem_operator.resources import DEPLOYMENTS, FLEETS, PODS, POOLS


@pytest.fixture
async def world() -> World:
    world = World()
    world.kube.user_write(model_body())
    world.kube.user_write(fleet_body())
    await world.settle()
    return world


def percentiles(p95_us: int) -> Percentiles:
    return Percentiles(p50_microseconds=p95_us // 2, p95_microseconds=p95_us)


def latency(ttft_us: int, tpot_us: int | None) -> Latency:
    return Latency(
        time_to_first_token=percentiles(ttft_us),
        time_per_output_token=None if tpot_us is None else percentiles(tpot_us),
    )


async def measure(world: World, ttft_us: int, tpot_us: int | None) -> None:
    published = Published(latency(ttft_us, tpot_us), 0.0, 0.0)
    world.facts._latencies["team", "chat"] = published
    await world.settle()


@pytest.mark.parametrize(
    ("ttft_us", "tpot_us", "shown"),
    [(120_000, 8_500, ("120ms", "8.5ms")), (1_500_000, 950, ("1.5s", "0.95ms"))],
)
async def test_latency_is_shown_for_people(
    world: World, ttft_us: int, tpot_us: int, shown: tuple[str, str]
) -> None:
    await measure(world, ttft_us, tpot_us)
    status = world.body(FLEETS, "chat")["status"]
    assert (status["ttft"], status["tpot"]) == shown


async def test_objectives_are_judged_by_what_was_measured(world: World) -> None:
    objectives = {
        "timeToFirstToken": {"targetMilliseconds": 100, "percentile": 95},
        "timePerOutputToken": {"targetMilliseconds": 10, "percentile": 50},
    }
    world.edit(FLEETS, "chat", lambda b: b["spec"].update(objectives=objectives))
    await world.settle()
    assert world.condition("SLOMet")[:2] == ("Unknown", "NoMeasurement")
    await measure(world, 90_000, 15_000)
    assert world.condition("SLOMet").status == "True"
    await measure(world, 110_000, 25_000)
    assert world.condition("SLOMet") == (
        "False",
        "ObjectivesMissed",
        "TTFT p95 is over its target of 100 ms; TPOT p50 is over its target of 10 ms",
    )


async def test_an_objective_that_nobody_measured_is_not_kept(world: World) -> None:
    """Answers of one token have no time per output token."""
    objectives = {
        "timeToFirstToken": {"targetMilliseconds": 100, "percentile": 95},
        "timePerOutputToken": {"targetMilliseconds": 10, "percentile": 50},
    }
    world.edit(FLEETS, "chat", lambda b: b["spec"].update(objectives=objectives))
    await measure(world, 90_000, 15_000)
    assert world.condition("SLOMet").status == "True"
    await measure(world, 90_000, None)
    assert world.condition("SLOMet") == ("Unknown", "NoMeasurement", "no TPOT was measured lately")
    status = world.body(FLEETS, "chat")["status"]
    assert "tpot" not in status
    assert "timePerOutputToken" not in status["latency"]
    await measure(world, 110_000, None)
    assert world.condition("SLOMet").reason == "ObjectivesMissed"
    world.edit(FLEETS, "chat", lambda b: b["spec"]["objectives"].pop("timePerOutputToken"))
    await measure(world, 90_000, None)
    assert world.condition("SLOMet").status == "True"


async def test_the_first_start_is_told_in_order_and_once() -> None:
    world = World()
    world.kube.user_write(model_body())
    world.kube.user_write(fleet_body())
    await world.settle()
    told = [(e.type, e.reason) for e in world.events if e.regarding.resource == FLEETS]
    assert told[-1] == ("Normal", "Serving")
    assert ("Normal", "PodsStarting") in told
    assert not [entry for entry in told if entry[0] == "Warning"]
    assert len(told) == len(set(told))


async def test_a_halt_and_a_lost_pod_are_warnings(world: World) -> None:
    world.events.clear()
    world.lose(sorted(world.pods("chat-decode"))[0])
    await world.reconcile()
    assert [(e.type, e.reason) for e in world.events] == [("Warning", "PodsNotReady")]
    await world.settle()
    world.events.clear()
    template = {"spec": {"containers": [{"name": "runtime", "env": [{"name": "BAD"}]}]}}
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(template=template))
    await world.settle()
    told = [(e.type, e.reason) for e in world.events]
    assert ("Warning", "RolloutHalted") in told
    assert told.count(("Warning", "RolloutHalted")) == 1


async def test_a_pod_that_never_gets_ready_halts_after_the_deadline(world: World) -> None:
    def edit(body: dict[str, object]) -> None:
        spec = body["spec"]
        assert isinstance(spec, dict)
        spec["rollout"]["progressDeadlineSeconds"] = 60
        env = [{"name": "V", "value": "2"}]
        spec["decode"]["template"] = {"spec": {"containers": [{"name": "runtime", "env": env}]}}

    world.edit(FLEETS, "chat", edit)
    for _ in range(6):
        await world.reconcile()
    assert world.condition("Ready").reason == "RollingOut"
    assert world.condition("Stalled") == ABSENT
    world.clock.sleep(61.0)
    await world.reconcile()
    said = world.condition("Stalled")
    assert said.reason == "RolloutHalted"
    assert "is not Ready after 60 s (rollout.progressDeadlineSeconds)" in said.sentence
    await world.settle()
    assert world.condition("Ready").status == "True", "it healed and nobody noticed"


async def test_a_pod_without_a_node_is_quoted(world: World) -> None:
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(replicas=3))
    for _ in range(3):
        await world.reconcile()
    new = next(n for n in world.pods("chat-decode") if "status" not in world.body(PODS, n))
    world.starve(new)
    world.lose(sorted(world.pods("chat-decode"))[0])
    await world.reconcile()
    assert "Insufficient nvidia.com/gpu" in world.condition("Ready").sentence


async def test_without_a_gateway_nothing_is_ready() -> None:
    world = World()
    world.kube.user_write(model_body())
    world.kube.user_write(fleet_body())
    for _ in range(8):
        await world.reconcile()
        for pod in world.pods("chat-decode") | world.pods("chat-prefill"):
            world.make_ready(pod)
    assert world.condition("GatewayAvailable").status == "False"
    assert world.condition("Ready").reason == "GatewayNotReady"


async def test_a_restart_is_in_the_status_that_takes_it_into_account(world: World) -> None:
    """Annotations have no generation: nobody could tell else whether Ready is of before."""
    mark = {"tandem.dev/restartedAt": "2026-01-01T00:00:00Z"}
    world.edit(FLEETS, "chat", lambda b: b["metadata"].update(annotations=mark))
    await world.reconcile()
    status = world.body(FLEETS, "chat")["status"]
    assert status["revision"]["restartedAt"] == "2026-01-01T00:00:00Z"
    assert world.condition("Ready").status == "False"


async def test_a_gateway_that_cannot_be_made_says_why(world: World) -> None:
    told = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: cpu"}
    world.body(DEPLOYMENTS, "tandem-gateway")["status"] = {"conditions": [told]}
    await world.reconcile()
    assert world.condition("Ready").sentence == (
        "no gateway pod is available yet: exceeded quota: cpu"
    )
    assert world.condition("GatewayAvailable").sentence.endswith(": exceeded quota: cpu")


async def test_a_change_while_all_pods_sleep_is_proven_when_they_wake() -> None:
    """A broken revision is not taken for one that was rolled out: the last that served is kept."""
    world = World()
    world.kube.user_write(model_body())
    world.kube.user_write(fleet_body(prefill={}, decode={}))
    await world.settle()
    served = world.body(FLEETS, "chat")["status"]["revision"]["serving"]

    def resize(replicas: int) -> None:
        for name in ("chat-prefill", "chat-decode"):
            world.edit(POOLS, name, lambda b: b["spec"].update(replicas=replicas))

    resize(0)
    await world.settle()
    env = [{"name": "BAD", "value": "1"}]
    broken = {"spec": {"containers": [{"name": "runtime", "env": env}]}}
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(template=broken))
    await world.settle()
    assert world.condition("Ready")[:2] == ("True", "ScaledToZero")
    assert world.condition("Reconciling").status == ""
    assert world.body(FLEETS, "chat")["status"]["revision"]["serving"] == served
    resize(2)
    await world.settle()
    assert world.condition("Stalled").reason == "RolloutHalted"
    revisions = list(world.pods("chat-decode").values())
    assert revisions.count(served) == 2
