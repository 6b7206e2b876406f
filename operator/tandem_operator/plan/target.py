"""Which revision a fleet moves to now, and which pools that revision has.

The spec asks for one revision. What moves there may be another: none while nothing can be rendered
or the API server refuses its pods (the fleet keeps what it has), an older one after
`tandem rollout undo`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tandem_runtime.contract import LABEL_MODEL, LABEL_ROLE

from tandem_operator.api.meta import Judgement
from tandem_operator.names import Condition, Reason
from tandem_operator.plan.actions import CheckTemplate, Manifest
from tandem_operator.plan.build import pool_name
from tandem_operator.plan.pod import check_manifest
from tandem_operator.plan.revision import Refused, Rendered, recorded, render, rollback
from tandem_operator.plan.views import FleetSnapshot, FleetView, check_key
from tandem_operator.settings import Settings

IN_PLACE = (
    "to replace pods within the quota, set rollout.maxSurge: 0 and rollout.maxUnavailable to 1 or "
    "more"
)


@dataclass(frozen=True)
class Target:
    """Where the fleet goes."""

    revision: str | None
    """None: nowhere; there is nothing to serve yet."""
    spec_revision: str | None
    """What the spec renders to; None when it cannot be rendered."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Role by pool name, of the pools that `revision` has."""
    templates: Mapping[str, Manifest] = field(default_factory=dict)
    """By pool name, where `revision` may have to be recorded first."""
    checks: tuple[CheckTemplate, ...] = ()
    """Dry runs that have to be made before the spec's revision is taken."""
    judgements: tuple[Judgement, ...] = ()
    blocked: Judgement | None = None
    """The condition that keeps the spec from being served; None while nothing is wrong."""


def choose(snapshot: FleetSnapshot, fleet: FleetView, settings: Settings) -> Target:
    """The target of a fleet that exists."""
    model = _model_judgement(snapshot, fleet)
    resolved = snapshot.model.status.resolved if snapshot.model else None
    if model.status is not True or snapshot.model is None or resolved is None:
        return _hold(snapshot, None, (model,))
    template = snapshot.model.spec.template
    rendered = render(fleet, snapshot.model.name, resolved, template, settings)
    if isinstance(rendered, Refused):
        refused = _template(False, Reason.TEMPLATE_REFUSED, rendered.sentence)
        return _hold(snapshot, None, (model, refused), refused)
    undone = rollback(fleet)
    if undone and undone.origin == rendered.revision:
        return _rolled_back(snapshot, rendered, undone.to, model)
    return _checked(snapshot, fleet, rendered, model)


def _model_judgement(snapshot: FleetSnapshot, fleet: FleetView) -> Judgement:
    name, type_ = fleet.spec.model_ref.name, Condition.MODEL_RESOLVED
    if snapshot.model is None:
        others = ", ".join(sorted(m.name for m in snapshot.models)) or "none"
        sentence = (
            f"Model {name} does not exist in namespace {fleet.namespace} "
            f"(there are: {others}); create it or change spec.modelRef"
        )
        return Judgement(type_, False, Reason.MODEL_NOT_FOUND, sentence)
    status = snapshot.model.status
    said = next((c for c in status.conditions if c.type == type_), None)
    current = status.observed_generation == snapshot.model.generation
    if said is None or not current:
        sentence = f"Model {name} is being read"
        return Judgement(type_, None, Reason.MODEL_NOT_RESOLVED, sentence)
    value = {"True": True, "False": False}.get(said.status)
    return Judgement(type_, value, said.reason, said.message)


def _template(value: bool | None, reason: Reason, sentence: str) -> Judgement:
    return Judgement(Condition.TEMPLATE_VALID, value, reason, sentence)


