"""How many nodes may be in repair at the same time, and when none may.

A detector that is wrong must not empty a cluster, and a silent control plane must not look like a
hundred dead nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tandem_operator.api.node_health import Brakes, NodeHealthPolicyStatus
from tandem_operator.plan.nodes.signs import NOT_READY, Sign
from tandem_operator.plan.times import to_text, to_unix_s


@dataclass(frozen=True)
class Outage:
    """Too many nodes show the same at once: nothing is begun, and nothing goes further."""

    since: str | None = None
    over: str | None = None
    sentence: str | None = None
    """Why nothing is begun now; None while all is well."""
    calm_in_s: float | None = None


def allowed(brakes: Brakes, carrying: int) -> int:
    """Nodes that may be in repair, of so many that carry pods of Tandem."""
    return max(brakes.max_nodes, carrying * brakes.max_percent // 100)


def outage(
    brakes: Brakes,
    signs: Mapping[str, Sequence[Sign]],
    carrying: frozenset[str],
    before: NodeHealthPolicyStatus,
    now_s: float,
) -> Outage:
    """Whether most nodes show one signal at once, or did a moment ago. `signs` by every node."""
    sentence = _widespread(brakes, signs, carrying)
    if sentence is not None:
        since = before.outage_since if before.outage_over is None else None
        return Outage(since or to_text(now_s), None, sentence)
    if before.outage_since is None:
        return Outage()
    over = before.outage_over or to_text(now_s)
    left_s = brakes.calm_seconds - max(0.0, now_s - to_unix_s(over))
    if left_s <= 0.0:
        return Outage()
    calm = f"waiting {brakes.calm_seconds} s after an outage that was over at {over}"
    return Outage(before.outage_since, over, calm, left_s)


def _widespread(
    brakes: Brakes, signs: Mapping[str, Sequence[Sign]], carrying: frozenset[str]
) -> str | None:
    counts: Counter[str] = Counter()
    local: set[str] = set()
    for shown in signs.values():
        for sign in shown:
            counts[sign.signal] += 1
            if not sign.everywhere:
                local.add(sign.signal)
    for signal, count in sorted(counts.items()):
        of = len(carrying) if signal in local else len(signs)
        most = count >= 2 and count * 100 > brakes.outage_percent * of
        if most or (signal == NOT_READY and count == of):
            return (
                f"{count} of {of} nodes show {signal}: the control plane, the network or the "
                "detector is the likelier fault"
            )
    return None
