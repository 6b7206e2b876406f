"""`plan_fleet`: from a snapshot of one fleet to everything that has to happen, in order.

The only entry of the fleet's plan. The same function runs live, in tests and on recorded
snapshots: it reads no clock and keeps nothing between calls.
"""

from __future__ import annotations

from tandem_operator.plan.actions import Action, Plan
from tandem_operator.plan.fleet_status import (
    fleet_status,
    judgements,
    status_write,
    transitions,
)
from tandem_operator.plan.pods import Pods, end_orphans, plan_pods
from tandem_operator.plan.pool_status import PoolHealth, health, pool_status, worry
from tandem_operator.plan.pools import Pools, plan_pools
from tandem_operator.plan.rollout import complete
from tandem_operator.plan.scaling_status import scaling_status
from tandem_operator.plan.served_names import Names, assign
from tandem_operator.plan.target import Target, choose
from tandem_operator.plan.verdict import judge
from tandem_operator.plan.views import FleetSnapshot, FleetView
from tandem_operator.settings import Settings


def plan_fleet(snapshot: FleetSnapshot, settings: Settings) -> Plan:
    """What to do for one fleet now."""
    fleet = snapshot.fleet
    if fleet is None or fleet.deleting:
        return Plan(end_orphans(snapshot, ()))
    # 1. Which names it serves, and which revision it should have.
    names = assign(snapshot.fleets, snapshot.models).get(fleet.name, Names((), {}))
    target = choose(snapshot, fleet, settings)
    # 2. Its Pools, their sizes, budgets and recorded templates.
    pools = plan_pools(snapshot, fleet, target)
    # 3. Their pods: one rollout step, drains, replacements.
    pods = plan_pods(snapshot, fleet, target, pools, names.granted)
    orphans = () if pools.foreign else end_orphans(snapshot, pools.live)
    # 4. What that looks like from outside.
    statuses = _statuses(snapshot, fleet, target, pools, pods, names)
    actions = (*target.checks, *pools.actions, *pods.actions, *orphans, *statuses)
    return Plan(actions, pods.requeue_after_s, _notes(target, pods))


def _statuses(
    snapshot: FleetSnapshot,
    fleet: FleetView,
    target: Target,
    pools: Pools,
    pods: Pods,
    names: Names,
) -> tuple[Action, ...]:
    states = [pods.states[pool.name] for pool in pools.live]
    rolled_out = bool(states) and pools.ready and complete(states)
    healths: list[PoolHealth] = []
    serving: dict[str, str | None] = {}
    writes: list[Action] = []
    for pool, state in zip(pools.live, states, strict=True):
        judged = health(pool, state, worry(snapshot, pool))
        retired = pool.name not in target.roles
        size, done = pools.sizes[pool.name], rolled_out and not retired
        scaling = None if retired else scaling_status(fleet, pool, snapshot.scaled.get(pool.name))
        writes += pool_status(pool, state, size, judged, done, scaling, snapshot.now_s)
        serving[state.role] = state.target if rolled_out else state.serving
        if not retired:
            healths.append(judged)
    verdict = judge(snapshot, fleet, target, pools, pods, healths, names)
    found = judgements(snapshot, fleet, target, healths, names, verdict)
    status = fleet_status(snapshot, fleet, target, serving, healths, names, found)
    return (*writes, *transitions(fleet, status), *status_write(fleet, status))


def _notes(target: Target, pods: Pods) -> dict[str, str]:
    """What the decision log adds to the actions."""
    return {
        "target": target.revision or "",
        "spec": target.spec_revision or "",
        "rolling": str(pods.step.rolling),
        "halted": str(pods.step.halted),
        "proven": str(pods.step.proven),
    }
