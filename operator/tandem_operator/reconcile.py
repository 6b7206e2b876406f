"""One reconcile: observe -> plan -> plan again on live reads if it destroys -> execute.

Statuses are actions of the plan. Nothing is remembered between reconciles but facts that were
asked for (facts.py), so that a restarted or a second operator goes on from what is observed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from tandem_operator.facts import Facts
from tandem_operator.keys import Key
from tandem_operator.kube.execute import Executor, Outcome
from tandem_operator.kube.lease import LeaseLost
from tandem_operator.metrics import Metrics
from tandem_operator.names import Reason
from tandem_operator.observe import Observer
from tandem_operator.observe_nodes import NodeObserver
from tandem_operator.plan.actions import (
    Action,
    CheckTemplate,
    Create,
    CreateSecret,
    Evict,
    Notify,
    Plan,
    WriteStatus,
)
from tandem_operator.plan.context import plan_context
from tandem_operator.plan.fleet import plan_fleet
from tandem_operator.plan.gateway import plan_gateway
from tandem_operator.plan.model import plan_model
from tandem_operator.plan.nodes.plan import plan_nodes
from tandem_operator.resources import FLEETS, MODELS, Ref
from tandem_operator.settings import Settings

log = logging.getLogger(__name__)
decisions = logging.getLogger("tandem_operator.decisions")


class ReconcileFailed(Exception):
    """Some action failed; the key is to be tried again."""


class Leadership(Protocol):
    """Whether this process may act."""

    @property
    def held(self) -> bool: ...


class Reconciler:
    """Reconciles keys."""

    def __init__(
        self,
        observer: Observer,
        nodes: NodeObserver,
        executor: Executor,
        facts: Facts,
        leadership: Leadership,
        metrics: Metrics,
        settings: Settings,
        now_s: Callable[[], float],
    ) -> None:
        self._observer = observer
        self._nodes = nodes
        self._executor = executor
        self._facts = facts
        self._leadership = leadership
        self._metrics = metrics
        self._settings = settings
        self._now_s = now_s
        self._verified_s: dict[Key, float] = {}

    async def reconcile(self, key: Key) -> float | None:
        """Reconcile one key; when to do so again, in seconds, if nothing happens before.

        Raises ReconcileFailed, ApiError or OSError for another try, LeaseLost for the end.
        """
        plan = await self._plan(key, live=self._is_stale(key))
        if plan.destructive:
            plan = await self._plan(key, live=True)
        if not plan.actions:
            self._facts.learn_refusal(key, None)
            return plan.requeue_after_s
        if not self._leadership.held:
            raise LeaseLost("the lease ran out before the plan was carried out")
        outcomes = await self._executor.execute(plan)
        self._learn(key, outcomes)
        self._account(key, plan, outcomes)
        await self._report(key, outcomes)
        if any(isinstance(o.action, CheckTemplate | CreateSecret) for o in outcomes):
            return 0.0
        return plan.requeue_after_s

    def _is_stale(self, key: Key) -> bool:
        """Once a resync period every key is planned on what the API server says itself."""
        now_s = self._now_s()
        period_s = 0.9 * self._settings.resync_s
        last_s = self._verified_s.setdefault(key, now_s)
        # Less than nothing: the clock was set back.
        if 0.0 <= now_s - last_s < period_s:
            return False
        # The resync queues whatever exists, so what was not verified for long is gone.
        self._verified_s = {k: s for k, s in self._verified_s.items() if now_s - s < 3 * period_s}
        self._verified_s[key] = now_s
        return True

    async def _plan(self, key: Key, *, live: bool) -> Plan:
        if key.kind == "Model":
            return plan_model(await self._observer.model(key, live=live), self._settings)
        if key.kind == "Nodes":
            return plan_nodes(await self._nodes.nodes(live=live))
        if key.kind == "CachedContext":
            return plan_context(await self._observer.context(key, live=live))
        if key.kind == "Gateway":
            return plan_gateway(await self._observer.gateway(key, live=live), self._settings)
        return plan_fleet(await self._observer.fleet(key, live=live), self._settings)

    def _learn(self, key: Key, outcomes: Sequence[Outcome]) -> None:
        now_s = self._now_s()
        refused = (o.error for o in outcomes if o.error and isinstance(o.action, Create))
        self._facts.learn_refusal(key, next(refused, None))
        for outcome in outcomes:
            if isinstance(outcome.action, CheckTemplate) and outcome.check:
                check_key = outcome.action.revision
                self._facts.learn_check(key.namespace, check_key, outcome.check, now_s)
            if isinstance(outcome.action, CreateSecret) and outcome.error is None:
                self._facts.learn_secret(key.namespace, now_s)
            if isinstance(outcome.action, Evict):
                self._facts.learn_eviction(outcome.action.target.uid or "", outcome.refusal)

    def _account(self, key: Key, plan: Plan, outcomes: Sequence[Outcome]) -> None:
        """The decision log and the action metrics."""
        entries = []
        for outcome in outcomes:
            name, reason = type(outcome.action).__name__, _reason(outcome.action)
            result = "failed" if outcome.error else "refused" if outcome.refusal else "ok"
            self._metrics.actions.labels(name, reason, result).inc()
            entry = {"action": name, "object": _object(outcome.action), "reason": reason}
            said = outcome.error or outcome.refusal
            entries.append(entry | ({"error": said} if said else {}))
        line: dict[str, Any] = {"key": str(key), "notes": dict(plan.notes), "actions": entries}
        decisions.info("%s", json.dumps(line))

    async def _report(self, key: Key, outcomes: Sequence[Outcome]) -> None:
        """Tell the user what was refused, and fail for another try."""
        refused = [o for o in outcomes if o.error and not isinstance(o.action, Notify)]
        if not refused:
            return
        sentences = "; ".join(
            f"{type(o.action).__name__} {_object(o.action)}: {o.error}" for o in refused
        )
        regarding = _regarding(key, outcomes)
        creations = [o for o in refused if isinstance(o.action, Create)]
        if regarding and creations:
            note = f"{_object(creations[0].action)} could not be made: {creations[0].error}"
            event = Notify(regarding, "Warning", Reason.WRITE_REFUSED, note)
            await self._executor.execute(Plan((event,)))
        raise ReconcileFailed(sentences)


def _regarding(key: Key, outcomes: Sequence[Outcome]) -> Ref | None:
    """The user's object of a key, as far as the plan named it."""
    resource = {"InferenceFleet": FLEETS, "Model": MODELS}.get(key.kind)
    for outcome in outcomes:
        target = getattr(outcome.action, "target", None) or getattr(
            outcome.action, "regarding", None
        )
        if target is not None and target.resource == resource:
            return Ref(target.resource, target.namespace, target.name, target.uid)
    return Ref(resource, key.namespace, key.name) if resource else None


