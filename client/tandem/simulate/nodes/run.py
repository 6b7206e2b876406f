"""The same failures under several policies, and what came of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Final

import yaml
from pydantic import ValidationError
from tandem_operator.api.node_health import NodeHealthPolicySpec

from tandem.simulate.engine_spec import EngineSpec
from tandem.simulate.nodes.cluster import Cluster
from tandem.simulate.nodes.failures import HOUR_S, Failure
from tandem.simulate.nodes.flow import Demand, Pace
from tandem.simulate.nodes.state import CONDITION, ClusterSpec
from tandem.simulate.run import SimulationError

DEFAULT: Final = NodeHealthPolicySpec.model_validate(
    {
        "mode": "Active",
        "signals": {
            "conditions": [{"type": CONDITION, "status": "True", "forSeconds": 60}],
            "stragglers": {},
        },
        "deadNodes": {"action": "ForceDelete"},
    }
)


@dataclass(frozen=True)
class Result:
    """One policy's run."""

    policy: str
    attained: float | None
    """Share of the requests offered within both targets; None: none was offered."""
    offered: float
    interrupted: float
    """Streams whose pod died under them."""
    short_pod_hours: float
    """Hours that pools had fewer pods serving than their size, over all pools."""
    fewest_share: float
    """Of a pool's size, serving at the worst moment."""
    unfilled_pools: int
    """At the end: with fewer pods than asked for, started or not."""
    failures: dict[str, int]
    already_failing: int
    mean_in_repair: float
    most_in_repair: int
    mean_held: float
    over_the_brake: int
    under_the_floor: int
    stragglers_found: int
    found_after_s: float | None
    """Median, from when it became slow."""
    waited_for_node: int
    plans: int
    events: dict[str, int]


def read_node_policy(path: Path) -> NodeHealthPolicySpec:
    """The spec of the NodeHealthPolicy of a file. Raises SimulationError."""
    try:
        bodies = [d for d in yaml.safe_load_all(path.read_text()) if isinstance(d, dict)]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SimulationError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    found = [d for d in bodies if d.get("kind") == "NodeHealthPolicy"]
    if len(found) != 1:
        raise SimulationError(
            f"{path} holds {len(found)} objects of kind NodeHealthPolicy: give a file with exactly "
            "one"
        )
    try:
        return NodeHealthPolicySpec.model_validate(found[0].get("spec") or {})
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(["spec", *map(str, fault["loc"])])
        raise SimulationError(f"{path}: {where}: {fault['msg']}") from error


def policies_of(wanted: NodeHealthPolicySpec) -> dict[str, NodeHealthPolicySpec]:
    """The policy, the same without stragglers, and none at all."""
    blind = wanted.signals.model_copy(update={"stragglers": None})
    return {
        "off": wanted.model_copy(update={"mode": "Off"}),
        "drains": wanted.model_copy(update={"mode": "Active", "signals": blind}),
        "drains and stragglers": wanted.model_copy(update={"mode": "Active"}),
    }


def pace_of(spec: EngineSpec, demand: Demand, load: float, pods: int) -> Pace:
    """With a rate of that share of the largest at which 99 % keep the target.

    Raises SimulationError.
    """
    if not 0 < load < 10:
        raise SimulationError(f"a load of {load:g}: give a share above 0, such as 0.85")
    largest = Pace(spec, demand).largest_rate(pods=pods)
    if not largest > 0:
        raise SimulationError(
            f"no load keeps {1e3 * demand.tpot_s:g} ms a token: raise --tpot-ms or use more GPUs"
        )
    return Pace(spec, replace(demand, requests_per_s=load * largest * pods))


def simulate(
    name: str, spec: ClusterSpec, pace: Pace, failures: Sequence[Failure], duration_s: float
) -> Result:
    """One policy's run."""
    cluster = Cluster(spec, pace, list(failures))
    cluster.run(duration_s)
    pools, counts = cluster.pools, cluster.counts
    offered = sum(pool.flow.offered for pool in pools)
    attained = sum(pool.flow.attained for pool in pools)
    return Result(
        policy=name,
        attained=attained / offered if offered else None,
        offered=offered,
        interrupted=sum(pool.flow.interrupted for pool in pools),
        short_pod_hours=sum(pool.under_s for pool in pools) / HOUR_S,
        fewest_share=min(pool.fewest / pool.size for pool in pools),
        unfilled_pools=sum(len(pool.live) < pool.size for pool in pools),
        failures={str(kind): count for kind, count in sorted(counts.failures.items())},
        already_failing=counts.already_failing,
        mean_in_repair=counts.in_repair_s / duration_s,
        most_in_repair=counts.most_in_repair,
        mean_held=counts.held_s / duration_s,
        over_the_brake=counts.over_the_brake,
        under_the_floor=counts.under_the_floor,
        stragglers_found=len(counts.found_after_s),
        found_after_s=median(counts.found_after_s) if counts.found_after_s else None,
        waited_for_node=counts.waited_for_node,
        plans=counts.plans,
        events=dict(sorted(counts.reasons.items())),
    )


def result_json(result: Result) -> dict[str, object]:
    """For programs."""
    return asdict(result)
