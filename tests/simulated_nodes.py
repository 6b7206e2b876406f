"""Small simulated clusters whose nodes fail, for tests."""

from __future__ import annotations

from collections.abc import Sequence

from simulated_fleet import REPLICA
from tandem.simulate.engine_spec import EngineSpec
from tandem.simulate.nodes.cluster import Cluster
from tandem.simulate.nodes.failures import Failure
from tandem.simulate.nodes.flow import Demand, Pace
from tandem.simulate.nodes.state import CONDITION, ClusterSpec
from tandem_operator.api.node_health import NodeHealthPolicySpec

DEMAND = Demand(1.0, 2000, 500, 4.0, 0.1)
PACE = Pace(EngineSpec(REPLICA, 16384, 32, keeps_streams=True, slowdown=8.0), DEMAND)
"""Few long streams on slow engines, so that an hour has few requests."""


def active(**changes: object) -> NodeHealthPolicySpec:
    """Everything that the simulated nodes show counts."""
    condition = {"type": CONDITION, "status": "True", "forSeconds": 60}
    spec = {
        "mode": "Active",
        "signals": {"conditions": [condition], "stragglers": {}},
        "deadNodes": {"action": "ForceDelete"},
    }
    return NodeHealthPolicySpec.model_validate(spec | changes)


def cluster(
    nodes: int,
    *,
    failures: Sequence[Failure],
    policy: NodeHealthPolicySpec,
    pace: Pace = PACE,
    spare_nodes: int = 2,
    pool_pods: int = 8,
    rack_nodes: int = 4,
) -> Cluster:
    spec = ClusterSpec(nodes, spare_nodes, pool_pods, rack_nodes, 100.0, 10.0, policy)
    return Cluster(spec, pace, list(failures))
