"""From the objects that users apply to a run's set-up: the fleet's pools and who sizes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from tandem_operator.api.fleet import (
    FleetSpec,
    Objective,
    Objectives,
    PoolTemplate,
    accelerator_percent,
)
from tandem_operator.api.meta import ApiModel
from tandem_operator.api.scaling_policy import ScalingPolicySpec
from tandem_operator.plan.scaling.policy import DEFAULT_TPOT_MS, DEFAULT_TTFT_MS, Policy

from tandem.plan.gpus import Gpu
from tandem.plan.load import Limits
from tandem.plan.model import ServedModel
from tandem.plan.replica import Efficiency, Memory, Replica
from tandem.simulate.engine_spec import EngineSpec
from tandem.simulate.pool import PoolSpec, Role
from tandem.simulate.run import DECODE, PREFILL, Setup, SimulationError
from tandem.simulate.scalers import Fixed, LawGroup, OperatorLaw, Scaler

DEFAULT_QUANTILE = 0.95
S = TypeVar("S", bound=ApiModel)


@dataclass(frozen=True)
class Hardware:
    """What the fleet's objects do not say."""

    model: ServedModel
    gpu: Gpu
    efficiency: Efficiency = field(default_factory=Efficiency)
    limits: Limits = field(default_factory=Limits)
    startup_s: float = 100.0
    expiry_s: float = 30.0
    look_every_s: float = 10.0
    failures_s: float | None = None
    slowdown: float = 1.0
    seed: int = 0


def read_fleet(path: Path) -> FleetSpec:
    """The one InferenceFleet of a YAML file. Raises SimulationError."""
    found = _objects(path, "InferenceFleet")
    if len(found) != 1:
        raise SimulationError(
            f"{path} holds {len(found)} objects of kind InferenceFleet: give a file with exactly "
            "one"
        )
    return _parsed(path, FleetSpec, found[0])


def read_policies(path: Path) -> dict[str, ScalingPolicySpec]:
    """The ScalingPolicies of a YAML file, by name. Raises SimulationError."""
    found = _objects(path, "ScalingPolicy")
    if not found:
        raise SimulationError(f"{path} holds no object of kind ScalingPolicy")
    policies = {}
    for body in found:
        name = (body.get("metadata") or {}).get("name")
        if not isinstance(name, str):
            raise SimulationError(f"{path}: a ScalingPolicy has no metadata.name")
        spec = policies[name] = _parsed(path, ScalingPolicySpec, body)
        if spec.bands.low_percent >= spec.bands.high_percent:
            raise SimulationError(
                f"{path}: spec.bands of {name}: lowPercent must be under highPercent"
            )
    return policies


def _objects(path: Path, kind: str) -> list[Mapping[str, Any]]:
    """All objects of a kind in a file that may hold others. Raises SimulationError."""
    try:
        documents = list(yaml.safe_load_all(path.read_text()))
    except (OSError, UnicodeDecodeError) as error:
        raise SimulationError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SimulationError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return [d for d in documents if isinstance(d, dict) and d.get("kind") == kind]


def _parsed(path: Path, kind: type[S], body: Mapping[str, Any]) -> S:
    """An object's spec as the operator reads it. Raises SimulationError."""
    try:
        return kind.model_validate(body.get("spec"))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(["spec", *map(str, fault["loc"])])
        raise SimulationError(
            f"{path}: {where}: {fault['msg'][:1].lower()}{fault['msg'][1:]} "
            f"(it is {fault['input']!r})"
        ) from error


def make_setup(fleet: FleetSpec, hardware: Hardware) -> Setup:
    """The run's set-up. Raises SimulationError."""
    objectives = fleet.objectives or Objectives()
    ttft, tpot = objectives.time_to_first_token, objectives.time_per_output_token
    pools = [_pool(DECODE, "decode" if fleet.prefill else "both", fleet.decode, fleet, hardware)]
    if fleet.prefill is not None:
        pools.insert(0, _pool(PREFILL, "prefill", fleet.prefill, fleet, hardware))
    return Setup(
        pools=tuple(pools),
        ttft_s=_target_s(ttft, DEFAULT_TTFT_MS),
        tpot_s=_target_s(tpot, DEFAULT_TPOT_MS),
        ttft_quantile=ttft.percentile / 100 if ttft else DEFAULT_QUANTILE,
        tpot_quantile=tpot.percentile / 100 if tpot else DEFAULT_QUANTILE,
        expiry_s=hardware.expiry_s,
        look_every_s=hardware.look_every_s,
        handoff_bytes_per_s=hardware.limits.handoff_bytes_per_s,
        failures_s=hardware.failures_s,
        seed=hardware.seed,
    )


