"""From a fleet's spec and the ScalingPolicies to what the law is asked for each of its pools."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tandem_operator.api.fleet import Objective, Objectives, PoolTemplate, Scaling
from tandem_operator.api.scaling_policy import ScalingPolicySpec
from tandem_operator.names import Reason
from tandem_operator.plan.scaling.policy import DEFAULT_TPOT_MS, DEFAULT_TTFT_MS, Policy
from tandem_operator.plan.schedules import Field, least_gpus, schedule_fault, schedules_of
from tandem_operator.plan.views import FleetView, PoolView, ScalingPolicyView

if TYPE_CHECKING:
    from tandem_operator.plan.scaled import Scaled


@dataclass(frozen=True)
class Trouble:
    """Why a pool is not scaled."""

    reason: Reason
    sentence: str


@dataclass(frozen=True)
class PoolPolicy:
    """How one pool is to scale."""

    pool: PoolView
    law: Policy
    shadow: bool
    ttft_percentile: int
    tpot_percentile: int
    promql: Mapping[str, str] = field(default_factory=dict)
    """The policy's own queries, by signal."""


@dataclass(frozen=True)
class Group:
    """Pools that share one budget; a pool without one is alone."""

    pools: Mapping[str, PoolPolicy]
    budget_gpus: int | None = None


@dataclass(frozen=True)
class Scalings:
    """All autoscaled pools of a fleet: those that can be, and why the others cannot."""

    groups: tuple[Group, ...] = ()
    troubles: Mapping[str, Trouble] = field(default_factory=dict)
    """By pool name."""


def field_of(pool: PoolView) -> Field:
    """The field of a fleet's spec, and of a schedule, that is this pool."""
    return "prefill" if pool.spec.role == "prefill" else "decode"


def template_of(fleet: FleetView, pool: PoolView) -> PoolTemplate | None:
    """The part of the fleet's spec that is this pool."""
    return fleet.spec.prefill if field_of(pool) == "prefill" else fleet.spec.decode


def scalings(
    fleet: FleetView,
    pools: Iterable[PoolView],
    policies: Iterable[ScalingPolicyView],
    *,
    prometheus: bool,
) -> Scalings:
    """How the fleet's pools scale; `prometheus`: whether there is one to ask."""
    known = {policy.name: policy.spec for policy in policies}
    troubles: dict[str, Trouble] = {}
    shared: dict[str | None, dict[str, PoolPolicy]] = {}
    for pool in pools:
        template = template_of(fleet, pool)
        if template is None or template.scaling is None:
            continue
        ref, spec = template.scaling.policy_ref, ScalingPolicySpec()
        if ref is not None:
            trouble = _trouble(ref.name, known.get(ref.name), pool, template.scaling, prometheus)
            if trouble is not None:
                troubles[pool.name] = trouble
                continue
            spec = known[ref.name]
        group = shared.setdefault(ref.name if ref is not None else None, {})
        group[pool.name] = _pool_policy(fleet, pool, template, spec)
    groups: list[Group] = []
    for name, members in shared.items():
        budget = known[name].gpu_budget if name is not None else None
        trouble = _budget_trouble(name, members, budget)
        if trouble is None:
            groups.append(Group(members, budget))
        else:
            troubles |= dict.fromkeys(members, trouble)
    return Scalings(tuple(groups), troubles)


def _trouble(
    name: str, spec: ScalingPolicySpec | None, pool: PoolView, own: Scaling, prometheus: bool
) -> Trouble | None:
    """Why a pool with the bounds `own` cannot follow the policy of that name."""
    keeps = f"Pool {pool.name} keeps its size"
    if spec is None:
        return Trouble(
            Reason.POLICY_NOT_FOUND,
            f"ScalingPolicy {name} does not exist in namespace {pool.namespace}; {keeps}. Create "
            "the policy, or remove policyRef",
        )
    if spec.promql is not None and not prometheus:
        return Trouble(
            Reason.PROMETHEUS_MISSING,
            f"ScalingPolicy {name} has promql, and the operator knows no Prometheus; {keeps}. Set "
            "TANDEM_PROMETHEUS_URL of the operator, or remove promql",
        )
    fault = schedule_fault(spec, field_of(pool), own)
    if fault is not None:
        return Trouble(Reason.SCHEDULE_UNUSABLE, f"ScalingPolicy {name}: {fault}; {keeps}")
    return None


