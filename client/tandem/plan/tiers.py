"""How many tokens of context each cache tier holds, and whether fetching beats computing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from tandem_runtime.roofline.replica import Replica

from tandem.plan.errors import PlanError

_UNITS: Final = {
    "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50,
}  # fmt: skip
_QUANTITY: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)([A-Za-z]*)")


@dataclass(frozen=True)
class Tier:
    """A place for KV cache beside the accelerator's own memory."""

    name: str
    size_bytes: float


@dataclass(frozen=True)
class TierPlan:
    """What a tier of one replica holds."""

    name: str
    size_bytes: float
    tokens: int
    longest_contexts: int
    """Whole contexts of the model's longest length."""


def parse_tier(text: str) -> Tier:
    """`NAME=SIZE`, such as host=64Gi. Raises PlanError."""
    name, equals, size = text.partition("=")
    found = _QUANTITY.fullmatch(size)
    if not equals or not name or found is None or found[2] not in _UNITS:
        raise PlanError(f"{text} is no cache tier: write NAME=SIZE, for example host=64Gi")
    return Tier(name, float(found[1]) * _UNITS[found[2]])


def plan_tiers(
    replica: Replica, tiers: tuple[Tier, ...], context_tokens: int
) -> tuple[TierPlan, ...]:
    """The accelerator's tier first. Beside it each token's KV is kept once, without copies."""
    each = replica.model.kv_token_bytes
    own = replica.kv_capacity_tokens
    plans = [_plan("gpu", own * replica.kv_token_bytes_of_gpu * replica.gpus, own, context_tokens)]
    for tier in tiers:
        tokens = int(tier.size_bytes / each)
        plans.append(_plan(tier.name, tier.size_bytes, tokens, context_tokens))
    return tuple(plans)


def _plan(name: str, size_bytes: float, tokens: int, context_tokens: int) -> TierPlan:
    return TierPlan(name, size_bytes, tokens, tokens // context_tokens)


def fetch_token_s(replica: Replica) -> float:
    """One cached token's KV from host memory, over all the replica's host links."""
    links = replica.gpus * replica.gpu.host_bytes_per_s * replica.efficiency.link
    return replica.model.kv_token_bytes / links
