"""Looks at what pods and nodes say of their devices and their speed, once a window.

Only looks: what was seen is a fact of the next snapshot of the nodes. A restart forgets it, and the
windows begin anew; what a policy's status says of a node does not depend on it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from tandem_runtime.contract import ANNOTATION_XID_COUNTS
from tandem_runtime.device_report import ProbeSums
from tandem_runtime.protocol import PodState, PodWork

from tandem_operator.api.node_health import Signals, Stragglers
from tandem_operator.facts import Facts
from tandem_operator.plan.nodes.counts import (
    Counts,
    joined,
    parse_counts,
    reported_counts,
    rises,
)
from tandem_operator.plan.nodes.device import probed_since
from tandem_operator.plan.nodes.stragglers import (
    Measured,
    Memory,
    observe,
    stragglers,
    suspected,
)
from tandem_operator.plan.nodes.view import NodeView, PolicyView, node_view, policy_view
from tandem_operator.plan.signals import work_since
from tandem_operator.plan.views import PodView, pod_view
from tandem_operator.readers import CLUSTER, Reader, StateSource, parsed
from tandem_operator.resources import NODE_HEALTH_POLICIES, NODES, PODS

log = logging.getLogger(__name__)
USUAL_WINDOW_S = 15.0
NO_PROBES = ProbeSums()


class NodeWatch:
    """Remembers what it saw last."""

    def __init__(
        self,
        reader: Reader,
        namespaces: Callable[[], Iterable[str]],
        pods: StateSource,
        facts: Facts,
        now_s: Callable[[], float],
    ) -> None:
        self._reader = reader
        self._namespaces = namespaces
        self._pods = pods
        self._facts = facts
        self._now_s = now_s
        self._counts: dict[str, Counts] = {}
        """By uid of a node or a pod."""
        self._works: dict[str, PodWork] = {}
        self._probes: dict[str, ProbeSums] = {}
        self._memory: Memory = {}

    async def look(self) -> float:
        """One window; how long the next one is. Nothing is asked without a policy that wants it."""
        policies = parsed(policy_view, await self._reader.list(NODE_HEALTH_POLICIES, CLUSTER, {}))
        signals = _wanted(policies)
        if signals is None:
            self._forget()
            return USUAL_WINDOW_S
        nodes = parsed(node_view, await self._reader.list(NODES, CLUSTER, {}))
        pods = await self._serving()
        states = await self._states(pods)
        self._look_at_counts(signals, nodes, pods, states)
        self._facts.reports = {
            uid: state.device.failing
            for uid, state in states.items()
            if signals.reports and state.device and state.device.failing
        }
        self._compare(signals.stragglers, pods, states)
        return float(signals.stragglers.window_seconds if signals.stragglers else USUAL_WINDOW_S)

    def _forget(self) -> None:
        self._counts, self._works, self._probes, self._memory = {}, {}, {}, {}
        self._facts.xids, self._facts.reports = {}, {}
        self._facts.stragglers, self._facts.suspected = (), {}

    async def _serving(self) -> list[PodView]:
        lists = await asyncio.gather(
            *(self._reader.list(PODS, namespace, {}) for namespace in self._namespaces())
        )
        pods = parsed(pod_view, [body for bodies in lists for body in bodies])
        return [p for p in pods if p.fleet and p.ready and p.ip and p.node and not p.terminating]

    async def _states(self, pods: Sequence[PodView]) -> dict[str, PodState]:
        """What pods say; a silent one is left out."""

        async def ask(pod: PodView) -> tuple[str, PodState | None]:
            try:
                return pod.uid, await self._pods.state(pod.ip or "")
            except OSError as error:
                log.info("pod %s does not say how it is: %s", pod.name, error)
                return pod.uid, None

        answers = await asyncio.gather(*(ask(pod) for pod in pods))
        return {uid: state for uid, state in answers if state is not None}

    def _look_at_counts(
        self,
        signals: Signals,
        nodes: Iterable[NodeView],
        pods: Iterable[PodView],
        states: Mapping[str, PodState],
    ) -> None:
        """When counts of error codes rose, by node: as the node is annotated, as pods report."""
        if signals.xids is None:
            self._counts, self._facts.xids = {}, {}
            return
        now_s = self._now_s()
        since_s = now_s - signals.xids.within_seconds
        sources = [
            (node.name, node.uid, parse_counts(node.annotations.get(ANNOTATION_XID_COUNTS)))
            for node in nodes
        ]
        sources += [
            (pod.node or "", pod.uid, reported_counts(device.xids))
            for pod in pods
            if (state := states.get(pod.uid)) and (device := state.device)
        ]
        found = {node: joined(old, {}, since_s) for node, old in self._facts.xids.items()}
        for node, uid, counts in sources:
            new = rises(self._counts.get(uid), counts, now_s)
            if new:
                found[node] = joined(found.get(node, {}), new, since_s)
        self._counts = {uid: counts for _, uid, counts in sources}
        self._facts.xids = {node: times for node, times in found.items() if times}

    def _compare(
        self,
        wanted: Stragglers | None,
        pods: Sequence[PodView],
        states: Mapping[str, PodState],
    ) -> None:
        works = {uid: work for uid, state in states.items() if (work := state.work)}
        former, self._works = self._works, works
        probes = {uid: device.probes for uid, state in states.items() if (device := state.device)}
        probed, self._probes = self._probes, probes
        if wanted is None:
            self._memory, self._facts.stragglers, self._facts.suspected = {}, (), {}
            return
        measured = {
            pod.uid: Measured(
                pod.uid,
                pod.name,
                pod.node or "",
                f"{pod.pool_uid}/{pod.revision}",
                work_since(works[pod.uid], former[pod.uid]),
                float(works[pod.uid].kv_tokens),
                probed_since(probes.get(pod.uid, NO_PROBES), probed.get(pod.uid, NO_PROBES)),
            )
            for pod in pods
            if pod.uid in works and pod.uid in former and not pod.draining
        }
        self._memory = observe(self._memory, measured.values(), wanted.windows)
        found = stragglers(self._memory, measured, wanted.percent, wanted.windows)
        self._facts.stragglers = found
        self._facts.suspected = suspected(self._memory, wanted.percent, wanted.windows)


def _wanted(policies: Sequence[PolicyView]) -> Signals | None:
    """The signals of a policy that needs pods to be asked."""
    if not policies or policies[0].spec.mode == "Off":
        return None
    signals = policies[0].spec.signals
    return signals if signals.xids or signals.reports or signals.stragglers else None
