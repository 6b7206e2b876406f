"""The fluid mode beside the request-level mode: the same 16 nodes, the same pods, an hour."""

from __future__ import annotations

from dataclasses import replace

import pytest
from simulated_nodes import DEMAND, PACE, active, cluster
from tandem.simulate.nodes.failures import Failure, Kind
from tandem.simulate.nodes.flow import Pace
from tandem.simulate.played import PlayedWorld
from tandem.simulate.pool import PoolSpec
from tandem.simulate.report import summarise
from tandem.simulate.run import Setup
from tandem.traces.synthetic import Kind as Load
from tandem.traces.synthetic import Synthetic, make_trace

HOUR_S = 3600.0
POINTS = 0.03
"""How far attainment may differ: three points of a hundred."""
FAILURES = [
    Failure(300.0, Kind.DIES, 2, 1.0, 0.0, 1800.0),
    Failure(600.0, Kind.STRAGGLES, 5, 1.6, 0.0, 1800.0),
    Failure(1200.0, Kind.DEGRADES, 9, 1.0, 600.0, 1800.0),
    Failure(1500.0, Kind.DIES, 11, 1.0, 0.0, 1800.0),
    Failure(1510.0, Kind.DIES, 12, 1.0, 0.0, 1800.0),
    Failure(2400.0, Kind.DIES, 7, 1.0, 0.0, 1800.0),
]


@pytest.mark.parametrize("share", [0.8, 1.0, 1.3])
def test_an_hour_of_sixteen_nodes(share: float) -> None:
    per_s = share * PACE.largest_rate(pods=14) * 14
    pace = Pace(PACE.spec, replace(DEMAND, requests_per_s=per_s, crash_pause_s=0.0))
    fluid = cluster(16, spare_nodes=2, pool_pods=14, pace=pace, policy=active(),
                    failures=FAILURES)  # fmt: skip
    pods = list(fluid.pools[0].pods)
    fluid.run(HOUR_S)
    pool = fluid.pools[0]
    assert {e.what for e in pool.course} >= {"dies", "slows", "leaves", "serves"}

    setup = Setup(
        pools=(PoolSpec("decode", "both", PACE.spec, 14, 100.0, DEMAND.expiry_s),),
        ttft_s=DEMAND.ttft_s,
        tpot_s=DEMAND.tpot_s,
    )
    load = Synthetic(Load.POISSON, per_s, per_s, HOUR_S, DEMAND.prompt_tokens, DEMAND.output_tokens)
    run = PlayedWorld(setup, make_trace(load, 1), pods, pool.course).run()

    flow = pool.flow
    summary = summarise(run)
    print(share, flow.attained / flow.offered, summary.attained, pool.fewest)
    # Capacity over time: pods that serve, at every look.
    serving, at = {pod: 1.0 for pod in pods}, 0
    for sample in run.samples:
        while at < len(pool.course) and pool.course[at].at_s <= sample.at_s:
            event = pool.course[at]
            at += 1
            if event.what in ("serves", "slows"):
                serving[event.pod] = event.factor
            else:
                serving.pop(event.pod, None)
        if sample.at_s <= HOUR_S:
            assert sample.ready[0] == len(serving)
    assert summary.offered == pytest.approx(flow.offered, rel=0.02)
    assert summary.attained == pytest.approx(flow.attained / flow.offered, abs=POINTS)
