"""The plan of a fleet: sizes, latencies, throughput, memory and prices, from one set of numbers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from tandem_runtime.roofline.gpus import Gpu
from tandem_runtime.roofline.model import ServedModel
from tandem_runtime.roofline.replica import Efficiency, Memory, Replica

from tandem.plan.fitting import bandwidth_gpus, fitting_replicas, least_gpus
from tandem.plan.load import Limits, Load, Targets
from tandem.plan.pools import DecodePool, PrefillPool, plan_decode, plan_prefill
from tandem.plan.tiers import Tier, TierPlan, fetch_token_s, plan_tiers

_HOUR_S: Final = 3600.0
_MILLION: Final = 1e6


@dataclass(frozen=True)
class Question:
    """Everything that a plan depends on."""

    model: ServedModel
    gpu: Gpu
    load: Load
    targets: Targets
    limits: Limits = field(default_factory=Limits)
    efficiency: Efficiency = field(default_factory=Efficiency)
    memory: Memory = field(default_factory=Memory)
    tiers: tuple[Tier, ...] = ()


@dataclass(frozen=True)
class Prices:
    """Dollars for a million tokens: the GPUs' time alone."""

    input_usd: float
    """Uncached prompt tokens."""
    cached_usd: float
    """Fetched from host memory while the prefill replica waits; the memory itself is not priced."""
    output_usd: float

    @property
    def output_to_input(self) -> float:
        return self.output_usd / self.input_usd


@dataclass(frozen=True)
class FleetPlan:
    """What keeps the objectives."""

    question: Question
    prefill: PrefillPool
    decode: DecodePool
    tiers: tuple[TierPlan, ...]
    prices: Prices
    """At this load: idle time is paid for too."""
    full_prices: Prices
    """Of replicas that never idle: the least that they can be."""
    memory_gpus: int
    """The fewest GPUs whose memory holds weights and one stream."""
    bandwidth_gpus: int
    """The fewest whose bandwidth streams the weights at the TPOT target, at batch 1."""

    @property
    def gpus(self) -> int:
        return self.prefill.gpus + self.decode.gpus

    @property
    def usd_per_hour(self) -> float:
        return self.gpus * self.question.gpu.usd_per_hour


def plan_fleet(question: Question) -> FleetPlan:
    """The cheapest fleet of the question's model and GPU. Raises PlanError."""
    load, targets, limits = question.load, question.targets, question.limits
    one = Replica(question.model, question.gpu, 1, question.efficiency, question.memory)
    replicas = fitting_replicas(one, load)
    prefill = plan_prefill(replicas, load, targets, limits)
    decode = plan_decode(replicas, load, targets, limits)
    longest = question.model.shape.context_tokens or load.stream_tokens
    return FleetPlan(
        question=question,
        prefill=prefill,
        decode=decode,
        tiers=plan_tiers(decode.replica, question.tiers, longest),
        prices=_prices(prefill, decode, question),
        full_prices=_full_prices(prefill, decode, question),
        memory_gpus=least_gpus(one, load),
        bandwidth_gpus=bandwidth_gpus(one, targets),
    )


def _prices(prefill: PrefillPool, decode: DecodePool, question: Question) -> Prices:
    load, usd = question.load, question.gpu.usd_per_hour
    inputs = load.requests_per_s * load.uncached_tokens * _HOUR_S
    outputs = load.requests_per_s * load.output_tokens * _HOUR_S
    return replace(
        _full_prices(prefill, decode, question),
        input_usd=prefill.gpus * usd / inputs * _MILLION,
        output_usd=decode.gpus * usd / outputs * _MILLION,
    )


def _full_prices(prefill: PrefillPool, decode: DecodePool, question: Question) -> Prices:
    usd_per_s = question.gpu.usd_per_hour / _HOUR_S
    input_s = prefill.prompt_s / question.load.uncached_tokens
    context = question.load.mean_context_tokens
    step_s = decode.replica.decode_s(decode.max_batch, decode.max_batch * context)
    output_s = step_s / decode.max_batch
    return Prices(
        input_usd=prefill.replica.gpus * usd_per_s * input_s * _MILLION,
        cached_usd=prefill.replica.gpus * usd_per_s * fetch_token_s(prefill.replica) * _MILLION,
        output_usd=decode.replica.gpus * usd_per_s * output_s * _MILLION,
    )
