"""From caches (or the API itself) to the snapshots that plans are made of."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping

from tandem_runtime.contract import (
    COMPONENT_GATEWAY,
    COMPONENT_RESOLVER,
    COMPONENT_RUNTIME,
    GATEWAY_NAME,
    LABEL_COMPONENT,
    LABEL_FLEET,
    LABEL_MODEL,
)
from tandem_runtime.protocol import ContextState, PodState

from tandem_operator.facts import Facts
from tandem_operator.keys import Key
from tandem_operator.plan.context import (
    CachedContextView,
    ContextSnapshot,
    cached_context_view,
    source_uri,
)
from tandem_operator.plan.drain import pods_to_ask
from tandem_operator.plan.gateway import GatewayPod, GatewaySnapshot, gateway_pods
from tandem_operator.plan.model import ModelSnapshot
from tandem_operator.plan.nodes.repair import Repair, repair_of
from tandem_operator.plan.nodes.view import policy_view
from tandem_operator.plan.pools import wanted_sizes
from tandem_operator.plan.resolver import resolver_view
from tandem_operator.plan.views import (
    FleetSnapshot,
    PodView,
    drained_nodes,
    fleet_view,
    gateway_view,
    model_view,
    pod_view,
    pool_view,
    revision_view,
)
from tandem_operator.readers import (
    CLUSTER,
    Body,
    Labels,
    LiveSource,
    Reader,
    StateSource,
    parsed,
)
from tandem_operator.resources import (
    BUDGETS,
    CACHED_CONTEXTS,
    CONFIG_MAPS,
    DEPLOYMENTS,
    FLEETS,
    MODELS,
    NODE_HEALTH_POLICIES,
    NODES,
    PODS,
    POOLS,
    REVISIONS,
    ROLE_BINDINGS,
    SERVICE_ACCOUNTS,
    SERVICES,
    Resource,
)

log = logging.getLogger(__name__)

VOLUMES_PATIENCE_S = 30.0
_ANY: Labels = {}


class Observer:
    """Makes snapshots."""

    def __init__(
        self,
        cached: Reader,
        live: LiveSource,
        pods: StateSource,
        facts: Facts,
        now_s: Callable[[], float],
        drain_taints: Collection[str] = (),
    ) -> None:
        self._drain_taints = drain_taints
        self._cached = cached
        self._live = live
        self._pods = pods
        self._facts = facts
        self._now_s = now_s

    async def _lists(
        self, live: bool, namespace: str, wanted: Mapping[Resource, Labels]
    ) -> dict[Resource, list[Body]]:
        reader = self._live if live else self._cached
        found = await asyncio.gather(*(reader.list(r, namespace, wanted[r]) for r in wanted))
        return dict(zip(wanted, found, strict=True))

    async def fleet(self, key: Key, *, live: bool) -> FleetSnapshot:
        """Everything about one fleet; `live` reads from the API server."""
        own: Labels = {LABEL_FLEET: key.name}
        wanted = dict.fromkeys((FLEETS, MODELS, DEPLOYMENTS, SERVICES), _ANY)
        # Not the whole namespace's: a live read of a thousand pods for each fleet is quadratic.
        wanted |= dict.fromkeys((POOLS, REVISIONS, BUDGETS), own)
        wanted |= {PODS: {**own, LABEL_COMPONENT: COMPONENT_RUNTIME}}
        found = await self._lists(live, key.namespace, wanted)
        fleets = parsed(fleet_view, found[FLEETS])
        models = parsed(model_view, found[MODELS])
        fleet = next((f for f in fleets if f.name == key.name), None)
        if fleet is None:
            self._facts.forget_fleet(key.namespace, key.name)
        pods = parsed(pod_view, found[PODS])
        pools = parsed(pool_view, found[POOLS])
        now_s = self._now_s()
        policies = await self._lists(live, CLUSTER, {NODE_HEALTH_POLICIES: _ANY})
        model = fleet.spec.model_ref.name if fleet else ""
        scaled = self._facts.scaled(key.namespace, key.name)
        asked = pods_to_ask(pods, wanted_sizes(fleet, pools, scaled))
        # Never live: all nodes of a cluster are much to read, and a taint is only a beginning.
        nodes = await self._cached.list(NODES, CLUSTER, _ANY)
        return FleetSnapshot(
            namespace=key.namespace,
            name=key.name,
            now_s=now_s,
            fleet=fleet,
            model=next((m for m in models if m.name == model), None),
            fleets=fleets,
            models=models,
            pools=pools,
            pods=pods,
            revisions=parsed(revision_view, found[REVISIONS]),
            budgets={b["metadata"]["name"]: b for b in found[BUDGETS]},
            gateway=gateway_view(
                key.namespace, _named(found[DEPLOYMENTS]), _named(found[SERVICES])
            ),
            states=await self._states(asked),
            checks=self._facts.checks(key.namespace, now_s),
            latency=self._facts.latency(key.namespace, key.name),
            scaled=scaled,
            refused=self._facts.refusal(key),
            drained_nodes=drained_nodes(nodes, self._drain_taints),
            gone_nodes=await self._gone(nodes, pods),
            repair=_repair(policies[NODE_HEALTH_POLICIES]),
        )

    async def _gone(self, nodes: Iterable[Body], pods: Iterable[PodView]) -> frozenset[str]:
        """Nodes of these pods that are no more. One that the watch does not show is asked for: it
        may be new, and the watch of pods ahead."""
        seen = {str(node["metadata"]["name"]) for node in nodes}
        missing = sorted({pod.node for pod in pods if pod.node} - seen) if seen else []
        found = await asyncio.gather(*(self._live.get(NODES, CLUSTER, n) for n in missing))
        return frozenset(n for n, body in zip(missing, found, strict=True) if body is None)

    async def _states(self, pods: list[PodView]) -> dict[str, PodState]:
        """What pods answer; a silent one is left out."""

        async def ask(pod: PodView) -> tuple[str, PodState | None]:
            try:
                return pod.uid, await self._pods.state(pod.ip or "")
            except OSError as error:
                log.info("pod %s does not answer: %s", pod.name, error)
                return pod.uid, None

        answers = await asyncio.gather(*(ask(pod) for pod in pods))
        return {uid: state for uid, state in answers if state is not None}

    async def model(self, key: Key, *, live: bool) -> ModelSnapshot:
        """Everything about one Model."""
        labels = {LABEL_COMPONENT: COMPONENT_RESOLVER, LABEL_MODEL: key.name}
        found = await self._lists(live, key.namespace, {MODELS: {}, PODS: labels})
        models = parsed(model_view, found[MODELS])
        return ModelSnapshot(
            now_s=self._now_s(),
            model=next((m for m in models if m.name == key.name), None),
            resolvers=parsed(resolver_view, found[PODS]),
            refused=self._facts.refusal(key),
        )

    async def context(self, key: Key, *, live: bool) -> ContextSnapshot:
        """Everything about one CachedContext."""
        wanted = dict.fromkeys((CACHED_CONTEXTS, FLEETS, MODELS), _ANY)
        wanted |= {PODS: {LABEL_COMPONENT: COMPONENT_GATEWAY}}
        found = await self._lists(live, key.namespace, wanted)
        contexts = parsed(cached_context_view, found[CACHED_CONTEXTS])
        context = next((c for c in contexts if c.name == key.name), None)
        content, trouble = (None, "") if context is None else await self._content(context)
        return ContextSnapshot(
            now_s=self._now_s(),
            name=key.name,
            context=context,
            fleets=parsed(fleet_view, found[FLEETS]),
            models=parsed(model_view, found[MODELS]),
            content=content,
            trouble=trouble,
            states=await self._context_states(key.name, gateway_pods(found[PODS])),
        )

    async def _content(self, context: CachedContextView) -> tuple[str | None, str]:
        """The text; else why there is none. Only a ConfigMap that an object names is ever read."""
        wanted = context.spec.config_map
        if source_uri(context.spec):
            return "", ""
        if wanted is None:
            return context.spec.text, "it has no text"
        body = await self._live.get(CONFIG_MAPS, context.namespace, wanted.name)
        if body is None:
            return None, f"there is no ConfigMap '{wanted.name}' in this namespace"
        text = (body.get("data") or {}).get(wanted.key)
        return text, f"the ConfigMap '{wanted.name}' has no text under the key '{wanted.key}'"

    async def _context_states(
        self, name: str, gateways: Iterable[GatewayPod]
    ) -> dict[GatewayPod, ContextState | None]:
        """What gateways know of a context; a silent one is left out."""

        async def ask(pod: GatewayPod) -> tuple[GatewayPod, ContextState | None] | None:
            try:
                return pod, await self._pods.context(pod.host, pod.uid, name)
            except OSError as error:
                log.info("gateway %s does not answer: %s", pod.name, error)
                return None

        answers = await asyncio.gather(*(ask(pod) for pod in gateways))
        return dict(answer for answer in answers if answer is not None)

    async def gateway(self, key: Key, *, live: bool) -> GatewaySnapshot:
        """Everything about one namespace's gateway."""
        kinds = (SERVICE_ACCOUNTS, ROLE_BINDINGS, DEPLOYMENTS, SERVICES, BUDGETS)
        everything = dict.fromkeys((FLEETS, PODS, *kinds), _ANY)
        found = await self._lists(live, key.namespace, everything)
        objects = {kind.kind: _named(found[kind]) for kind in kinds}
        fleets = parsed(fleet_view, found[FLEETS])
        if not fleets:
            self._facts.forget_namespace(key.namespace)
        now_s = self._now_s()
        waiting = [p for p in found[PODS] if _waits_for_volumes(p)]
        late = [p for p in parsed(pod_view, waiting) if now_s - p.created_s > VOLUMES_PATIENCE_S]
        return GatewaySnapshot(
            namespace=key.namespace,
            now_s=now_s,
            fleets=fleets,
            live={kind: body for kind, body in objects.items() if body is not None},
            secret_ensured_s=self._facts.secret_ensured_s(key.namespace),
            secret_missing=bool(late),
        )


def _repair(policies: Iterable[Body]) -> Repair:
    found = parsed(policy_view, policies)
    return repair_of(found[0].spec, found[0].status) if found else Repair()


def _waits_for_volumes(pod: Body) -> bool:
    """A pod that has a node and none of its containers has been made yet."""
    status = pod.get("status") or {}
    containers = status.get("containerStatuses", ())
    waiting = [((c.get("state") or {}).get("waiting") or {}).get("reason") for c in containers]
    component = (pod["metadata"].get("labels") or {}).get(LABEL_COMPONENT)
    return (
        component in (COMPONENT_RUNTIME, COMPONENT_GATEWAY)
        and bool((pod.get("spec") or {}).get("nodeName"))
        and (not containers or "ContainerCreating" in waiting)
    )


def _named(bodies: Iterable[Body]) -> Body | None:
    return next((b for b in bodies if b["metadata"]["name"] == GATEWAY_NAME), None)
