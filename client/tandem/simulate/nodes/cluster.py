"""A cluster whose nodes fail: the operator's plan for nodes, carried out in simulated time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from heapq import heappop, heappush
from random import Random
from typing import Any

from tandem_operator.api.node_health import NodeHealthPolicyStatus
from tandem_operator.plan.actions import Delete, Evict, Notify, PatchNode, WriteStatus
from tandem_operator.plan.nodes.plan import plan_nodes
from tandem_operator.plan.nodes.repair import IN_REPAIR, Repair, repair_of
from tandem_operator.plan.nodes.view import (
    NodesSnapshot,
    NodeView,
    PlacedPod,
    PolicyView,
    Straggler,
)

from tandem.simulate.nodes.failures import Failure, Kind
from tandem.simulate.nodes.flow import Flow, Pace
from tandem.simulate.nodes.pods import Pool, emptiest
from tandem.simulate.nodes.state import (
    CONDITION,
    EPOCH_S,
    EVICTED_AFTER_S,
    LEAVE_S,
    SILENT_AFTER_S,
    UNNOTICED_S,
    ClusterSpec,
    Counts,
    Node,
    healthy,
    patched,
)
from tandem.simulate.nodes.watch import Watch


class Cluster:
    """Nodes, pods, faults, and whoever repairs them."""

    def __init__(self, spec: ClusterSpec, pace: Pace, failures: list[Failure]) -> None:
        self.spec = spec
        self.counts = Counts()
        self.now_s = 0.0
        self.status = NodeHealthPolicyStatus()
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        self._failures = failures
        self._names = names = [f"node-{i:05d}" for i in range(spec.nodes)]
        self._nodes = {n: Node(n, i // spec.rack_nodes, healthy(n)) for i, n in enumerate(names)}
        self._views = {name: node.view for name, node in self._nodes.items()}
        self._racks = {name: node.rack for name, node in self._nodes.items()}
        self._on: dict[str, dict[str, Pool]] = {name: {} for name in names}  # Pods by node.
        self._placed: dict[str, PlacedPod] = {}
        self._free = dict.fromkeys(names)
        """Nodes without pods, in the order in which they became so."""
        self._waiting: dict[str, Pool] = {}
        """Pods without a node."""
        self._refusals: dict[str, str] = {}
        self._found: dict[str, Straggler] = {}
        self._look_at_s: float | None = None
        self._looked_s = -spec.look_every_s
        self._repair = Repair()
        self._watch = Watch(pace, spec.policy, Random(spec.seed + 1))
        self.pools = self._make_pools(pace)

    def _make_pools(self, pace: Pace) -> list[Pool]:
        """Pods of a pool are as many nodes apart as there are pools: over all racks."""
        spec = self.spec
        count = max((spec.nodes - spec.spare_nodes) // spec.pool_pods, 1)
        size = min(spec.pool_pods, spec.nodes - spec.spare_nodes)
        pools = [Pool(f"pool-{i:04d}", size, Flow(pace)) for i in range(count)]
        for index in range(count * size):
            pool = pools[index % count]
            self._bind(pool, pool.make(8).uid, self._names[index])
        for pool in pools:
            for uid in list(pool.pods):
                self._placed[uid] = pool.change(uid, ready=True)
                pool.serve(uid, 1.0, 0.0)
            pool.course.clear()
            pool.fewest, pool.under_since_s = size, None
        return pools

    # -- time --------------------------------------------------------------------------------------

    def run(self, duration_s: float) -> None:
        for failure in self._failures:
            self._at(failure.at_s, self._fail, failure)
        self._at(duration_s, lambda: None)
        self._dirty()
        while self._events and self._events[0][0] <= duration_s:
            at_s, _, act, of = heappop(self._events)
            self._account(at_s - self.now_s)
            self.now_s = at_s
            act(*of)
        for pool in self.pools:
            pool.end(duration_s)

    def _account(self, seconds: float) -> None:
        for entry in self.status.nodes:
            self.counts.in_repair_s += seconds * (entry.phase in IN_REPAIR)
            self.counts.held_s += seconds * (entry.phase == "Held")

    def _at(self, at_s: float, act: Callable[..., None], *of: Any) -> None:
        self._sequence += 1
        heappush(self._events, (at_s, self._sequence, act, of))

    def _in(self, seconds: float, act: Callable[..., None], *of: Any) -> None:
        self._at(self.now_s + seconds, act, *of)

    # -- faults ------------------------------------------------------------------------------------

    def _fail(self, failure: Failure) -> None:
        node = self._nodes[self._names[failure.node]]
        if failure.kind is Kind.RACK:
            hit = [n for n in self._nodes.values() if n.rack == node.rack and not n.failure]
        else:
            hit = [] if node.failure else [node]
        self.counts.failures[failure.kind] += bool(hit)
        self.counts.already_failing += not hit
        for each in hit:
            each.failure = failure
            self._break(each, failure)

    def _break(self, node: Node, failure: Failure) -> None:
        match failure.kind:
            case Kind.DEGRADES:
                self._condition(node, CONDITION, "True")
                self._in(failure.warning_s, self._die, node, failure)
            case Kind.STRAGGLES:
                self._pace_of(node, failure.factor)
                self._in(UNNOTICED_S, self._mend, node, failure)
            case Kind.FLAPS:
                for after_s, length_s in failure.silences_s:
                    self._in(after_s, self._condition, node, "Ready", "False")
                    self._in(after_s + length_s, self._condition, node, "Ready", "True")
                self._in(failure.silences_s[-1][0] + 60.0, self._mend, node, failure)
            case _:
                self._die(node, failure)

    def _die(self, node: Node, failure: Failure) -> None:
        if node.failure is not failure:
            return
        node.dead = True
        for uid, pool in self._on[node.name].items():
            pool.stop(uid, "dies", self.now_s)
        self._in(SILENT_AFTER_S, self._condition, node, "Ready", "Unknown")
        self._in(SILENT_AFTER_S + EVICTED_AFTER_S, self._evicted, node, failure)
        self._in(failure.repair_s, self._mend, node, failure)

    def _evicted(self, node: Node, failure: Failure) -> None:
        """Kubernetes deletes the pods of a node that is silent for long, and waits for it."""
        if node.failure is failure:
            for uid, pool in list(self._on[node.name].items()):
                self._terminate(pool, uid)
                self._settle(pool)

    def _mend(self, node: Node, failure: Failure) -> None:
        """The machine is whole again; what was on a dead one is gone."""
        if node.failure is not failure:
            return
        node.failure, node.mending = None, False
        if node.dead:
            for uid, pool in list(self._on[node.name].items()):
                self._remove(pool, uid)
                self._settle(pool)
        node.dead = False
        self._pace_of(node, 1.0)
        self._condition(node, CONDITION, "False")
        self._condition(node, "Ready", "True")

    def _pace_of(self, node: Node, factor: float) -> None:
        if node.slow == factor:
            return
        node.slow = factor
        for uid, pool in self._on[node.name].items():
            if uid in pool.serving:
                pool.serve(uid, factor, self.now_s)
            self._suspect(pool)

    def _condition(self, node: Node, type_: str, status: str) -> None:
        if node.view.conditions.get(type_) == status or (node.dead and status != "Unknown"):
            return
        conditions = {**node.view.conditions, type_: status}
        self._see(node, replace(node.view, conditions=conditions))
        if type_ == "Ready":
            for uid, pool in list(self._on[node.name].items()):
                if status == "True":
                    self._start(pool, uid)
                else:
                    pool.stop(uid, "pauses", self.now_s)
                    self._placed[uid] = pool.change(uid, ready=False)
            self._place_all()

    def _see(self, node: Node, view: NodeView) -> None:
        node.view = self._views[node.name] = view
        self._dirty()

    # -- pods --------------------------------------------------------------------------------------

    def _bind(self, pool: Pool, uid: str, node: str) -> None:
        self._placed[uid] = pool.change(uid, node=node)
        self._on[node][uid] = pool
        self._free.pop(node, None)
        self._waiting.pop(uid, None)

    def _start(self, pool: Pool, uid: str) -> None:
        """It has started, or its node is back."""
        pod = pool.pods.get(uid)
        if pod is None or pod.draining or pod.ready or not pod.node:
            return
        node = self._nodes[pod.node]
        if node.dead or node.view.conditions["Ready"] != "True":
            return
        if pod.terminating:
            return self._remove(pool, uid)
        self._placed[uid] = pool.change(uid, ready=True)
        pool.serve(uid, node.slow, self.now_s)
        self._suspect(pool)
        self._settle(pool)

    def _terminate(self, pool: Pool, uid: str) -> None:
        pool.stop(uid, "leaves", self.now_s)
        self._placed[uid] = pool.change(uid, ready=False, terminating=True)
        self._in(LEAVE_S, self._start, pool, uid)  # A kubelet that is there ends it.
        self._dirty()

    def _drain(self, pool: Pool, uid: str) -> None:
        """It takes no more load and is gone once its streams have moved."""
        if pool.pods[uid].draining:
            return
        self.counts.under_the_floor += not pool.may_lose(uid)
        pool.stop(uid, "leaves", self.now_s)
        self._placed[uid] = pool.change(uid, draining=True)
        self._in(LEAVE_S, self._remove, pool, uid)
        self._dirty()

    def _remove(self, pool: Pool, uid: str) -> None:
        pod = pool.pods.get(uid)
        if pod is None:
            return
        pool.stop(uid, "leaves", self.now_s)
        del pool.pods[uid]
        self._placed.pop(uid, None)
        self._waiting.pop(uid, None)
        self._found.pop(uid, None)
        self._refusals.pop(uid, None)
        if pod.node:
            node = self._nodes[pod.node]
            del self._on[pod.node][uid]
            if not self._on[pod.node]:
                self._free[pod.node] = None
            self._taken_out(node)
            self._place_all()
        self._dirty()

    def _taken_out(self, node: Node) -> None:
        """An empty straggler goes to be mended, as a dead node does."""
        failure = node.failure
        if node.slow > 1.0 and failure and not self._on[node.name] and not node.mending:
            node.mending = True
            self._in(failure.repair_s, self._mend, node, failure)

    def _settle(self, pool: Pool) -> None:
        """What a fleet does: as many pods as asked for, surge first, where nodes are in repair."""
        leaving = [p for p in pool.live if self._leaves(p)]
        staying = [p for p in pool.live if not self._leaves(p)]
        for _ in range(pool.size - len(staying)):
            self._waiting[pool.make(8).uid] = pool
            self._place_all()
        for pod in leaving:
            if not pod.ready:
                self._terminate(pool, pod.uid)
            elif pool.may_lose(pod.uid):
                self._drain(pool, pod.uid)
        surplus = len(staying) - pool.size
        for pod in sorted(staying, key=lambda p: (p.ready, -int(p.uid.rsplit("-", 1)[1]))):
            if surplus > 0 and pool.may_lose(pod.uid):
                surplus -= 1
                self._drain(pool, pod.uid) if pod.ready else self._remove(pool, pod.uid)

    def _leaves(self, pod: PlacedPod) -> bool:
        return pod.node in self._repair.nodes or pod.uid in self._repair.pods

    def _place_all(self) -> None:
        avoid = set(self._repair.avoid)
        for uid, pool in list(self._waiting.items()):
            usable = (n for n in self._free if n not in avoid and self._takes_pods(n))
            node = emptiest(pool, usable, self._racks)
            if node is None:
                self.counts.waited_for_node += 1
                return
            self._bind(pool, uid, node)
            self._in(self.spec.startup_s, self._start, pool, uid)

    def _takes_pods(self, name: str) -> bool:
        view = self._views[name]
        return not view.unschedulable and view.conditions["Ready"] == "True"

    # -- the operator ------------------------------------------------------------------------------

    def _dirty(self) -> None:
        self._look_by(max(self.now_s, self._looked_s + self.spec.look_every_s))

    def _look_by(self, at_s: float) -> None:
        if self._look_at_s is None or at_s < self._look_at_s:
            self._look_at_s = at_s
            self._at(at_s, self._look)

    def _look(self) -> None:
        if self._look_at_s != self.now_s:
            return
        self._look_at_s, self._looked_s = None, self.now_s
        if self.spec.policy.mode == "Off":
            return
        self.counts.plans += 1
        plan = plan_nodes(self._snapshot())
        before = self._repair.avoid
        for action in plan.actions:
            self._carry_out(action)
        self._settle_repairs({*before, *self._repair.avoid})
        if plan.requeue_after_s is not None:
            self._look_by(self.now_s + max(plan.requeue_after_s, self.spec.look_every_s))

    def _snapshot(self) -> NodesSnapshot:
        return NodesSnapshot(
            now_s=EPOCH_S + self.now_s,
            policy=PolicyView("default", "policy", 1, {}, self.spec.policy, self.status),
            nodes=tuple(self._views.values()),
            pods=tuple(self._placed.values()),
            may_write=True,
            refusals=self._refusals,
            stragglers=tuple(self._found.values()),
        )

    def _carry_out(self, action: object) -> None:
        match action:
            case WriteStatus(_, status):
                self._written(NodeHealthPolicyStatus.model_validate(status))
            case PatchNode(target, _, change):
                node = self._nodes[target.name]
                self._see(node, patched(node.view, change))
            case Notify(_, _, reason, _):
                self.counts.reasons[str(reason)] += 1
            case Evict(target) if target.name in self._placed:
                self._evict(target.name)
            case Delete(target, grace_s=0) if target.name in self._placed:
                self._remove(self._pool_of(target.name), target.name)
            case Delete(target) if target.name in self._placed:
                self._drain(self._pool_of(target.name), target.name)

    def _pool_of(self, uid: str) -> Pool:
        return self._on[self._placed[uid].node][uid]

    def _evict(self, uid: str) -> None:
        pool = self._pool_of(uid)
        if pool.may_lose(uid):
            self._drain(pool, uid)
        else:
            self._refusals[uid] = "its budget allows no pod less"

    def _written(self, status: NodeHealthPolicyStatus) -> None:
        before = {n.name for n in self.status.nodes if n.phase in IN_REPAIR}
        after = {n.name for n in status.nodes if n.phase in IN_REPAIR}
        self.counts.most_in_repair = max(self.counts.most_in_repair, len(after))
        self.counts.over_the_brake += bool(after - before) and len(after) > (status.allowed or 0)
        self.status = status
        self._repair = repair_of(self.spec.policy, status)
        self._dirty()

    def _settle_repairs(self, nodes: set[str]) -> None:
        """Of nodes in repair, and of those that were: what left them may be one pod too many."""
        touched = {p.name: p for n in sorted(nodes) for p in self._on[n].values()}
        for pool in touched.values():
            self._settle(pool)
        self._place_all()

    # -- stragglers --------------------------------------------------------------------------------

    def _suspect(self, pool: Pool) -> None:
        """Pools with a slow pod are measured, window after window, until it is found."""
        if self.spec.policy.mode == "Active" and self._watch.begin(pool, self._found):
            self._in(self._watch.window_s, self._measure, pool)

    def _measure(self, pool: Pool) -> None:
        nodes = {uid: pod.node for uid, pod in pool.pods.items()}
        for straggler in self._watch.window(pool, nodes):
            if straggler.pod_uid in self._found:
                continue
            self._found[straggler.pod_uid] = straggler
            node = self._nodes[nodes[straggler.pod_uid]]
            if node.failure and node.slow > 1.0:
                self.counts.found_after_s.append(self.now_s - node.failure.at_s)
            self._dirty()
        if (wait_s := self._watch.next_s(pool, self._found)) is not None:
            self._in(wait_s, self._measure, pool)
