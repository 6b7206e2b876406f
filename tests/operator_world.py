"""The operator's whole loop on a cluster in memory: reconcilers over FakeKube and pods that obey.

Each `reconcile` is one pass over every key, with the caches as stale or the writes as lossy as the
test asks for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec
from builders import NAMESPACE
from fake_kube import Body, Clock, FakeKube
from tandem_operator.autoscale import Autoscaler, Queries
from tandem_operator.facts import Facts
from tandem_operator.keys import NODES_KEY, Key, gateway_key
from tandem_operator.kube.client import ApiError
from tandem_operator.kube.execute import Executor
from tandem_operator.metrics import Metrics
from tandem_operator.observe import Observer
from tandem_operator.observe_nodes import NodeObserver
from tandem_operator.plan.actions import Notify, Plan
from tandem_operator.readers import CachedReader, LiveReader
from tandem_operator.reconcile import ReconcileFailed, Reconciler
from tandem_operator.resources import (
    CACHED_CONTEXTS,
    DEPLOYMENTS,
    FLEETS,
    MODELS,
    NODE_HEALTH_POLICIES,
    PODS,
    Ref,
    Resource,
)
from tandem_operator.settings import Settings
from tandem_runtime.contract import (
    COMPONENT_RUNTIME,
    LABEL_COMPONENT,
    LABEL_FLEET,
    LABEL_POOL,
    LABEL_REVISION,
)
from tandem_runtime.protocol import (
    Context,
    ContextState,
    DrainRequest,
    FleetLatency,
    GatewayState,
    PodState,
    PodWork,
    Wakeable,
)


class Said(NamedTuple):
    """A condition."""

    status: str
    reason: str
    sentence: str


ABSENT = Said("", "", "")


class World:
    """A cluster with one operator in it."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.clock = Clock()
        self.kube = FakeKube(self.clock)
        self.settings = settings or Settings()
        self.events: list[Notify] = []
        self.running: dict[str, int] = {}
        """Streams that each pod has, by name."""
        self.draining: set[str] = set()
        self.work: dict[str, PodWork] = {}
        """What each pod says of its work, by name; a pod without says nothing."""
        self.prometheus: Queries | None = None
        """Takes effect with a restart."""
        self.latency: dict[str, FleetLatency] = {}
        """What the gateway measured, by fleet."""
        self.old_gateway = False
        """The gateway knows nothing of fleets that are woken."""
        self.held: dict[str, int] = {}
        """Requests that wait at the gateway, by fleet."""
        self.told: dict[str, tuple[str, ...]] | None = None
        """What the gateway was last told to hold requests for."""
        self.contexts: dict[str, dict[str, ContextState]] = {}
        """What each gateway knows of contexts, by its name and theirs."""
        self.told_contexts: list[tuple[str, Context]] = []
        self.silent: set[str] = set()
        """Gateways that give no answer."""
        self.ended: list[str] = []
        """Pods that were told to end their streams."""
        self.stale: dict[tuple[Resource, str], list[Body]] | None = None
        self.fault: Callable[[Any], str | None] = lambda action: None
        """For an action: None, "lost" or "twice"."""
        self.restart()

    def restart(self) -> None:
        """A new operator process: everything that was only in memory is gone."""
        cached = CachedReader(self)
        self.facts = Facts()
        taints = self.settings.drain_taints
        live = LiveReader(self.kube, cached)
        observer = Observer(cached, live, self, self.facts, self.clock, taints)
        self.metrics = Metrics()
        self.autoscaler = Autoscaler(
            cached, self, self.facts, self.metrics, self.clock, self.prometheus
        )
        nodes = NodeObserver(
            cached,
            live,
            lambda: [NAMESPACE],
            self,
            self.kube,
            self.facts,
            self.clock,
            may_write=self.settings.node_repair,
        )
        executor = FaultyExecutor(self, Executor(self.kube, self, self, lambda n: b"k" * n))
        self.reconciler = Reconciler(
            observer,
            nodes,
            executor,
            self.facts,
            AlwaysLeader(),
            self.metrics,
            self.settings,
            self.clock,
        )

    # -- what the operator talks to ----------------------------------------------------------------

    def objects(self, resource: Resource, namespace: str) -> list[Body]:
        """The watch's cache: the present, or what a test froze with `freeze`."""
        if self.stale is not None:
            return self.stale.get((resource, namespace), [])
        return [
            body
            for (kind, ns, _), body in self.kube.objects.items()
            if (kind, ns) == (resource, namespace)
        ]

    def freeze(self) -> None:
        """From now on the cache shows this moment."""
        self.stale = {}
        for (kind, namespace, _), body in self.kube.objects.items():
            self.stale.setdefault((kind, namespace), []).append(copy.deepcopy(body))

    def thaw(self) -> None:
        self.stale = None

    async def context(self, host: str, uid: str, name: str) -> ContextState | None:
        if self._at(host) in self.silent:
            raise OSError(f"{host} gives no answer")
        return self.contexts.get(self._at(host), {}).get(name)

    async def put_context(self, host: str, uid: str, context: Context) -> ContextState:
        pod = self._at(host)
        if self.kube.objects[PODS, NAMESPACE, pod]["metadata"]["uid"] != uid:
            raise OSError(f"{host} answered 403")
        self.told_contexts.append((pod, context))
        state = ContextState(msgspec.structs.replace(context, prompt="", messages=[]))
        self.contexts.setdefault(pod, {})[context.id] = state
        return state

    async def state(self, host: str) -> PodState:
        return self._state(self._at(host))

    async def drain(self, host: str, uid: str, request: DrainRequest) -> PodState:
        pod = self._at(host)
        if self.kube.objects[PODS, NAMESPACE, pod]["metadata"]["uid"] != uid:
            raise OSError(f"{host} answered 403")
        if request.mode == "cancel":
            self.draining.discard(pod)
        else:
            self.draining.add(pod)
        if request.mode == "end":
            self.ended.append(pod)
        return self._state(pod)

    async def record(self, event: Notify) -> None:
        self.events.append(event)

    def _at(self, host: str) -> str:
        for pod in self.kube.pods(NAMESPACE):
            if (pod.get("status") or {}).get("podIP") == host:
                return str(pod["metadata"]["name"])
        raise OSError(f"nobody at {host}")

    def _state(self, pod: str) -> PodState:
        running = self.running.get(pod, 0)
        draining = pod in self.draining
        work = self.work.get(pod)
        return PodState(pod, "", "", "", True, draining, running, 0, 0, 0.0, 0, 0.0, 0, work)

    async def gateway(self, host: str) -> GatewayState:
        return GatewayState(host, True, 0, 0.0, self.latency, self.held)

    async def wakeable(self, host: str, uid: str, told: Wakeable) -> GatewayState:
        if self.old_gateway:
            raise OSError(f"{host} answered 404")
        if self.kube.objects[PODS, NAMESPACE, self._at(host)]["metadata"]["uid"] != uid:
            raise OSError(f"{host} answered 403")
        self.told = dict(told.fleets)
        return await self.gateway(host)

    # -- the cluster around it -------------------------------------------------------------------

    async def reconcile(self) -> int:
        """One pass over every key; the number of writes that changed something."""
        before = len(self.kube.writes)
        for key in self.keys():
            try:
                await self.reconciler.reconcile(key)
            except (ReconcileFailed, ApiError, OSError):
                continue
        return len(self.kube.writes) - before

    def keys(self) -> list[Key]:
        """Every key that an event or the resync would queue."""
        names = {b["metadata"]["name"] for b in self.objects(FLEETS, NAMESPACE)}
        for pod in self.objects(PODS, NAMESPACE):
            labels = pod["metadata"].get("labels") or {}
            if labels.get(LABEL_COMPONENT) == COMPONENT_RUNTIME and LABEL_FLEET in labels:
                names.add(labels[LABEL_FLEET])
        models = [b["metadata"]["name"] for b in self.objects(MODELS, NAMESPACE)]
        return [
            *([NODES_KEY] if self.objects(NODE_HEALTH_POLICIES, "") else []),
            *(Key("Model", NAMESPACE, name) for name in models),
            gateway_key(NAMESPACE),
            *(Key("InferenceFleet", NAMESPACE, name) for name in sorted(names)),
            *(
                Key("CachedContext", NAMESPACE, body["metadata"]["name"])
                for body in self.objects(CACHED_CONTEXTS, NAMESPACE)
            ),
        ]

    async def look(self, seconds: float = 5.0) -> None:
        """Some time later, one look of the autoscaler, and what follows from it."""
        self.clock.sleep(seconds)
        await self.autoscaler.look(NAMESPACE)
        for _ in range(3):
            await self.reconcile()
            self.kubelet()

    async def settle(self, passes: int = 60) -> None:
        """Reconcile until nothing is written any more, with pods that start and leave at once.

        Raises AssertionError when that never happens.
        """
        for _ in range(passes):
            await self.reconcile()
            changed = self.kubelet()
            self.clock.sleep(1.0)
            if not changed and await self.reconcile() == 0 and not self.kubelet():
                return
        raise AssertionError(f"never at rest; last writes: {self.kube.writes[-12:]}")

    def kubelet(self) -> bool:
        """Every pod that can start is Ready, every one that ends is gone; whether any changed."""
        before = len(self.kube.writes)
        self.kube.collect()
        for pod in list(self.kube.pods(NAMESPACE)):
            name = pod["metadata"]["name"]
            if "deletionTimestamp" in pod["metadata"]:
                if not self.running.get(name):
                    self.lose(name)
            elif not self.is_bad(pod):
                self.make_ready(name)
            else:
                self.crash(name, "the flag --nonsense does not exist")
        deployment = self.kube.objects.get((DEPLOYMENTS, NAMESPACE, "tandem-gateway"))
        if deployment is not None and "status" not in deployment:
            deployment["status"] = {"availableReplicas": 1}
            self.kube.writes.append("gateway available")
        return len(self.kube.writes) > before

    def is_bad(self, pod: Body) -> bool:
        """A pod whose template says BAD never runs."""
        return "BAD" in str(pod["spec"])

    def make_ready(self, name: str) -> None:
        self._status(
            name,
            {
                "phase": "Running",
                "podIP": f"127.0.0.{name}",
                "conditions": [{"type": "Ready", "status": "True"}],
                "containerStatuses": [{"name": "runtime", "ready": True, "restartCount": 0}],
            },
        )

    def crash(self, name: str, sentence: str) -> None:
        ended = {"exitCode": 64, "message": sentence}
        waiting = {"reason": "CrashLoopBackOff", "message": "back-off"}
        self._status(
            name,
            {
                "phase": "Running",
                "podIP": f"127.0.0.{name}",
                "conditions": [{"type": "Ready", "status": "False"}],
                "containerStatuses": [
                    {
                        "name": "runtime",
                        "ready": False,
                        "restartCount": 1,
                        "state": {"waiting": waiting},
                        "lastState": {"terminated": ended},
                    }
                ],
            },
        )

    def starve(self, name: str) -> None:
        """The scheduler finds no room for the pod."""
        sentence = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu."
        condition = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": sentence,
        }
        self._status(name, {"phase": "Pending", "conditions": [condition]})

    def _status(self, name: str, status: Body) -> None:
        pod = self.kube.objects[PODS, NAMESPACE, name]
        if pod.get("status") != status:
            pod["status"] = status
            self.kube.writes.append(f"kubelet {name}")

    def lose(self, name: str) -> None:
        """The pod is gone without warning."""
        self.kube.vanish(Ref(PODS, NAMESPACE, name))
        self.draining.discard(name)
        self.running.pop(name, None)

    def pods(self, pool: str, *, terminating: bool = False) -> dict[str, str]:
        """Names and revisions of a pool's pods."""
        return {
            pod["metadata"]["name"]: pod["metadata"]["labels"][LABEL_REVISION]
            for pod in self.kube.pods(NAMESPACE)
            if pod["metadata"]["labels"].get(LABEL_POOL) == pool
            and (terminating or "deletionTimestamp" not in pod["metadata"])
        }

    def body(self, resource: Resource, name: str) -> Body:
        return self.kube.objects[resource, NAMESPACE, name]

    def condition(self, type_: str, fleet: str = "chat") -> Said:
        """What a condition of the fleet says; ABSENT when it has none of that type."""
        conditions = self.body(FLEETS, fleet).get("status", {}).get("conditions", ())
        found = next((c for c in conditions if c["type"] == type_), None)
        return Said(found["status"], found["reason"], found["message"]) if found else ABSENT

    def edit(self, resource: Resource, name: str, change: Callable[[Body], None]) -> None:
        """A user edits an object's spec or metadata."""
        body = copy.deepcopy(self.body(resource, name))
        change(body)
        self.kube.user_write(body)


class AlwaysLeader:
    """Leadership that is never lost."""

    held = True


class FaultyExecutor:
    """Loses or repeats the actions that the world's `fault` names."""

    def __init__(self, world: World, executor: Executor) -> None:
        self._world = world
        self._executor = executor

    async def execute(self, plan: Plan) -> Any:
        actions = []
        for action in plan.actions:
            what = self._world.fault(action)
            actions += [action] * {None: 1, "lost": 0, "twice": 2}[what]
        return await self._executor.execute(replace(plan, actions=tuple(actions)))
