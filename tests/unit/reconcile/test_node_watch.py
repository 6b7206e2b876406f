"""What pods and nodes say of themselves becomes facts: counts that rise, reports, slow pods."""

from __future__ import annotations

from typing import Any

import pytest
from tandem_operator.facts import Facts
from tandem_operator.node_watch import USUAL_WINDOW_S, NodeWatch
from tandem_operator.plan.nodes.counts import parse_counts, rises
from tandem_operator.resources import NODE_HEALTH_POLICIES, NODES, PODS, Resource
from tandem_runtime.contract import ANNOTATION_XID_COUNTS
from tandem_runtime.device_report import DeviceReport
from tandem_runtime.protocol import PodState, PodWork, StepSums

Body = dict[str, Any]


class Cluster:
    """Four pods on four nodes, and what they say."""

    def __init__(self, **signals: Any) -> None:
        self.now_s = 1_700_000_000.0
        self.signals, self.mode = signals, "Active"
        self.annotations: dict[str, str] = {}
        self.devices: dict[str, DeviceReport] = {}
        self.sums = [StepSums() for _ in range(4)]
        self.silent: set[str] = set()
        self.asked = 0
        self.facts = Facts()
        self.restart()

    def restart(self) -> None:
        self.watch = NodeWatch(self, lambda: ["team"], self, self.facts, lambda: self.now_s)

    async def list(self, resource: Resource, namespace: str, labels: Any) -> list[Body]:
        if resource == NODE_HEALTH_POLICIES:
            meta = {"name": "default", "uid": "p", "generation": 1}
            return [{"metadata": meta, "spec": {"mode": self.mode, "signals": self.signals}}]
        if resource == NODES:
            marks = {"n0": {ANNOTATION_XID_COUNTS: self.annotations.get("n0", "{}")}}
            names = [f"n{i}" for i in range(4)]
            return [
                {"metadata": {"name": n, "uid": n, "annotations": marks.get(n, {})}} for n in names
            ]
        assert resource == PODS
        return [self._pod(i) for i in range(4)]

    def _pod(self, i: int) -> Body:
        labels = {"tandem.dev/fleet": "chat", "tandem.dev/pool": "chat-decode"}
        return {
            "metadata": {
                "name": f"p{i}",
                "namespace": "team",
                "uid": f"u{i}",
                "labels": labels,
                "creationTimestamp": "2023-01-01T00:00:00Z",
            },
            "spec": {"nodeName": f"n{i}"},
            "status": {
                "phase": "Running",
                "podIP": f"10.0.0.{i}",
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }

    async def state(self, host: str) -> PodState:
        self.asked += 1
        if host in self.silent:
            raise OSError("away")
        i = int(host[-1])
        work = PodWork(0, 0, 0, self.sums[i], 0, 0, 0, 0)
        device = self.devices.get(f"p{i}")
        return PodState("", "", "", "", True, False, 1, 0, 0, 0.0, 0, 0.0, 0, work, device)

    def work(self, *factors: float) -> None:
        """A window of steps of 20 streams, at a pace of each pod's own."""
        for i, factor in enumerate(factors):
            n, s = 500.0, 20.0
            old, took = self.sums[i], n * 0.02 * factor
            self.sums[i] = StepSums(
                steps=old.steps + n,
                seconds=old.seconds + took,
                streams=old.streams + n * s,
                streams_streams=old.streams_streams + n * s * s,
                seconds_streams=old.seconds_streams + took * s,
            )

    async def look(self, seconds: float = 15.0) -> float:
        self.now_s += seconds
        return await self.watch.look()


async def test_without_a_policy_that_wants_it_nobody_is_asked() -> None:
    cluster = Cluster()
    assert await cluster.look() == USUAL_WINDOW_S
    cluster.signals, cluster.mode = {"reports": {}}, "Off"
    await cluster.look()
    assert cluster.asked == 0


async def test_an_annotation_counts_when_it_rises() -> None:
    cluster = Cluster(xids={"withinSeconds": 100})
    cluster.annotations["n0"] = '{"79": 3}'
    await cluster.look()
    await cluster.look()
    assert cluster.facts.xids == {}, "history"
    cluster.annotations["n0"] = '{"79": 5, "48": 1}'
    await cluster.look()
    assert {code: len(t) for code, t in cluster.facts.xids["n0"].items()} == {79: 2, 48: 1}
    await cluster.look(80.0)
    assert 79 in cluster.facts.xids["n0"]
    cluster.restart()
    await cluster.look(10.0)
    assert 79 in cluster.facts.xids["n0"], "what was seen stays while it counts"
    await cluster.look(20.0)
    assert cluster.facts.xids == {}
    cluster.annotations["n0"] = '{"79": 1}'
    await cluster.look()
    assert cluster.facts.xids == {}, "its source started anew"


async def test_a_pods_counts_are_its_nodes() -> None:
    cluster = Cluster(xids={})
    cluster.devices["p2"] = DeviceReport({"79": 1})
    await cluster.look()
    cluster.devices["p2"] = DeviceReport({"79": 2})
    await cluster.look()
    assert list(cluster.facts.xids) == ["n2"]


async def test_a_report_stands_while_the_pod_says_so() -> None:
    cluster = Cluster(reports={})
    cluster.devices["p1"] = DeviceReport(failing="12 memory errors that cannot be corrected")
    await cluster.look()
    assert cluster.facts.reports == {"u1": "12 memory errors that cannot be corrected"}
    cluster.silent = {"10.0.0.1"}
    await cluster.look()
    assert cluster.facts.reports == {}


async def test_a_slow_pod_is_a_fact_and_a_silent_one_is_none() -> None:
    cluster = Cluster(stragglers={"windows": 4, "windowSeconds": 20})
    for _ in range(8):
        cluster.work(1.0, 1.01, 1.3, 0.99)
        assert await cluster.look() == 20.0
    (found,) = cluster.facts.stragglers
    assert found.pod_uid == "u2"
    assert found.evidence == "p2 on n2: 1.29x its peers for 4 windows"
    cluster.silent = {"10.0.0.2"}
    cluster.work(1.0, 1.01, 1.3, 0.99)
    await cluster.look()
    assert cluster.facts.stragglers == ()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "79": "x", "-1": 2, "48": -3}', "null"])
def test_counts_that_cannot_be_read_count_for_nothing(text: str) -> None:
    assert parse_counts(text) == {}


def test_rises() -> None:
    assert rises(None, {79: 3}, 1.0) == {}
    assert rises({79: 3}, {79: 3}, 1.0) == {}
    assert rises({79: 3}, {79: 2}, 1.0) == {}
    assert rises({}, {79: 2}, 1.0) == {79: (1.0, 1.0)}
