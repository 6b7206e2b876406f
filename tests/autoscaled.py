"""A fleet with an autoscaled decode pool in the operator's world, and the load of its pods."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from builders import NAMESPACE, fleet_body, model_body
from operator_world import World
from tandem_operator.plan.build import COMMON_LABELS
from tandem_operator.resources import PODS, POOLS, SCALING_POLICIES
from tandem_runtime.contract import COMPONENT_GATEWAY, LABEL_COMPONENT
from tandem_runtime.protocol import PodWork, StepSums

SCALING = {"minReplicas": 1, "maxReplicas": 8}
STREAMS_AT_TARGET = 68.0
"""Of a replica whose steps take 8 ms + 0.25 ms a stream, at 25 ms."""
OBJECTIVES = {"timePerOutputToken": {"targetMilliseconds": 25}}


@dataclass
class Load:
    """Decode streams spread over the pods that serve, as the pods would report them."""

    world: World
    streams: float = 0.0
    sums: dict[str, list[float]] = field(default_factory=dict)

    async def look(self, seconds: float = 5.0) -> None:
        pods = [p for p in self.world.pods("chat-decode") if p not in self.world.draining]
        # A new pod of an old name counts from nothing.
        self.sums = {pod: total for pod, total in self.sums.items() if pod in pods}
        for pod in pods:
            batch = self.streams / len(pods)
            total = self.sums.setdefault(pod, [0.0] * 10)
            for varied in (0.8, 1.0, 1.2) if batch else ():
                s = varied * batch
                step_s = 0.008 + 0.00025 * s
                n = seconds / 3 / step_s
                for i, value in enumerate((1, step_s, 0, s, 0, 0, s * s, 0, s * step_s, s)):
                    total[i] += n * value
            requests, output = int(total[9] / 100), int(total[9])
            sums = StepSums(*total[:9])
            self.world.work[pod] = PodWork(requests, 0, output, sums, 0, 0, 8192, 256)
            self.world.running[pod] = round(batch)
        for pod in self.world.pods("chat-prefill"):
            self.world.work[pod] = PodWork(0, 0, 0, StepSums(), 0, 0, 8192, 256)
        for pod in self.world.draining:
            self.world.running[pod] = 0
        await self.world.look(seconds)


async def autoscaled_fleet() -> World:
    """A fleet that serves, with an autoscaled decode pool."""
    world = World()
    world.kube.user_write(model_body())
    world.kube.user_write(fleet_body(decode={"scaling": SCALING}, objectives=OBJECTIVES))
    await world.settle()
    await world.look()
    await world.settle()
    return world


def policy(name: str = "p", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": SCALING_POLICIES.api_version,
        "kind": SCALING_POLICIES.kind,
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": spec,
    }


def size(world: World, pool: str = "chat-decode") -> int:
    return int(world.body(POOLS, pool)["spec"]["replicas"])


def gateway_pod(world: World) -> None:
    """A gateway that answers."""
    labels = {**COMMON_LABELS, LABEL_COMPONENT: COMPONENT_GATEWAY}
    meta = {"name": "gateway-0", "namespace": NAMESPACE, "labels": labels}
    world.kube.user_write({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {}})
    world.body(PODS, "gateway-0")["status"] = {"phase": "Running", "podIP": "127.0.0.250"}
