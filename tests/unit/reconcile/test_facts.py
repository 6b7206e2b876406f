"""What is kept in memory: only of what exists, and through clocks that are set back."""

from __future__ import annotations

from builders import NAMESPACE, fleet_body, model_body
from operator_world import World
from tandem_operator.api.fleet import Latency, Percentiles
from tandem_operator.facts import Facts
from tandem_operator.plan.views import TemplateCheck
from tandem_operator.resources import FLEETS, PODS, Ref

NUMBERS = Percentiles(p50_microseconds=1000, p95_microseconds=2000)
MEASURED = Latency(time_to_first_token=NUMBERS, time_per_output_token=NUMBERS)
OTHER = Latency(
    time_to_first_token=Percentiles(p50_microseconds=9000, p95_microseconds=9000),
    time_per_output_token=NUMBERS,
)


async def test_a_fleet_of_the_same_name_starts_without_its_predecessors_latency() -> None:
    world = World()
    world.kube.user_write(model_body())
    world.kube.user_write(fleet_body())
    await world.settle()
    world.facts.learn_latency(NAMESPACE, "chat", MEASURED, world.clock())
    await world.settle()
    world.kube.vanish(Ref(FLEETS, NAMESPACE, "chat"))
    await world.settle()
    world.kube.user_write(fleet_body())
    await world.settle()
    assert "latency" not in world.body(FLEETS, "chat")["status"]


async def test_deleted_fleets_are_not_remembered() -> None:
    world = World()
    world.kube.user_write(model_body())
    for serial in range(5):
        world.kube.user_write(fleet_body(f"chat-{serial}"))
        await world.settle()
        world.kube.vanish(Ref(FLEETS, NAMESPACE, f"chat-{serial}"))
        await world.settle()
    for _ in range(4):
        world.clock.sleep(300.0)
        await world.reconcile()
    assert len(world.reconciler._verified_s) <= 2, "the Model and the gateway"


async def test_a_clock_that_is_set_back_does_not_suspend_the_live_reads() -> None:
    world = World()
    world.kube.user_write(model_body())
    world.kube.user_write(fleet_body())
    await world.settle()
    world.freeze()
    world.kube.vanish(Ref(PODS, NAMESPACE, sorted(world.pods("chat-decode"))[0]))
    world.clock.sleep(-86_400.0)
    await world.reconcile()
    await world.reconcile()
    assert len(world.pods("chat-decode")) == 2


def test_a_clock_that_is_set_back_keeps_no_answer_for_ever() -> None:
    facts = Facts()
    facts.learn_check("team", "chat-1", TemplateCheck(False, "QuotaExceeded", "no"), 1000.0)
    facts.learn_latency("team", "chat", MEASURED, 1000.0)
    assert facts.checks("team", 0.0) == {}
    assert facts.learn_latency("team", "chat", OTHER, 0.0)