def _checked(
    snapshot: FleetSnapshot, fleet: FleetView, rendered: Rendered, model: Judgement
) -> Target:
    """The spec's revision, once the API server accepted a pod of each of its pools."""
    revision = rendered.revision
    templates = {pool_name(fleet.name, r): t for r, t in rendered.templates.items()}
    uids = {pool.name: pool.uid for pool in snapshot.pools}
    checks = []
    for pool, template in templates.items():
        if recorded(snapshot.revisions, uids.get(pool, ""), revision):
            continue
        answer = snapshot.checks.get(check_key(pool, revision))
        if answer is None:
            manifest = check_manifest(fleet, pool, revision, template)
            checks.append(CheckTemplate(check_key(pool, revision), manifest, Reason.CONFIGURED))
        elif not answer.accepted:
            # The quota is the API server's last question: the pod itself is in order.
            full = answer.reason == Reason.QUOTA_EXCEEDED and _has_pods(snapshot, pool)
            if full and fleet.spec.rollout.max_surge == 0:
                continue
            told = f"{pool}: {answer.sentence}" + (f"; {IN_PLACE}" if full else "")
            refused = Judgement(Condition.TEMPLATE_VALID, False, answer.reason, told)
            return _hold(snapshot, revision, (model, refused), refused)
    if checks:
        waiting = _template(None, Reason.TEMPLATE_NOT_CHECKED, "the pods are being checked")
        held = _hold(snapshot, revision, (model, waiting))
        return Target(**(held.__dict__ | {"checks": tuple(checks)}))
    accepted = _template(True, Reason.TEMPLATE_ACCEPTED, "the API server accepts the pods")
    roles = {pool_name(fleet.name, role): role for role in rendered.templates}
    return Target(revision, revision, roles, templates, (), (model, accepted))


def _has_pods(snapshot: FleetSnapshot, pool: str) -> bool:
    return any(pod.pool == pool and pod.pool_uid is not None for pod in snapshot.pods)


def _rolled_back(snapshot: FleetSnapshot, rendered: Rendered, to: str, model: Judgement) -> Target:
    """An older revision, from its ControllerRevisions."""
    roles = _recorded_roles(snapshot, to)
    if not any(role != "prefill" for role in roles.values()):
        gone = Judgement(
            Condition.ROLLED_BACK,
            False,
            Reason.ROLLBACK_REVISION_GONE,
            f"revision {to} is not recorded any more; `tandem rollout history` lists those that "
            "are",
        )
        return _hold(snapshot, rendered.revision, (model, gone), gone)
    undone = Judgement(
        Condition.ROLLED_BACK,
        True,
        Reason.ROLLED_BACK,
        f"serving revision {to} instead of {rendered.revision}, which the spec asks for, since "
        "`tandem rollout undo`; any change of the spec's pods ends it",
    )
    return Target(to, rendered.revision, roles, {}, (), (model, undone))


def _hold(
    snapshot: FleetSnapshot,
    spec_revision: str | None,
    judgements: tuple[Judgement, ...],
    blocked: Judgement | None = None,
) -> Target:
    """Stay with the revision that the pools were last moved to."""
    revisions = {p.spec.revision for p in snapshot.pools if not p.deleting}
    held = sorted(r for r in revisions if _is_whole(snapshot, r))
    current = next((p.spec.revision for p in snapshot.pools if p.spec.role != "prefill"), None)
    revision = current if current in held else (held[0] if held else None)
    roles = _recorded_roles(snapshot, revision) if revision else {}
    if blocked is None and snapshot.fleet and revision:
        wanted = snapshot.fleet.spec.model_ref.name
        if wanted not in _recorded_models(snapshot, revision):
            blocked = judgements[0]
    return Target(revision, spec_revision, roles, {}, (), judgements, blocked)


def _recorded_models(snapshot: FleetSnapshot, revision: str) -> set[str]:
    """The Models that pods of a revision serve."""
    pools = {pool.uid for pool in snapshot.pools}
    own = (r for r in snapshot.revisions if r.revision == revision and r.pool_uid in pools)
    templates = (r.template for r in own)
    return {str(t["metadata"]["labels"].get(LABEL_MODEL)) for t in templates}


def _is_whole(snapshot: FleetSnapshot, revision: str) -> bool:
    return any(role != "prefill" for role in _recorded_roles(snapshot, revision).values())


def _recorded_roles(snapshot: FleetSnapshot, revision: str) -> dict[str, str]:
    """Role by pool name of the live pools that have recorded the revision."""
    roles = {}
    for pool in snapshot.pools:
        found = recorded(snapshot.revisions, pool.uid, revision)
        if found and not pool.deleting:
            labels = (found.template.get("metadata") or {}).get("labels") or {}
            roles[pool.name] = str(labels.get(LABEL_ROLE, pool.spec.role))
    return roles
