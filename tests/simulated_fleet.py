"""Small simulated fleets that tests share."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.simulate.engine_spec import EngineSpec
from tandem.simulate.pool import PoolSpec
from tandem.simulate.run import Setup
from tandem.traces.trace import Trace
from tandem_runtime.roofline.gpus import find_gpu
from tandem_runtime.roofline.known import find_model
from tandem_runtime.roofline.model import ServedModel
from tandem_runtime.roofline.replica import Replica

REPLICA = Replica(ServedModel(find_model("llama-3.1-8b")), find_gpu("H100"), 1)


def engine_spec(
    *,
    keeps_streams: bool = True,
    chunk_tokens: int = 2048,
    max_running: int = 64,
    capacity_tokens: int | None = None,
) -> EngineSpec:
    spec = EngineSpec(REPLICA, chunk_tokens, max_running, keeps_streams)
    if capacity_tokens is not None:
        object.__setattr__(spec, "capacity_tokens", capacity_tokens)
    return spec


def split_fleet(
    prefill: int = 1,
    decode: int = 1,
    *,
    seed: int = 0,
    failures_s: float | None = None,
    expiry_s: float = 30.0,
    startup_s: float = 20.0,
    chunk_tokens: int = 2048,
    max_running: int = 64,
    capacity_tokens: int | None = None,
) -> Setup:
    """A prefill and a decode pool of an 8B model on H100s."""
    first, second = (
        engine_spec(
            keeps_streams=keeps,
            chunk_tokens=chunk_tokens,
            max_running=max_running,
            capacity_tokens=capacity_tokens,
        )
        for keeps in (False, True)
    )
    return Setup(
        pools=(
            PoolSpec("prefill", "prefill", first, prefill, startup_s, expiry_s),
            PoolSpec("decode", "decode", second, decode, startup_s, expiry_s),
        ),
        ttft_s=1.0,
        tpot_s=0.025,
        expiry_s=expiry_s,
        failures_s=failures_s,
        seed=seed,
    )


def one_pool(replicas: int = 1, *, startup_s: float = 20.0) -> Setup:
    """One pool that does both."""
    pool = PoolSpec("decode", "both", engine_spec(), replicas, startup_s, 30.0)
    return Setup(pools=(pool,), ttft_s=1.0, tpot_s=0.025)


def trace_of(rows: Sequence[tuple[float, int, int]], duration_s: float | None = None) -> Trace:
    """(arrival, prompt tokens, output tokens) of each request."""
    rows = sorted(rows)
    return Trace(
        name="made",
        arrival_s=[row[0] for row in rows],
        prompt_tokens=[row[1] for row in rows],
        output_tokens=[row[2] for row in rows],
        duration_s=max([0.0, *(row[0] for row in rows)]) if duration_s is None else duration_s,
    )
