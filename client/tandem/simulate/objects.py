"""From the objects that users apply to a run's set-up: the fleet's pools and who sizes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from tandem_operator.plan.autoscale import scalings
from tandem_operator.plan.scaling.policy import DEFAULT_TPOT_MS, DEFAULT_TTFT_MS
from tandem_operator.plan.views import (
    FleetView,
    PoolView,
    ScalingPolicyView,
    fleet_view,
    pool_view,
    scaling_policy_view,
)
from tandem_runtime.roofline.gpus import Gpu
from tandem_runtime.roofline.model import ServedModel
from tandem_runtime.roofline.replica import Efficiency, Memory, Replica

from tandem.plan.load import Limits
from tandem.simulate.engine_spec import EngineSpec
from tandem.simulate.pool import PoolSpec, Role
from tandem.simulate.run import DECODE, PREFILL, Setup, SimulationError
from tandem.simulate.scalers import Fixed, LawGroup, OperatorLaw, Scaler

DEFAULT_QUANTILE = 0.95
NAMESPACE = "simulated"
V = TypeVar("V")


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

    def __post_init__(self) -> None:
        """Raises SimulationError."""
        if not 0 <= self.startup_s < math.inf:
            raise SimulationError(f"a start-up of {self.startup_s:g} s: give at least 0")
        if not self.expiry_s > 0:
            raise SimulationError(f"requests that wait for {self.expiry_s:g} s: give more than 0")
        if not 0 < self.slowdown < math.inf:
            raise SimulationError(f"a slowdown of {self.slowdown:g}: give more than 0")
        if self.failures_s is not None and not 0 < self.failures_s < math.inf:
            raise SimulationError(
                f"{self.failures_s:g} s between failures: give more than 0, or leave it out"
            )


def read_fleet(path: Path) -> FleetView:
    """The one InferenceFleet of a YAML file, as the operator sees it. Raises SimulationError."""
    found = _objects(path, "InferenceFleet")
    if len(found) != 1:
        raise SimulationError(
            f"{path} holds {len(found)} objects of kind InferenceFleet: give a file with exactly "
            "one"
        )
    return _parsed(path, fleet_view, found[0])


def read_policies(path: Path) -> tuple[ScalingPolicyView, ...]:
    """The ScalingPolicies of a YAML file. Raises SimulationError."""
    policies = tuple(
        _parsed(path, scaling_policy_view, body) for body in _objects(path, "ScalingPolicy")
    )
    if not policies:
        raise SimulationError(f"{path} holds no object of kind ScalingPolicy")
    for policy in policies:
        bands = policy.spec.bands
        if bands.low_percent >= bands.high_percent:
            raise SimulationError(
                f"{path}: spec.bands of {policy.name}: lowPercent must be under highPercent"
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


def _parsed(path: Path, view: Callable[[Mapping[str, Any]], V], body: Mapping[str, Any]) -> V:
    """An object as the operator reads it from a cluster. Raises SimulationError."""
    metadata = body.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
        raise SimulationError(f"{path}: an object of kind {body['kind']} has no metadata.name")
    live = {"namespace": NAMESPACE, "uid": metadata["name"], "generation": 1,
            "creationTimestamp": "1970-01-01T00:00:00Z"}  # fmt: skip
    try:
        return view({"spec": body.get("spec"), "metadata": metadata | live})
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
    fleet: FleetView,
    setup: Setup,
    policies: Sequence[ScalingPolicyView],
    begins_s: float = 0.0,
) -> Scaler:
    """What the operator makes of the objects: its law for pools with `scaling`; others stay.
    `begins_s`: when the run begins, in Unix seconds.

    Raises SimulationError: the operator would not scale a pool.
    """
    views = [_pool_view(fleet, spec) for spec in setup.pools]
    # Whatever a policy asks Prometheus, the simulation knows.
    found = scalings(fleet, views, policies, prometheus=True)
    for trouble in found.troubles.values():
        raise SimulationError(f"{trouble.sentence} (policies are read from --policy)")
    groups = [
        LawGroup(
            {name: pool.law for name, pool in group.pools.items()},
            group.budget_gpus,
            any(pool.shadow for pool in group.pools.values()),
        )
        for group in found.groups
    ]
    return OperatorLaw(groups, begins_s=begins_s) if groups else Fixed()


def _pool_view(fleet: FleetView, spec: PoolSpec) -> PoolView:
    """The Pool that the operator would make."""
    metadata = {"namespace": NAMESPACE, "name": spec.name, "uid": spec.name, "generation": 1}
    pool = {"fleetRef": {"name": fleet.name}, "role": spec.role, "revision": ""}
    return pool_view({"metadata": metadata, "spec": pool})


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