def _budget_trouble(
    name: str | None, members: Mapping[str, PoolPolicy], budget: int | None
) -> Trouble | None:
    least, schedule = least_gpus(member.law for member in members.values())
    if budget is None or least <= budget:
        return None
    return Trouble(
        Reason.BUDGET_TOO_SMALL,
        f"minReplicas of {', '.join(sorted(members))} take {least} GPUs"
        f"{f' in schedule {schedule}' if schedule else ''}, and gpuBudget of "
        f"ScalingPolicy {name} is {budget}; the pools keep their sizes. Raise gpuBudget, or lower "
        "minReplicas",
    )


def _pool_policy(
    fleet: FleetView, pool: PoolView, template: PoolTemplate, spec: ScalingPolicySpec
) -> PoolPolicy:
    bounds = template.scaling
    assert bounds is not None
    objectives = spec.objectives or fleet.spec.objectives or Objectives()
    ttft, tpot = objectives.time_to_first_token, objectives.time_per_output_token
    role = pool.spec.role
    hold = spec.windows.hold_seconds
    law = Policy(
        role=role,
        min_replicas=bounds.min_replicas,
        max_replicas=bounds.max_replicas,
        ttft_ms=_target(ttft, DEFAULT_TTFT_MS),
        tpot_ms=_target(tpot, DEFAULT_TPOT_MS),
        high_percent=spec.bands.high_percent,
        low_percent=spec.bands.low_percent,
        tolerance_percent=spec.bands.tolerance_percent,
        window_s=float(spec.windows.load_seconds),
        hold_s=None if hold is None else float(hold),
        startup_s=float(spec.windows.startup_seconds),
        forecast_percent=spec.forecast.percent,
        out_step=spec.steps.scale_out.replicas,
        out_step_percent=spec.steps.scale_out.percent,
        in_step=spec.steps.scale_in.replicas,
        in_step_percent=spec.steps.scale_in.percent,
        in_interval_s=float(spec.steps.scale_in.interval_seconds),
        idle_s=float(spec.windows.idle_seconds) if bounds.min_replicas == 0 else None,
        gpus_per_replica=template.accelerator.count if template.accelerator else 1,
        schedules=schedules_of(spec, field_of(pool)),
    )
    promql = spec.promql.model_dump(by_alias=True, exclude_none=True) if spec.promql else {}
    shadow = spec.mode == "Shadow"
    return PoolPolicy(pool, law, shadow, _percentile(ttft), _percentile(tpot), promql)


def wakeable(
    fleets: Iterable[FleetView], scaled: Mapping[str, Mapping[str, Scaled]]
) -> dict[str, tuple[str, ...]]:
    """The names of the fleets whose decode pool is woken from zero, by fleet; `scaled` are the last
    decisions by fleet and pool."""
    found = {}
    for fleet in fleets:
        scaling = fleet.spec.decode.scaling
        last = scaled.get(fleet.name, {}).get(f"{fleet.name}-decode")
        stands = last is not None and (last.shadow or last.trouble is not None)
        if scaling is not None and scaling.min_replicas == 0 and not stands:
            found[fleet.name] = fleet.status.served_names or ()
    return found


def _target(objective: Objective | None, default_ms: float) -> float:
    return default_ms if objective is None else float(objective.target_milliseconds)


def _percentile(objective: Objective | None) -> int:
    return 95 if objective is None else objective.percentile
