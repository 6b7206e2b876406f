"""Sizes follow from load and objectives; what cannot be done is said in a sentence."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.plan.fleet import FleetPlan, Question, plan_fleet
from tandem.plan.load import Limits, Load, Targets
from tandem.plan.queueing import erlang_c, wait_quantile_s
from tandem.plan.tiers import Tier, parse_tier
from tandem_runtime.roofline.errors import RooflineError
from tandem_runtime.roofline.gpus import GPUS, find_gpu
from tandem_runtime.roofline.model import ServedModel, model_from_numbers, read_model
from tandem_runtime.roofline.replica import Efficiency, Replica

MODEL_8B = model_from_numbers(params=8e9, layers=32, heads=32, kv_heads=8, head_dim=128)
LOAD = Load(requests_per_s=10, prompt_tokens=1000, output_tokens=200)
TARGETS = Targets(first_token_s=0.5, output_token_s=0.025)


def plan(load: Load = LOAD, targets: Targets = TARGETS, gpu: str = "H100") -> FleetPlan:
    tiers = (Tier("host", 64 * 2**30),)
    return plan_fleet(Question(ServedModel(MODEL_8B), find_gpu(gpu), load, targets, tiers=tiers))


@settings(deadline=None)
@given(
    rate=st.floats(0.01, 2000),
    prompt=st.integers(1, 20_000),
    output=st.integers(1, 4000),
    gpu=st.sampled_from(sorted(GPUS)),
)
def test_a_plan_keeps_its_objectives_and_no_smaller_pool_does(
    rate: float, prompt: int, output: int, gpu: str
) -> None:
    targets = Targets(5, 0.2)
    load = Load(rate, prompt, output)
    fleet = plan(load, targets, gpu)
    prefill, decode = fleet.prefill, fleet.decode
    assert prefill.first_token_s <= targets.first_token_s
    assert prefill.busy < 1
    assert decode.output_token_s <= targets.output_token_s
    assert decode.high_batch <= decode.max_batch
    produced = decode.replicas * decode.tokens_per_s
    assert produced >= 0.99 * rate * output or decode.mean_batch < 1
    fewer = prefill.replicas - 1
    if fewer:
        wait = wait_quantile_s(fewer, rate, prefill.prompt_s, load.prompt_cv, targets.quantile)
        assert wait + prefill.prompt_s + prefill.handoff_s > targets.first_token_s


@settings(deadline=None)
@given(rate=st.floats(0.1, 500), factor=st.floats(1, 10))
def test_more_load_never_takes_fewer_gpus(rate: float, factor: float) -> None:
    small, large = (plan(replace(LOAD, requests_per_s=r)) for r in (rate, rate * factor))
    assert small.prefill.gpus <= large.prefill.gpus
    assert small.decode.gpus <= large.decode.gpus


def test_pools_are_sized_apart() -> None:
    long_prompts = plan(replace(LOAD, prompt_tokens=8000))
    long_answers = plan(replace(LOAD, output_tokens=1600))
    assert long_prompts.prefill.gpus > 4 * plan().prefill.gpus
    assert long_answers.decode.gpus > plan().decode.gpus
    assert long_answers.prefill.gpus == plan().prefill.gpus


def test_cached_tokens_are_not_computed_but_read() -> None:
    cold, warm = plan(), plan(replace(LOAD, cached_tokens=900))
    assert warm.prefill.prompt_s < cold.prefill.prompt_s / 2
    assert warm.prices.cached_usd < warm.prices.input_usd / 10
    replica = Replica(ServedModel(MODEL_8B), find_gpu("H100"), 1)
    assert replica.prompt_s(100, 900, 2048) > replica.prompt_s(100, 0, 2048)


def test_erlang_c_by_hand() -> None:
    assert erlang_c(1, 0.5) == pytest.approx(0.5)
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(3, 0.0) == 0


def test_waits_grow_without_bound_towards_full_use() -> None:
    assert wait_quantile_s(2, 1.0, 2.0, 1.0, 0.95) == math.inf
    single = wait_quantile_s(1, 0.5, 1.0, 1.0, 0.95)
    assert single == pytest.approx(math.log(0.5 / 0.05) / 0.5)  # M/M/1
    assert wait_quantile_s(1, 0.5, 1.0, 0.0, 0.95) == pytest.approx(single / 2)


def test_a_step_is_linear_in_its_context() -> None:
    replica = Replica(ServedModel(MODEL_8B), find_gpu("H100"), 2)
    step_s = replica.decode_s(16, 16_000)
    assert replica.decode_s(16, 32_000) - step_s == pytest.approx(16_000 * replica.decode_token_s())


def test_gpus_beyond_the_kv_heads_hold_copies() -> None:
    model = ServedModel(MODEL_8B)
    eight, sixteen = (Replica(model, find_gpu("H100"), gpus) for gpus in (8, 16))
    assert eight.kv_token_bytes_of_gpu == sixteen.kv_token_bytes_of_gpu


def test_experts_are_read_as_the_batch_touches_them() -> None:
    shape = model_from_numbers(
        params=47e9, active_params=13e9, layers=32, heads=32, kv_heads=8, head_dim=128,
        experts=8, experts_per_token=2,
    )  # fmt: skip
    model = ServedModel(shape)
    assert shape.layer_params == pytest.approx(13e9)
    assert model.read_bytes(1) == pytest.approx(26e9)
    assert model.read_bytes(100) == pytest.approx(94e9, rel=1e-6)


def test_tiers_hold_tokens() -> None:
    fleet = plan()
    assert [tier.name for tier in fleet.tiers] == ["gpu", "host"]
    assert fleet.tiers[1].tokens == 64 * 2**30 // 131_072
    assert fleet.tiers[0].tokens == fleet.decode.replica.kv_capacity_tokens


@pytest.mark.parametrize("text", ["host", "host=", "host=64GiB", "=64Gi", "host=-1Gi"])
def test_a_bad_tier_is_refused(text: str) -> None:
    with pytest.raises(RooflineError, match="write NAME=SIZE, for example host=64Gi"):
        parse_tier(text)


def test_an_impossible_tpot_says_the_limit() -> None:
    with pytest.raises(RooflineError) as refusal:
        plan(targets=Targets(1, 0.0005))
    assert "under the bandwidth limit: at batch 1 each token streams 16 GB of weights" in str(
        refusal.value
    )
    assert "8 H100 of 26.8 TB/s together cannot do in less than 0.597 ms" in str(refusal.value)


def test_an_impossible_ttft_says_how_long_a_prompt_takes_alone() -> None:
    sentence = r"on 8 H100 100,000 prompt tokens take .* ms even alone"
    with pytest.raises(RooflineError, match=sentence):
        plan(load=Load(1, 100_000, 10), targets=Targets(0.1, 0.05))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Load(0, 10, 10), "give more than 0"),
        (lambda: Load(1, 0, 10), "at least one prompt token"),
        (lambda: Load(1, 10, 10, cached_tokens=10), "at least one token is computed"),
        (lambda: Targets(0, 1), "must be above 0"),
        (lambda: Targets(1, 1, 1.0), "give 50 to 99.9"),
        (lambda: Limits(max_running=0), "must be above 0"),
        (lambda: Efficiency(compute=1.5), "give 0 to 1"),
        (lambda: find_gpu("V100"), "use one of A100, H100"),
        (lambda: ServedModel(MODEL_8B, "fp4"), "none of bf16, fp8"),
        (lambda: read_model(Path("/nowhere")), "cannot be read"),
        (
            lambda: model_from_numbers(
                params=1e9, active_params=2e9, layers=1, heads=1, kv_heads=1, head_dim=2
            ),
            "more than all",
        ),
        (
            lambda: model_from_numbers(
                params=2e9, active_params=1e9, layers=1, heads=1, kv_heads=1, head_dim=2
            ),
            "say how many experts",
        ),
        (
            lambda: model_from_numbers(
                params=2e9, active_params=0.1e9, layers=1, heads=1, kv_heads=1, head_dim=2,
                experts=4, experts_per_token=2,
            ),
            "give fewer experts a token",
        ),
    ],
)  # fmt: skip
def test_bad_numbers_are_refused_with_a_sentence(make: object, sentence: str) -> None:
    assert callable(make)
    with pytest.raises(RooflineError, match=sentence):
        make()