def make_scaler(
    fleet: FleetSpec, setup: Setup, policies: Mapping[str, ScalingPolicySpec]
) -> Scaler:
    """The operator's law for pools with `scaling`; others keep their size.

    Raises SimulationError: a policy is missing.
    """
    shared: dict[str | None, dict[str, Policy]] = {}
    for spec in setup.pools:
        template = _template(fleet, spec.name)
        if template.scaling is None:
            continue
        ref = template.scaling.policy_ref.name if template.scaling.policy_ref else None
        if ref is not None and ref not in policies:
            raise SimulationError(
                f"spec.{spec.name}.scaling.policyRef names {ref}, which --policy does not hold: "
                "give the file with that ScalingPolicy"
            )
        policy = policies[ref] if ref is not None else ScalingPolicySpec()
        objectives = policy.objectives or fleet.objectives or Objectives()
        shared.setdefault(ref, {})[spec.name] = _law(spec, template, policy, objectives)
    groups = []
    for ref, laws in shared.items():
        policy = policies[ref] if ref is not None else ScalingPolicySpec()
        groups.append(LawGroup(laws, policy.gpu_budget, policy.mode == "Shadow"))
    return OperatorLaw(groups) if groups else Fixed()


def _law(
    spec: PoolSpec, template: PoolTemplate, policy: ScalingPolicySpec, objectives: Objectives
) -> Policy:
    """The law's numbers, as the operator takes them from the same objects."""
    bounds, steps, windows = template.scaling, policy.steps, policy.windows
    assert bounds is not None
    hold = windows.hold_seconds
    return Policy(
        role=spec.role,
        min_replicas=bounds.min_replicas,
        max_replicas=bounds.max_replicas,
        ttft_ms=1e3 * _target_s(objectives.time_to_first_token, DEFAULT_TTFT_MS),
        tpot_ms=1e3 * _target_s(objectives.time_per_output_token, DEFAULT_TPOT_MS),
        high_percent=policy.bands.high_percent,
        low_percent=policy.bands.low_percent,
        tolerance_percent=policy.bands.tolerance_percent,
        window_s=float(windows.load_seconds),
        hold_s=None if hold is None else float(hold),
        startup_s=float(windows.startup_seconds),
        forecast_percent=policy.forecast.percent,
        out_step=steps.scale_out.replicas,
        out_step_percent=steps.scale_out.percent,
        in_step=steps.scale_in.replicas,
        in_step_percent=steps.scale_in.percent,
        in_interval_s=float(steps.scale_in.interval_seconds),
        gpus_per_replica=spec.engine.replica.gpus,
    )


def _template(fleet: FleetSpec, pool: str) -> PoolTemplate:
    return fleet.prefill if pool == PREFILL and fleet.prefill else fleet.decode


def _target_s(objective: Objective | None, default_ms: float) -> float:
    return (objective.target_milliseconds if objective else default_ms) / 1e3


def _pool(
    name: str, role: Role, template: PoolTemplate, fleet: FleetSpec, hardware: Hardware
) -> PoolSpec:
    replica = _replica(name, template, fleet, hardware)
    limits = hardware.limits
    return PoolSpec(
        name=name,
        role=role,
        engine=EngineSpec(
            replica=replica,
            chunk_tokens=limits.chunk_tokens,
            max_running=limits.max_running,
            keeps_streams=role != "prefill",
            slowdown=hardware.slowdown,
        ),
        replicas=_replicas(name, template),
        startup_s=hardware.startup_s,
        expiry_s=hardware.expiry_s,
    )


def _replicas(name: str, template: PoolTemplate) -> int:
    """At the beginning; a pool that nobody sizes has one."""
    if template.replicas is not None and template.scaling is not None:
        raise SimulationError(f"spec.{name}: replicas and scaling exclude each other; remove one")
    if template.scaling is not None:
        scaling = template.scaling
        if scaling.min_replicas > scaling.max_replicas:
            raise SimulationError(
                f"spec.{name}.scaling: minReplicas exceeds maxReplicas; lower one or raise the "
                "other"
            )
        return scaling.min_replicas
    replicas = 1 if template.replicas is None else template.replicas
    if replicas < 1:
        raise SimulationError(f"spec.{name}.replicas is {replicas}: it must be at least 1")
    return replicas


def _replica(name: str, template: PoolTemplate, fleet: FleetSpec, hardware: Hardware) -> Replica:
    """What a pod of the pool is. Raises SimulationError where the model does not fit it."""
    if template.accelerator is None:
        raise SimulationError(
            f"spec.{name} has no accelerator: only pools of GPUs are simulated, since a step's "
            "time comes from a GPU's data sheet; add accelerator"
        )
    gpus, shape = template.accelerator.count, hardware.model.shape
    sizes = [size for size in shape.tensor_parallel_sizes if size <= 64]
    if gpus not in sizes:
        raise SimulationError(
            f"spec.{name}.accelerator.count is {gpus}, but so many GPUs cannot share {shape.name} "
            f"evenly (tensor parallel); use {', '.join(map(str, sizes))}"
        )
    memory = replace(Memory(), kv_share=accelerator_percent(fleet) / 100)
    replica = Replica(hardware.model, hardware.gpu, gpus, hardware.efficiency, memory)
    if not replica.kv_capacity_tokens:
        raise SimulationError(
            f"{shape.name} does not fit {gpus} {hardware.gpu.name}: "
            f"{hardware.model.weight_bytes / 1e9:,.0f} GB of {hardware.model.weights} weights "
            f"leave no room for KV; raise spec.{name}.accelerator.count or use smaller weights"
        )
    return replica