def _reason(action: Action) -> str:
    return "" if isinstance(action, WriteStatus) else str(action.reason)


def _object(action: Action) -> str:
    """KIND/NAME of what an action is about."""
    target = getattr(action, "target", None) or getattr(action, "regarding", None)
    if target is not None:
        return f"{target.resource.kind}/{target.name}"
    manifest = getattr(action, "manifest", {})
    return f"{manifest.get('kind')}/{manifest.get('metadata', {}).get('name')}"


async def work(
    get: Callable[[], Awaitable[Key]],
    done: Callable[[Key, float | None], None],
    failed: Callable[[Key], float],
    reconcile: Callable[[Key], Awaitable[float | None]],
    metrics: Metrics,
    monotonic_s: Callable[[], float],
) -> None:
    """One worker of the queue; ends only with LeaseLost or by being cancelled."""
    while True:
        key = await get()
        started_s = monotonic_s()
        try:
            after_s = await reconcile(key)
        except LeaseLost:
            raise
        except Exception as error:
            wait_s = failed(key)
            expected = isinstance(error, ReconcileFailed | OSError)
            log.warning("%s: %s; again in %.1f s", key, error, wait_s, exc_info=not expected)
            metrics.reconciles.labels(key.kind, "failed").inc()
        else:
            done(key, after_s)
            metrics.reconciles.labels(key.kind, "ok").inc()
        metrics.reconcile_seconds.labels(key.kind).observe(monotonic_s() - started_s)
