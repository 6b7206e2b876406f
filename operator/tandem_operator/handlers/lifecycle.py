"""The operator while it leads: workers, resync, scraping, beside Kopf's watches."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Coroutine
from typing import Any

import kopf

from tandem_operator.autoscale import Autoscaler
from tandem_operator.facts import Facts
from tandem_operator.handlers.watch import IndexCache, configure, register
from tandem_operator.keys import NODES_KEY, Key, gateway_key
from tandem_operator.kube.client import Kube
from tandem_operator.kube.events import EventRecorder
from tandem_operator.kube.execute import Executor
from tandem_operator.kube.lease import LeaderLease
from tandem_operator.metrics import Metrics
from tandem_operator.node_watch import USUAL_WINDOW_S, NodeWatch
from tandem_operator.observe import Observer
from tandem_operator.observe_nodes import NodeObserver
from tandem_operator.plan.latency import merged
from tandem_operator.probes import Pulse
from tandem_operator.prometheus import Prometheus
from tandem_operator.queue import KeyedQueue
from tandem_operator.readers import CLUSTER, CachedReader, LiveReader
from tandem_operator.reconcile import Reconciler, work
from tandem_operator.resources import CACHED_CONTEXTS, FLEETS, MODELS, NODE_HEALTH_POLICIES, PODS
from tandem_operator.runtime_pods import RuntimePods
from tandem_operator.scrape import gateway_hosts, scrape_all
from tandem_operator.settings import Settings

log = logging.getLogger(__name__)
WAKE_S = 1.0
"""Between two looks at fleets that sleep."""


class Leader:
    """Everything that runs while this process leads."""

    def __init__(
        self,
        settings: Settings,
        kube: Kube,
        pods: RuntimePods,
        lease: LeaderLease,
        metrics: Metrics,
        pulse: Pulse,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._pulse = pulse
        self._pods = pods
        self._lease = lease
        self._facts = Facts()
        self._cache = IndexCache()
        self._queue: KeyedQueue[Key] = KeyedQueue(time.monotonic, lambda: random.uniform(0.8, 1.2))
        cached = CachedReader(self._cache)
        recorder = EventRecorder(kube, settings.pod_name, time.time)
        live = LiveReader(kube, cached)
        observer = Observer(cached, live, pods, self._facts, time.time, settings.drain_taints)
        prometheus = None
        if settings.prometheus_url:
            prometheus = Prometheus(settings.prometheus_url, settings.prometheus_token_file)
        self._autoscaler = Autoscaler(cached, pods, self._facts, metrics, time.time, prometheus)
        executor = Executor(kube, pods, recorder, os.urandom)
        nodes = NodeObserver(
            cached,
            live,
            lambda: self._cache.namespaces(PODS),
            pods,
            kube,
            self._facts,
            time.time,
            may_write=settings.node_repair,
        )
        self._node_watch = NodeWatch(
            cached, lambda: self._cache.namespaces(PODS), pods, self._facts, time.time
        )
        self._reconciler = Reconciler(
            observer, nodes, executor, self._facts, lease, metrics, settings, time.time
        )

    async def run(self) -> None:
        """Watch and act until this process is told to end. Raises LeaseLost."""
        registry = kopf.OperatorRegistry()
        register(registry, self._cache, self._queue.add)
        kopf_settings = kopf.OperatorSettings()
        configure(kopf_settings)
        kopf.on.login(registry=registry)(kopf.login_via_client)
        operator = kopf.operator(
            registry=registry,
            settings=kopf_settings,
            standalone=True,
            clusterwide=not self._settings.watch_namespaces,
            namespaces=self._settings.watch_namespaces,
        )
        await _first_of(operator, *self._loops())

    def _loops(self) -> list[Coroutine[Any, Any, None]]:
        """What runs beside Kopf."""
        workers = [self._work() for _ in range(self._settings.workers)]
        looks = [self._scrape(), self._scale(), self._watch_nodes()]
        return [self._lease.keep(), self._resync(), *looks, *workers]

    async def _work(self) -> None:
        await work(
            self._queue.get,
            self._queue.done,
            self._queue.failed,
            self._reconciler.reconcile,
            self._metrics,
            time.monotonic,
        )

    async def _resync(self) -> None:
        """Queue everything every now and then: whatever was missed is found again."""
        while True:
            self._pulse.beat("resync", 3 * self._settings.resync_s)
            self._metrics.resync.set_to_current_time()
            await asyncio.sleep(self._settings.resync_s)
            self._queue.add(NODES_KEY)
            for namespace in self._cache.namespaces(MODELS):
                for model in self._cache.objects(MODELS, namespace):
                    self._queue.add(Key("Model", namespace, model["metadata"]["name"]))
            for namespace in self._cache.namespaces(CACHED_CONTEXTS):
                for context in self._cache.objects(CACHED_CONTEXTS, namespace):
                    self._queue.add(Key("CachedContext", namespace, context["metadata"]["name"]))
            for namespace in self._cache.namespaces(FLEETS):
                self._queue.add(gateway_key(namespace))
                for key in self._fleets(namespace):
                    self._queue.add(key)

    def _fleets(self, namespace: str) -> list[Key]:
        fleets = self._cache.objects(FLEETS, namespace)
        return [Key("InferenceFleet", namespace, f["metadata"]["name"]) for f in fleets]

    async def _scrape(self) -> None:
        """Ask the gateways; queue the fleets whose latency changed noticeably."""
        while True:
            self._pulse.beat("scrape", 12 * self._settings.scrape_interval_s)
            self._metrics.queue_depth.set(len(self._queue))
            self._metrics.queue_failing.set(self._queue.failing)
            self._metrics.leader.set(self._lease.held)
            for policy in self._cache.objects(NODE_HEALTH_POLICIES, CLUSTER):
                status = policy.get("status") or {}
                phases = [str(node.get("phase")) for node in status.get("nodes") or ()]
                self._metrics.node_health(phases, int(status.get("allowed") or 0))
            await asyncio.sleep(self._settings.scrape_interval_s)
            hosts = {
                namespace: gateway_hosts(self._cache.objects(PODS, namespace))
                for namespace in self._cache.namespaces(FLEETS)
            }
            for namespace, reports in (await scrape_all(self._pods, hosts)).items():
                for key in self._fleets(namespace):
                    measured = merged(reports.get(key.name, []))
                    if self._facts.learn_latency(namespace, key.name, measured, time.time()):
                        self._queue.add(key)

    async def _watch_nodes(self) -> None:
        """Ask pods how they are, and queue the nodes when something about them is new."""
        wait_s = USUAL_WINDOW_S
        while True:
            self._pulse.beat("nodes", 60.0 + 3 * wait_s)
            before = self._facts.of_nodes
            wait_s = await self._node_watch.look()
            if self._facts.of_nodes != before:
                self._queue.add(NODES_KEY)
            await asyncio.sleep(wait_s)

    async def _scale(self) -> None:
        """Look at the load of autoscaled fleets; queue those whose size or status has to change."""
        interval_s, next_s = self._settings.scaling_interval_s, 0.0
        while True:
            self._pulse.beat("scale", 24 * interval_s)
            await asyncio.sleep(min(WAKE_S, interval_s))
            due = time.monotonic() >= next_s
            if due:
                next_s = time.monotonic() + interval_s
            namespaces = {*self._cache.namespaces(FLEETS), *self._autoscaler.known}
            if not due:
                namespaces &= self._autoscaler.asleep
            async for keys in self._autoscaler.look_at(sorted(namespaces)):
                self._pulse.beat("scale", 24 * interval_s)
                for key in keys:
                    self._queue.add(key)


async def _first_of(operator: Coroutine[Any, Any, None], *loops: Coroutine[Any, Any, None]) -> None:
    """Run until the operator ends or anything fails; a failure is raised at once.

    The loops start first: Kopf cancels every task that is younger than itself when it ends.
    """
    tasks = [asyncio.create_task(loop) for loop in loops]
    main = asyncio.create_task(operator)
    done, _ = await asyncio.wait([main, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
