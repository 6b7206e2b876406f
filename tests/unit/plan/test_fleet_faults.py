"""A fleet under arbitrary edits, losses, stale caches, lost and repeated writes, and restarts.

Whatever happened: no pod with streams is deleted, never more pods than the budgets allow, and once
the faults stop the fleet comes to rest where its spec says, in bounded passes.
"""

from __future__ import annotations

import asyncio
from typing import Any

from builders import NAMESPACE, fleet_body, model_body
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from operator_world import World
from tandem_operator.plan.actions import Create, Delete, Notify, WriteStatus
from tandem_operator.resources import FLEETS, PODS, POOLS, Ref

Body = dict[str, Any]


class Faults(RuleBasedStateMachine):
    """One fleet and everything that can happen to it."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.good = True
        self.violations: list[str] = []
        self.serial = 0

    @initialize(prefill=st.booleans(), budget=st.sampled_from([(1, 0), (0, 1), (2, 1)]))
    def start(self, prefill: bool, budget: tuple[int, int]) -> None:
        rollout = {"maxSurge": budget[0], "maxUnavailable": budget[1]}
        pools = {} if prefill else {"prefill": None}
        self.world.kube.user_write(model_body())
        self.world.kube.user_write(fleet_body(rollout=rollout, **pools))

    def _fleet(self) -> Body:
        return self.world.body(FLEETS, "chat")["spec"]

    def _any_pod(self, pick: int) -> str | None:
        names = sorted(pod["metadata"]["name"] for pod in self.world.kube.pods(NAMESPACE))
        runtime = [name for name in names if "resolve" not in name]
        return runtime[pick % len(runtime)] if runtime else None

    @rule(
        passes=st.integers(1, 4),
        losses=st.lists(st.sampled_from([None, None, None, "lost", "twice"]), max_size=12),
    )
    def reconcile(self, passes: int, losses: list[str | None]) -> None:
        plan = list(losses)

        def fault(action: object) -> str | None:
            self._watch(action)
            if isinstance(action, Notify | WriteStatus):
                return None
            return plan.pop() if plan else None

        self.world.fault = fault
        for _ in range(passes):
            asyncio.run(self.world.reconcile())
        self.world.fault = self._observe_only
        assert not self.violations, self.violations

    def _observe_only(self, action: object) -> None:
        self._watch(action)

    def _watch(self, action: object) -> None:
        """Invariants on what the operator is about to do."""
        if isinstance(action, Delete) and action.target.resource == PODS:
            name = action.target.name
            if self._is_ready(name) and self.world.running.get(name):
                self.violations.append(f"{name} was deleted with streams: {action.reason}")
        if isinstance(action, Create) and action.manifest["kind"] == "Pod":
            self._check_room(action.manifest["metadata"])

    def _is_ready(self, name: str) -> bool:
        body = self.world.kube.objects.get((PODS, NAMESPACE, name)) or {}
        conditions = body.get("status", {}).get("conditions", ())
        return {"type": "Ready", "status": "True"} in conditions

    def _check_room(self, metadata: Body) -> None:
        pool = metadata["labels"].get("tandem.dev/pool")
        name = metadata["name"]
        if not pool or self.world.stale is not None:
            return
        alive = [p for p in self.world.pods(pool) if p != name]
        settled = [p for p in alive if p not in self.world.draining]
        spec = self._fleet()
        asked = spec.get(pool.removeprefix("chat-"), {"replicas": 0})["replicas"]
        size = max(self.world.body(POOLS, pool)["spec"]["replicas"], asked)
        if len(settled) >= size + spec["rollout"]["maxSurge"]:
            self.violations.append(f"{name} is one too many for {size}: {settled}")

    @rule()
    def kubelet(self) -> None:
        self.world.kubelet()

    @rule(pick=st.integers(0, 99))
    def lose_pod(self, pick: int) -> None:
        name = self._any_pod(pick)
        if name:
            self.world.lose(name)

    @rule(pick=st.integers(0, 99))
    def delete_pod(self, pick: int) -> None:
        name = self._any_pod(pick)
        if name:
            asyncio.run(self.world.kube.delete(Ref(PODS, NAMESPACE, name)))

    @rule(pick=st.integers(0, 99), streams=st.integers(0, 3))
    def streams(self, pick: int, streams: int) -> None:
        """A pod that admits gets streams; any pod may finish its own."""
        name = self._any_pod(pick)
        admits = name is not None and self._is_ready(name) and name not in self.world.draining
        if name and (streams == 0 or admits):
            self.world.running[name] = streams

    @rule(good=st.booleans())
    def edit_template(self, good: bool) -> None:
        self.serial += 1
        self.good = good
        value = f"{'good' if good else 'BAD'}-{self.serial}"
        env = [{"name": "V", "value": value}]
        template = {"spec": {"containers": [{"name": "runtime", "env": env}]}}

        def change(body: Body) -> None:
            for role in ("prefill", "decode"):
                if role in body["spec"]:
                    body["spec"][role]["template"] = template

        self.world.edit(FLEETS, "chat", change)

    @rule(replicas=st.integers(1, 4), role=st.sampled_from(["prefill", "decode"]))
    def resize(self, replicas: int, role: str) -> None:
        def change(body: Body) -> None:
            if role in body["spec"]:
                body["spec"][role]["replicas"] = replicas

        self.world.edit(FLEETS, "chat", change)

    @rule()
    def toggle_prefill(self) -> None:
        def change(body: Body) -> None:
            if body["spec"].pop("prefill", None) is None:
                body["spec"]["prefill"] = {**body["spec"]["decode"], "replicas": 1}

        self.world.edit(FLEETS, "chat", change)

    @rule(role=st.sampled_from(["prefill", "decode"]))
    def delete_pool(self, role: str) -> None:
        if (POOLS, NAMESPACE, f"chat-{role}") in self.world.kube.objects:
            self.world.kube.vanish(Ref(POOLS, NAMESPACE, f"chat-{role}"))

    @rule()
    def restart_operator(self) -> None:
        self.world.restart()

    @rule()
    def cache_stops(self) -> None:
        self.world.freeze()

    @rule()
    def cache_goes_on(self) -> None:
        self.world.thaw()

    @rule()
    def comes_to_rest(self) -> None:
        """The faults stop, all streams end: the fleet ends where its spec says."""
        self.world.thaw()
        self.world.fault = self._observe_only
        self.world.running.clear()
        self.world.clock.sleep(30.0)
        asyncio.run(self.world.settle(passes=120))
        assert not self.violations, self.violations
        assert asyncio.run(self.world.reconcile()) == 0, "not idle"
        spec = self._fleet()
        if self.good:
            self._check_ended(spec)
        elif self.world.body(FLEETS, "chat")["status"]["revision"].get("serving"):
            ready = self.world.body(FLEETS, "chat")["status"]["decode"]["readyReplicas"]
            floor = spec["decode"]["replicas"] - spec["rollout"]["maxUnavailable"]
            assert ready >= floor, "a bad revision took capacity"

    def _check_ended(self, spec: Body) -> None:
        assert self.world.condition("Ready").status == "True", self.world.condition("Ready")
        revisions = set()
        for role in ("prefill", "decode"):
            pods = self.world.pods(f"chat-{role}")
            assert len(pods) == spec.get(role, {"replicas": 0})["replicas"]
            revisions |= set(pods.values())
        assert len(revisions) == 1

    def teardown(self) -> None:
        if (FLEETS, NAMESPACE, "chat") in self.world.kube.objects:
            self.comes_to_rest()


TestFaults = Faults.TestCase
TestFaults.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
