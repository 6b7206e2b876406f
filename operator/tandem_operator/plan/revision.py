"""Which revision a fleet should have: a hash of everything that is rendered into its pods.

A revision is fleet-wide (docs/design/revisions.md): {role: pod template} of all its pools. Its name
is stable over operators and Python versions: canonical JSON, blake2b, 8 characters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem_operator.api.fleet import PoolTemplate
from tandem_operator.api.model import ResolvedModel
from tandem_operator.names import ANNOTATION_ROLLBACK
from tandem_operator.plan.actions import Manifest
from tandem_operator.plan.merge import refusal
from tandem_operator.plan.pod import pod_template, ranks
from tandem_operator.plan.views import FleetView, RevisionView
from tandem_operator.settings import Settings

# Kubernetes' own alphabet for hashes in names: no vowels, so that no words appear by chance.
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
LENGTH = 8
KEPT_REVISIONS = 10


def digest(value: Any) -> str:
    """8 characters that change with any part of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    characters = []
    for _ in range(LENGTH):
        number, index = divmod(number, len(_ALPHABET))
        characters.append(_ALPHABET[index])
    return "".join(characters)


def roles(fleet: FleetView) -> dict[str, PoolTemplate]:
    """The pools that the spec asks for, by role; decode last."""
    if fleet.spec.prefill is None:
        return {"both": fleet.spec.decode}
    return {"prefill": fleet.spec.prefill, "decode": fleet.spec.decode}


@dataclass(frozen=True)
class Rendered:
    """What the spec asks for now."""

    revision: str
    templates: Mapping[str, Manifest]
    """By role."""


@dataclass(frozen=True)
class Refused:
    """The spec cannot be rendered."""

    sentence: str


def render(
    fleet: FleetView,
    model_name: str,
    model: ResolvedModel,
    model_template: Manifest | None,
    settings: Settings,
) -> Rendered | Refused:
    """The fleet's pod templates and their revision, or why there are none."""
    sentence = refusal(model_template or {}, f"template of Model {model_name}")
    if sentence:
        return Refused(sentence)
    templates = {}
    for role, pool in roles(fleet).items():
        field = "prefill" if role == "prefill" else "decode"
        sentence = refusal(pool.template or {}, f"{field}.template")
        sentence = sentence or _cannot_share(field, pool, model_name, model)
        if sentence:
            return Refused(sentence)
        templates[role] = pod_template(
            fleet, role, pool, model_name, model, model_template, settings
        )
    return Rendered(digest(templates), templates)


def _cannot_share(
    field: str, pool: PoolTemplate, model_name: str, model: ResolvedModel
) -> str | None:
    """Why the accelerators of a pod cannot share the model."""
    count, sizes = ranks(pool), model.tensor_parallel_sizes
    if count in sizes:
        return None
    return (
        f"{field}.accelerator.count is {count}, but so many cannot share Model {model_name} "
        f"evenly (tensor parallel); use {', '.join(map(str, sizes))}"
    )


@dataclass(frozen=True)
class Rollback:
    """`tandem rollout undo`: while the spec renders to `origin`, serve `to` instead."""

    origin: str
    to: str


def rollback(fleet: FleetView) -> Rollback | None:
    """The rollback that the fleet's annotation asks for; None for none or an unreadable one."""
    text = fleet.annotations.get(ANNOTATION_ROLLBACK)
    if not text:
        return None
    try:
        parsed = json.loads(text)
        return Rollback(str(parsed["from"]), str(parsed["to"]))
    except (ValueError, KeyError, TypeError):
        return None


def recorded(
    revisions: tuple[RevisionView, ...], pool_uid: str, revision: str
) -> RevisionView | None:
    """A pool's ControllerRevision of that revision."""
    return next((r for r in revisions if r.pool_uid == pool_uid and r.revision == revision), None)


def expired(revisions: list[RevisionView], kept: set[str]) -> list[RevisionView]:
    """A pool's revisions beyond the newest KEPT_REVISIONS, except those that are in use."""
    by_age = sorted(revisions, key=lambda r: r.number, reverse=True)
    return [r for r in by_age[KEPT_REVISIONS:] if r.revision not in kept]
