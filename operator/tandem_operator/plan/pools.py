"""A fleet's Pools, and what belongs to each: size, PodDisruptionBudget, recorded templates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tandem_operator.api.fleet import PoolTemplate
from tandem_operator.names import Reason
from tandem_operator.plan.actions import Action, Create, Delete, Notify, Renumber, Scale
from tandem_operator.plan.apply import apply_if_needed
from tandem_operator.plan.build import (
    budget_manifest,
    pool_manifest,
    revision_manifest,
)
from tandem_operator.plan.replicas import Size, decide, overwritten_note
from tandem_operator.plan.revision import expired, recorded
from tandem_operator.plan.scaled import Scaled, sentence
from tandem_operator.plan.target import Target
from tandem_operator.plan.views import FleetSnapshot, FleetView, PoolView, RevisionView


@dataclass(frozen=True)
class Pools:
    """The fleet's Pools as they should be."""

    live: tuple[PoolView, ...]
    """Ours, and not being deleted."""
    sizes: dict[str, Size]
    """By name, of the live ones."""
    ready: bool
    """All pools of the target exist with their templates recorded: pods can be made."""
    actions: tuple[Action, ...]
    foreign: str | None = None
    """A sentence, when a pool's name belongs to somebody else."""


def plan_pools(snapshot: FleetSnapshot, fleet: FleetView, target: Target) -> Pools:
    """The actions on the fleet's Pools, and whether pods can be made for the target."""
    for pool in snapshot.pools:
        if pool.owner_uid != fleet.uid and pool.name in target.roles and not pool.deleting:
            return Pools((), {}, False, (), _foreign(pool))
    live = tuple(p for p in snapshot.pools if p.owner_uid == fleet.uid and not p.deleting)
    by_name = {pool.name: pool for pool in live}
    going = {pool.name for pool in snapshot.pools if pool.deleting}
    actions: list[Action] = []
    ready = target.revision is not None
    for name, role in target.roles.items():
        existing = by_name.get(name)
        body = existing.body if existing else None
        assert target.revision is not None
        if name not in going:
            actions += apply_if_needed(pool_manifest(fleet, role, target.revision), body)
        ready = ready and existing is not None
    sizes = {}
    for pool in live:
        scaled = snapshot.scaled.get(pool.name)
        retired = pool.name not in target.roles
        sizes[pool.name] = _size(fleet, pool, scaled, retired=retired)
        actions += _scale(fleet, pool, sizes[pool.name], scaled)
        actions += apply_if_needed(budget_manifest(fleet, pool), snapshot.budgets.get(pool.name))
        records, complete = _records(snapshot, fleet, pool, target)
        actions += records
        ready = ready and complete
    actions += _retire(snapshot, live, target)
    return Pools(live, sizes, ready, tuple(actions))


def wanted_sizes(
    fleet: FleetView | None, pools: Iterable[PoolView], scaled: Mapping[str, Scaled]
) -> dict[str, int]:
    """The size of each pool by name, before anything else is known of it."""
    if fleet is None:
        return {}
    sizes = ((pool, _size(fleet, pool, scaled.get(pool.name), retired=False)) for pool in pools)
    return {pool.name: size.replicas for pool, size in sizes}


def _foreign(pool: PoolView) -> str:
    return (
        f"Pool {pool.name} exists and does not belong to this fleet; waiting until it is gone "
        "(delete it, or rename the fleet)"
    )


def _template_of(fleet: FleetView, pool: PoolView) -> tuple[PoolTemplate | None, str]:
    """The part of the fleet's spec that is this pool, and its field."""
    if pool.spec.role == "prefill":
        return fleet.spec.prefill, "prefill"
    return fleet.spec.decode, "decode"


def _size(fleet: FleetView, pool: PoolView, scaled: Scaled | None, *, retired: bool) -> Size:
    template, field = _template_of(fleet, pool)
    if retired:
        return Size(0)
    if template is None:
        return Size(pool.spec.replicas)
    live = pool.spec.replicas
    # A decision for another size than the live one is a decision of the past.
    decided = scaled.target if scaled and scaled.writes and scaled.size == live else None
    return decide(template, field, live, pool.status.decided_replicas, decided)


def _scale(fleet: FleetView, pool: PoolView, size: Size, scaled: Scaled | None) -> list[Action]:
    if not size.write:
        return []
    template, _ = _template_of(fleet, pool)
    if template is not None and template.scaling and scaled and scaled.published.decisions:
        note = sentence(scaled.published.decisions[-1], pool.name)
        return [
            Scale(pool.ref, size.replicas, Reason.SCALED),
            Notify(fleet.ref, "Normal", Reason.SCALED, note),
        ]
    if not size.overwritten:
        return [Scale(pool.ref, size.replicas, Reason.REPLICAS_SET)]
    note = overwritten_note(size, pool.name, pool.spec.replicas, fleet.name)
    return [
        Notify(fleet.ref, "Warning", Reason.REPLICAS_OVERWRITTEN, note),
        Scale(pool.ref, size.replicas, Reason.REPLICAS_OVERWRITTEN),
    ]


def _records(
    snapshot: FleetSnapshot, fleet: FleetView, pool: PoolView, target: Target
) -> tuple[list[Action], bool]:
    """Record the target's template, keep the newest ones; and whether the target is recorded."""
    if pool.name not in target.roles or target.revision is None:
        return [], True
    own = [r for r in snapshot.revisions if r.pool_uid == pool.uid]
    newest = max((r.number for r in own), default=0)
    found = recorded(tuple(own), pool.uid, target.revision)
    if found is None:
        template = target.templates[pool.name]
        manifest = revision_manifest(fleet, pool, target.revision, newest + 1, template)
        return [Create(manifest, Reason.REVISION_RECORDED, pool.uid)], False
    actions: list[Action] = []
    if found.number < newest:
        actions.append(Renumber(found.ref, newest + 1, Reason.REVISION_RECORDED))
    actions += _forget(snapshot, pool, own, target.revision)
    return actions, True


def _forget(
    snapshot: FleetSnapshot, pool: PoolView, own: list[RevisionView], target: str
) -> list[Action]:
    used = {p.revision for p in snapshot.pods if p.pool_uid == pool.uid}
    used |= {target, pool.status.current_revision or target}
    return [Delete(r.ref, Reason.HISTORY_LIMIT) for r in expired(own, used)]


def _retire(snapshot: FleetSnapshot, live: tuple[PoolView, ...], target: Target) -> list[Action]:
    """Delete the pools that the target does not have, once their last pod is gone."""
    if target.revision is None:
        return []
    holding = {p.pool_uid for p in snapshot.pods if not p.finished}
    return [
        Delete(pool.ref, Reason.POOL_REMOVED)
        for pool in live
        if pool.name not in target.roles and pool.uid not in holding
    ]
