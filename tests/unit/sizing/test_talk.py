"""The figures that the product was asked for, and what the arithmetic says to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tandem.plan.explain import explain
from tandem.plan.fleet import FleetPlan, Question, plan_fleet
from tandem.plan.load import Load, Targets
from tandem_runtime.roofline.errors import RooflineError
from tandem_runtime.roofline.gpus import find_gpu
from tandem_runtime.roofline.model import (
    ModelShape,
    ServedModel,
    model_from_json,
    model_from_numbers,
    read_model,
)
from tandem_runtime.roofline.replica import Replica

LLAMA_405B = Path(__file__).parents[1] / "model" / "llama-3.1-405b.json"
CHAT = Load(requests_per_s=2, prompt_tokens=2000, output_tokens=500)
RELAXED = Targets(first_token_s=4, output_token_s=0.1)


def llama_8b() -> ModelShape:
    values: dict[str, Any] = json.loads(LLAMA_405B.read_text())
    values |= {
        "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32,
    }  # fmt: skip
    return model_from_json(values, "llama-3.1-8b")


def dense_200b() -> ModelShape:
    return model_from_numbers(params=200e9, layers=100, heads=104, kv_heads=8, head_dim=128)


def plan(shape: ModelShape, gpu: str, weights: str, **more: Any) -> FleetPlan:
    return plan_fleet(
        Question(ServedModel(shape, weights), find_gpu(gpu), more.pop("load", CHAT), RELAXED)
    )


def figure(plan: FleetPlan, name: str) -> float:
    (value,) = [line.value for line in explain(plan) if line.name == name]
    return value


def test_a_2k_prompt_on_200b_is_about_1_pflop() -> None:
    load = Load(0.1, 2048, 100)
    fleet = plan(dense_200b(), "B200", "fp8", load=load)
    assert figure(fleet, "prompt, linear layers") == pytest.approx(0.82e15, rel=0.01)
    assert figure(fleet, "prompt, causal attention") == pytest.approx(0.011e15, rel=0.05)


def test_a_32k_prompt_is_16_pflop_and_19_without_the_causal_half() -> None:
    load = Load(0.01, 32_768, 100)
    fleet = plan(dense_200b(), "B200", "fp8", load=load)
    linear = figure(fleet, "prompt, linear layers")
    causal = figure(fleet, "prompt, causal attention")
    assert linear == pytest.approx(13.1e15, rel=0.01)
    assert linear + causal == pytest.approx(15.97e15, rel=0.01)
    assert linear + 2 * causal == pytest.approx(18.8e15, rel=0.01)


def test_1_8t_parameters_at_30_tokens_a_second_stream_about_60_tb_a_second() -> None:
    shape = model_from_numbers(params=1.8e12, layers=120, heads=128, kv_heads=8, head_dim=128)
    fp8 = ServedModel(shape, "fp8").read_bytes(1) * 30
    assert fp8 == pytest.approx(54e12)
    assert 60e12 / find_gpu("H100").memory_bytes_per_s == pytest.approx(18, abs=0.1)


def test_tens_of_trillions_need_200_tb_a_second() -> None:
    shape = model_from_numbers(params=10e12, layers=160, heads=256, kv_heads=8, head_dim=128)
    assert ServedModel(shape, "fp8").read_bytes(1) * 20 == pytest.approx(200e12)
    assert ServedModel(shape, "int4").read_bytes(1) * 35 == pytest.approx(197e12, rel=0.01)


def test_a_model_for_several_buildings_says_what_it_would_take() -> None:
    shape = model_from_numbers(
        params=20e12, layers=160, heads=256, kv_heads=8, head_dim=128, name="giant"
    )
    with pytest.raises(RooflineError) as refusal:
        plan(shape, "H100", "fp8")
    assert str(refusal.value).startswith(
        "giant does not fit a node of 8 H100: 20,000 GB of fp8 weights and the KV of one stream of "
        "2,500 tokens need 260 GPUs of 77 GB usable each, which is 33 nodes"
    )


@pytest.mark.parametrize(
    ("gpu", "weights", "gpus"),
    [("H100", "fp8", 8), ("H200", "fp8", 4), ("H200", "bf16", 8), ("B200", "fp8", 4),
     ("B200", "bf16", 8), ("MI300X", "fp8", 4), ("MI300X", "bf16", 8), ("H100", "int4", 4)],
)  # fmt: skip
def test_llama_405b_runs_on_4_to_8_gpus(gpu: str, weights: str, gpus: int) -> None:
    replica = Replica(ServedModel(read_model(LLAMA_405B), weights), find_gpu(gpu), gpus)
    assert replica.kv_capacity_tokens > 60_000
    if gpus == 4:
        assert plan(read_model(LLAMA_405B), gpu, weights).decode.replica.gpus <= 4


def test_llama_405b_in_bf16_does_not_fit_8_h100() -> None:
    with pytest.raises(RooflineError, match=r"812 GB of bf16 weights .* need 11 GPUs .* 2 nodes"):
        plan(read_model(LLAMA_405B), "H100", "bf16")


def test_output_costs_3_to_4_times_input_at_the_batch_that_chat_reaches() -> None:
    replica = Replica(ServedModel(read_model(LLAMA_405B), "fp8"), find_gpu("H100"), 8)
    token_in = replica.prompt_s(2000, 0, 2048) / 2000

    def ratio(batch: int) -> float:
        return replica.decode_s(batch, batch * 2250) / batch / token_in

    assert ratio(1) > 100  # alone: 10x to 100x and more
    assert 3 < ratio(52) < 4
    assert ratio(52) == pytest.approx(3.9, abs=0.1)
    assert 3 < ratio(70) < 3.2
    assert ratio(143) < 2  # as many as the KV cache holds


@pytest.mark.parametrize(
    ("prompt", "output", "published"),
    [(128, 2048, 22_714), (1000, 1000, 15_220), (2048, 128, 3_450), (2048, 2048, 9_305),
     (5000, 500, 3_459), (20_000, 2000, 1_351)],
)  # fmt: skip
def test_8b_on_an_h100_is_near_the_published_throughput(
    prompt: int, output: int, published: int
) -> None:
    """TensorRT-LLM 1.0, fp8 weights and KV, one H100: output tokens/s of full batches."""
    replica = Replica(ServedModel(llama_8b(), "fp8", "fp8"), find_gpu("H100"), 1)
    batch = min(1024, replica.kv_capacity_tokens // (prompt + output))
    step_s = replica.decode_s(batch, batch * (prompt + output / 2))
    request_s = replica.prompt_s(prompt, 0, 8192) + output * step_s / batch
    assert output / request_s == pytest.approx(published, rel=0.1)
