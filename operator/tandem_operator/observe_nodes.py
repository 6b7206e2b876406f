"""From caches to the snapshot that the plan for the nodes is made of.

Nodes come from the watch, never live: all nodes of a cluster are much to read. What is written to
one is written to the version that was seen, and pods are named by uid.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from tandem_operator.facts import Facts
from tandem_operator.kube.client import Kube
from tandem_operator.names import LABEL_NAME, MANAGED_BY
from tandem_operator.plan.nodes.repair import IN_REPAIR
from tandem_operator.plan.nodes.view import (
    NodesSnapshot,
    NodeView,
    PlacedPod,
    PolicyView,
    node_view,
    placed_pods,
    policy_view,
)
from tandem_operator.readers import CLUSTER, Reader, StateSource, parsed
from tandem_operator.resources import NODE_HEALTH_POLICIES, NODES, PODS


class NodeObserver:
    """Makes snapshots of all nodes."""

    def __init__(
        self,
        cached: Reader,
        live: Reader,
        namespaces: Callable[[], Iterable[str]],
        pods: StateSource,
        kube: Kube,
        facts: Facts,
        now_s: Callable[[], float],
        *,
        may_write: bool,
    ) -> None:
        """`namespaces` are those with pods of ours."""
        self._cached = cached
        self._live = live
        self._namespaces = namespaces
        self._pods = pods
        self._kube = kube
        self._facts = facts
        self._now_s = now_s
        self._may_write = may_write

    async def nodes(self, *, live: bool) -> NodesSnapshot:
        """All nodes; `live` reads the policy from the API server."""
        reader = self._live if live else self._cached
        policies = parsed(policy_view, await reader.list(NODE_HEALTH_POLICIES, CLUSTER, {}))
        policy = next(iter(policies), None)
        nodes = parsed(node_view, await self._cached.list(NODES, CLUSTER, {}))
        lists = await asyncio.gather(
            *(self._cached.list(PODS, namespace, {}) for namespace in self._namespaces())
        )
        pods = placed_pods(body for bodies in lists for body in bodies)
        self._facts.keep_refusals({pod.uid for pod in pods})
        silent = _perhaps_dead(policy, nodes)
        return NodesSnapshot(
            now_s=self._now_s(),
            policy=policy,
            nodes=nodes,
            pods=pods,
            may_write=self._may_write,
            answered=await self._answered([pod for pod in pods if pod.node in silent]),
            strangers=await self._strangers(policy, silent),
            refusals=self._facts.eviction_refusals,
            xids=self._facts.xids,
            reports=self._facts.reports,
            stragglers=self._facts.stragglers,
            suspected=self._facts.suspected,
        )

    async def _answered(self, pods: Sequence[PlacedPod]) -> frozenset[str]:
        """Those that answer, whatever they say."""

        async def ask(pod: PlacedPod) -> str | None:
            try:
                await self._pods.state(pod.ip or "")
            except OSError:
                return None
            return pod.uid

        answers = await asyncio.gather(*(ask(pod) for pod in pods if pod.runtime and pod.ip))
        return frozenset(uid for uid in answers if uid is not None)

    async def _strangers(self, policy: PolicyView | None, silent: Iterable[str]) -> dict[str, int]:
        if policy is None or policy.spec.dead_nodes.action != "OutOfService":
            return {}
        ours = {LABEL_NAME: MANAGED_BY}
        return {node: await self._kube.count_pods(node, ours) for node in sorted(silent)}


def _perhaps_dead(policy: PolicyView | None, nodes: Iterable[NodeView]) -> set[str]:
    """Silent nodes in repair, where the policy gives dead ones up."""
    if policy is None or policy.spec.dead_nodes.action == "Wait":
        return set()
    in_repair = {entry.name for entry in policy.status.nodes if entry.phase in IN_REPAIR}
    return {node.name for node in nodes if node.silent and node.name in in_repair}
