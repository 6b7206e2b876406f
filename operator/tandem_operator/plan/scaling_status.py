"""What a fleet and its Pools say of their autoscaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tandem_operator.api.meta import Judgement, find_condition
from tandem_operator.api.pool import PoolScaling
from tandem_operator.names import Condition, Reason
from tandem_operator.plan.autoscale import template_of
from tandem_operator.plan.scaled import Scaled
from tandem_operator.plan.views import FleetView, PoolView


def scaling_status(fleet: FleetView, pool: PoolView, scaled: Scaled | None) -> PoolScaling | None:
    """An autoscaled Pool's part of the status; what an operator before this one wrote stays until
    this one has decided."""
    template = template_of(fleet, pool)
    if template is None or template.scaling is None:
        return None
    return scaled.published if scaled is not None else pool.status.scaling


def scaling_judgement(
    fleet: FleetView, pools: Sequence[PoolView], scaled: Mapping[str, Scaled]
) -> list[Judgement]:
    """ScalingActive, of a fleet that has an autoscaled pool."""
    names = sorted(
        pool.name
        for pool in pools
        if pool.owner_uid == fleet.uid
        and (template := template_of(fleet, pool)) is not None
        and template.scaling is not None
    )
    templates = (fleet.spec.prefill, fleet.spec.decode)
    if not any(template is not None and template.scaling is not None for template in templates):
        return []
    if not names or any(name not in scaled for name in names):
        return [_before(fleet)]
    troubles = [t for name in names if (t := scaled[name].trouble) is not None]
    if troubles:
        sentences = "; ".join(dict.fromkeys(t.sentence for t in troubles))
        return [Judgement(Condition.SCALING_ACTIVE, False, troubles[0].reason, sentences)]
    shadow = [name for name in names if scaled[name].shadow]
    if shadow:
        sentence = (
            f"{', '.join(shadow)}: decisions are reported in the Pool's status and not carried out"
        )
        return [Judgement(Condition.SCALING_ACTIVE, False, Reason.SHADOW, sentence)]
    sentence = f"{', '.join(names)} follow their load"
    return [Judgement(Condition.SCALING_ACTIVE, True, Reason.SCALING, sentence)]


def _before(fleet: FleetView) -> Judgement:
    """What was said last: after a restart, until the first look."""
    last = find_condition(fleet.status.conditions, Condition.SCALING_ACTIVE)
    if last is None:
        sentence = "the load has not been looked at yet"
        return Judgement(Condition.SCALING_ACTIVE, None, Reason.NO_MEASUREMENT, sentence)
    status = {"True": True, "False": False}.get(last.status)
    return Judgement(Condition.SCALING_ACTIVE, status, last.reason, last.message)
