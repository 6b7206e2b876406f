"""Looks at the load of autoscaled fleets and decides their pools' sizes.

Only decides: what was decided is a fact of the fleet's next snapshot, and its plan writes it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from tandem_runtime.contract import COMPONENT_RUNTIME, LABEL_COMPONENT, LABEL_FLEET
from tandem_runtime.protocol import GatewayState, PodState, Wakeable

from tandem_operator.facts import Facts
from tandem_operator.keys import Key
from tandem_operator.metrics import Metrics
from tandem_operator.names import Reason
from tandem_operator.plan.autoscale import Group, Trouble, scalings, wakeable
from tandem_operator.plan.promql import PromqlRefused
from tandem_operator.plan.queries import Answer, queries, with_answers
from tandem_operator.plan.scaled import Scaled, settle, troubled
from tandem_operator.plan.scaling.decision import Decision
from tandem_operator.plan.scaling.record import Look, adopted, line, state_of
from tandem_operator.plan.scaling.state import ScalingState
from tandem_operator.plan.scaling.window import PoolWindow
from tandem_operator.plan.signals import (
    Doorstep,
    Seen,
    doorstep,
    knocked,
    pods_to_measure,
    window_of,
)
from tandem_operator.plan.views import (
    FleetView,
    PodView,
    PoolView,
    fleet_view,
    pod_view,
    pool_view,
    scaling_policy_view,
)
from tandem_operator.readers import Body, Reader, parsed
from tandem_operator.resources import FLEETS, PODS, POOLS, SCALING_POLICIES
from tandem_operator.scrape import gateways

log = logging.getLogger(__name__)
decisions = logging.getLogger("tandem_operator.decisions")


class DataPlane(Protocol):
    """Asks pods and gateways."""

    async def state(self, host: str) -> PodState:
        """Raises OSError when the pod does not answer."""

    async def gateway(self, host: str) -> GatewayState:
        """Raises OSError when it does not answer."""

    async def wakeable(self, host: str, uid: str, told: Wakeable) -> GatewayState:
        """Raises OSError when it does not answer."""


class Queries(Protocol):
    """A Prometheus."""

    async def ask(self, query: str) -> Answer:
        """Raises nothing: that it does not answer is an answer."""


class Autoscaler:
    """Decides for one fleet at a time; remembers what it saw last."""

    def __init__(
        self,
        reader: Reader,
        data_plane: DataPlane,
        facts: Facts,
        metrics: Metrics,
        now_s: Callable[[], float],
        prometheus: Queries | None = None,
    ) -> None:
        self._reader = reader
        self._prometheus = prometheus
        self._data_plane = data_plane
        self._facts = facts
        self._metrics = metrics
        self._now_s = now_s
        self._seen: dict[str, Seen] = {}
        """By pool uid."""
        self._logged: dict[str, tuple[int, str]] = {}
        """The last decision in the log, by pool uid."""
        self._untold: set[str] = set()
        """Namespaces whose gateways all know that no fleet is woken: not so after a restart, since
        an operator before this one may have told them of some."""
        self.asleep: set[str] = set()
        """Namespaces with a pool at zero: a request there is not to wait for the next look."""
        self._names: dict[tuple[str, str], str] = {}
        """Pool uids by namespace and name."""

    @property
    def known(self) -> set[str]:
        """Namespaces with pools of which something is remembered; maybe none is left there."""
        return {namespace for namespace, _ in self._names}

    async def look_at(self, namespaces: Iterable[str]) -> AsyncIterator[list[Key]]:
        """`look`, at all of them at the same time: pods that are silent do not add up."""
        for looked in asyncio.as_completed([self.look(namespace) for namespace in namespaces]):
            yield await looked

    async def look(self, namespace: str) -> list[Key]:
        """Decide for all autoscaled fleets of a namespace; those whose plan has to run."""
        fleets = parsed(fleet_view, await self._reader.list(FLEETS, namespace, {}))
        scaling = [fleet for fleet in fleets if _scales(fleet) and not fleet.deleting]
        self._facts.keep_scaled(namespace, {fleet.name for fleet in scaling})
        if not scaling:
            self._forget(namespace, set())
            self.asleep.discard(namespace)
            if namespace not in self._untold:
                await self._gateways(namespace, await self._reader.list(PODS, namespace, {}), ())
            return []
        pods = await self._reader.list(PODS, namespace, {})
        states = await self._gateways(namespace, pods, scaling)
        news = await asyncio.gather(*(self._fleet_alone(fleet, pods, states) for fleet in scaling))
        keys = [
            Key("InferenceFleet", namespace, fleet.name)
            for fleet, changed in zip(scaling, news, strict=True)
            if changed
        ]
        self._forget(namespace, set(self._facts.scaled_pools(namespace)))
        decided = [self._facts.scaled(namespace, fleet.name).values() for fleet in scaling]
        sleeps = any(scaled.size == 0 for found in decided for scaled in found)
        (self.asleep.add if sleeps else self.asleep.discard)(namespace)
        return keys

    def _forget(self, namespace: str, pools: set[str]) -> None:
        """Drop what is remembered of pools of the namespace that are not autoscaled any more."""
        for where, name in [key for key in self._names if key[0] == namespace]:
            if name not in pools:
                self._forget_pool(self._names.pop((where, name)))
                self._metrics.forget_scaling(namespace, name)

    def _forget_pool(self, uid: str) -> None:
        self._seen.pop(uid, None)
        self._logged.pop(uid, None)

    async def _gateways(
        self, namespace: str, pods: Sequence[Body], fleets: Sequence[FleetView]
    ) -> list[GatewayState]:
        """Tell the gateways which fleets are woken, and ask them what waits."""
        names = wakeable(
            fleets, {fleet.name: self._facts.scaled(namespace, fleet.name) for fleet in fleets}
        )
        if names:
            self._untold.discard(namespace)
        tell, refused = namespace not in self._untold, False

        async def ask(host: str, uid: str) -> GatewayState | None:
            nonlocal refused
            if tell:
                try:
                    return await self._data_plane.wakeable(host, uid, Wakeable(names))
                except OSError as error:
                    refused = True
                    # One of an older version still says what it measured.
                    log.info("gateway wakes nobody: %s", error)
            try:
                return await self._data_plane.gateway(host)
            except OSError as error:
                log.info("gateway does not answer: %s", error)
                return None

        found = await asyncio.gather(*(ask(*item) for item in sorted(gateways(pods).items())))
        if not names and not refused:
            self._untold.add(namespace)
        return [state for state in found if state is not None]

    async def _fleet_alone(
        self, fleet: FleetView, pod_bodies: Sequence[Body], states: Sequence[GatewayState]
    ) -> bool:
        """One that cannot be decided on keeps its sizes, and ends nothing for the others."""
        try:
            return await self._fleet(fleet, pod_bodies, doorstep(states, fleet.name))
        except Exception:
            log.exception("fleet %s/%s is not scaled", fleet.namespace, fleet.name)
            return False

    async def _fleet(self, fleet: FleetView, pod_bodies: Sequence[Body], door: Doorstep) -> bool:
        """Decide for one fleet; whether its plan has to run."""
        pods = parsed(pod_view, [b for b in pod_bodies if _runs(fleet, b)])
        bodies = await self._reader.list(POOLS, fleet.namespace, {LABEL_FLEET: fleet.name})
        pools = [
            p for p in parsed(pool_view, bodies) if p.owner_uid == fleet.uid and not p.deleting
        ]
        policies = parsed(
            scaling_policy_view, await self._reader.list(SCALING_POLICIES, fleet.namespace, {})
        )
        wanted = scalings(fleet, pools, policies, prometheus=self._prometheus is not None)
        before = self._before(fleet, pools)
        found: dict[str, Scaled] = {
            pool.name: troubled(before.get(pool.name), pool, wanted.troubles[pool.name])
            for pool in pools
            if pool.name in wanted.troubles
        }
        for group in wanted.groups:
            found |= await self._group(fleet, group, pods, door, before)
        return self._facts.learn_scaled(fleet.namespace, fleet.name, found)

    def _before(self, fleet: FleetView, pools: Sequence[PoolView]) -> dict[str, Scaled]:
        """The last decisions for these very pools: not for one that had the name of one of them."""
        uids = {pool.name: pool.uid for pool in pools}
        return {
            name: scaled
            for name, scaled in self._facts.scaled(fleet.namespace, fleet.name).items()
            if self._names.get((fleet.namespace, name), uids.get(name)) == uids.get(name)
        }

    async def _group(
        self,
        fleet: FleetView,
        group: Group,
        pods: Sequence[PodView],
        door: Doorstep,
        before: Mapping[str, Scaled],
    ) -> dict[str, Scaled]:
        measured = [p for m in group.pools.values() for p in pods_to_measure(pods, m.pool.uid)]
        states = await self._states(measured)
        now_s = self._now_s()
        windows: dict[str, PoolWindow] = {}
        for name, policy in group.pools.items():
            past = self._seen.get(policy.pool.uid)
            window, seen = window_of(policy, pods, states, door.latency, past, now_s)
            windows[name] = knocked(window, policy, door)
            self._seen[policy.pool.uid] = seen
            former = self._names.get((fleet.namespace, name))
            if former is not None and former != policy.pool.uid:
                self._forget_pool(former)
            self._names[fleet.namespace, name] = policy.pool.uid
        unknown = await self._answers(fleet, group, windows)
        laws = {name: policy.law for name, policy in group.pools.items()}
        remembered = {
            name: _state(before.get(name), policy.pool, now_s)
            for name, policy in group.pools.items()
        }
        look = Look(now_s, laws, remembered, windows, group.budget_gpus)
        decided = look.decide()
        self._account(fleet, group, look, decided)
        return {
            name: settle(
                before.get(name),
                policy.pool,
                decided[name],
                now_s,
                shadow=policy.shadow,
                unknown=unknown.get(name),
            )
            for name, policy in group.pools.items()
        }

    async def _answers(
        self, fleet: FleetView, group: Group, windows: dict[str, PoolWindow]
    ) -> dict[str, Trouble]:
        """Put Prometheus' numbers into the windows, if there is one; what is wrong with them."""
        troubles: dict[str, Trouble] = {}
        if self._prometheus is None:
            return troubles
        for name, policy in group.pools.items():
            if not windows[name].ready:
                continue  # No pod has metrics.
            try:
                wanted = queries(policy, fleet.name)
            except PromqlRefused as error:
                sentence = f"{error}; Pool {name} keeps its size"
                troubles[name] = Trouble(Reason.QUERY_REFUSED, sentence)
                windows[name] = replace(windows[name], load=None)
                continue
            found = await asyncio.gather(*(self._prometheus.ask(q) for q in wanted.values()))
            answers = dict(zip(wanted, found, strict=True))
            windows[name], trouble = with_answers(windows[name], name, answers)
            if trouble is not None:
                troubles[name] = trouble
        return troubles

    async def _states(self, pods: Sequence[PodView]) -> dict[str, PodState]:
        """What pods say; a silent one is left out."""

        async def ask(pod: PodView) -> tuple[str, PodState | None]:
            try:
                return pod.uid, await self._data_plane.state(pod.ip or "")
            except OSError as error:
                log.info("pod %s does not say how much work it has: %s", pod.name, error)
                return pod.uid, None

        answers = await asyncio.gather(*(ask(pod) for pod in pods))
        return {uid: state for uid, state in answers if state is not None}

    def _account(
        self, fleet: FleetView, group: Group, look: Look, decided: Mapping[str, Decision]
    ) -> None:
        """The decision log, where a decision is another one than before, and the metric."""
        news = False
        for name, policy in group.pools.items():
            decision = decided[name]
            said = (decision.target, decision.reason.value)
            news = news or self._logged.get(policy.pool.uid) != said
            self._logged[policy.pool.uid] = said
            self._metrics.scaling_decision(
                fleet.namespace, name, decision.reason.value, decision.target
            )
        if news:
            decisions.info("%s", line(f"{fleet.namespace}/{fleet.name}", look, decided))


def _state(before: Scaled | None, pool: PoolView, now_s: float) -> ScalingState:
    """What the law remembers: from the look before, or after a restart from the status."""
    if before is not None and before.decision is not None:
        return before.decision.state
    status = pool.status.scaling
    return adopted(state_of(status.state if status else None), now_s)


def _scales(fleet: FleetView) -> bool:
    templates = (fleet.spec.prefill, fleet.spec.decode)
    return any(template is not None and template.scaling is not None for template in templates)


def _runs(fleet: FleetView, body: Body) -> bool:
    """Whether a pod is one of the fleet's runtime pods."""
    labels = body["metadata"].get("labels") or {}
    own = {LABEL_COMPONENT: COMPONENT_RUNTIME, LABEL_FLEET: fleet.name}
    return own.items() <= labels.items()
