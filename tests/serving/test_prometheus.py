"""The operator's queries, put to a real Prometheus that scrapes real pods and a real gateway."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_server import PrometheusServer, Target
from tandem_operator.api.pool import PoolSpec, PoolStatus
from tandem_operator.plan.autoscale import PoolPolicy
from tandem_operator.plan.queries import queries, with_answers
from tandem_operator.plan.scaling.policy import Policy
from tandem_operator.plan.scaling.window import Load, PoolWindow
from tandem_operator.plan.views import PoolView
from tandem_operator.prometheus import Prometheus
from tandem_runtime import contract
from tandem_runtime.checkpoint.tiny import write_tiny
from tandem_runtime.contract import Role

NAMESPACE = "team"
WINDOW_S = 600.0
"""Longer than the test: all that it does is in the window."""
HELD = 3
NO_LOAD = Load(0.0, 0.0, 0.0, 0.0, 0.0)
PROMPTS = [f"{n} things to know about the sea. " * (4 + n) for n in range(8)]


def policy(role: Any) -> PoolPolicy:
    spec = PoolSpec.model_validate({"fleetRef": {"name": "chat"}, "role": role, "revision": "r1"})
    pool = PoolView(NAMESPACE, f"chat-{role}", role, "fleet", False, 1, spec, PoolStatus(), {})
    return PoolPolicy(pool, Policy(role, 1, 4, window_s=WINDOW_S), False, 95, 95)


@pytest.fixture
def split(start_pod: Callable[..., Any], tmp_path: Path) -> tuple[Any, Any]:
    """A prefill and a decode pod of a tiny model, at a stated pace: streams last however fast the
    machine is."""
    write_tiny(tmp_path / "tiny")
    flags = ("--model-uri", f"file://{tmp_path}/tiny", "--pace", "mi300x:llama-3.1-70b")
    pods = [
        start_pod(f"{role.value}-0", role, *flags, wait=False)
        for role in (Role.PREFILL, Role.DECODE)
    ]
    prefill, decode = (pod.wait_ready() for pod in pods)
    return prefill, decode


@pytest.fixture
def prometheus(
    prometheus_binary: Path, tmp_path: Path, gateway: Any, split: tuple[Any, Any]
) -> Iterator[PrometheusServer]:
    prefill, decode = split
    gateway.show(prefill.view(), decode.view())
    server = PrometheusServer(prometheus_binary, tmp_path)
    server.scrape(
        Target(url.removeprefix("http://"), NAMESPACE, pod)
        for url, pod in (
            (prefill.url, "chat-prefill-r1-0"),
            (decode.url, "chat-decode-r1-0"),
            (gateway.url, "tandem-gateway-1"),
        )
    )
    server.start()
    yield server
    server.stop()


def seen(server: PrometheusServer, role: Any) -> Load:
    """The load as the operator would read it."""
    wanted = queries(policy(role), "chat")

    async def ask() -> dict[str, Any]:
        prometheus = Prometheus(server.url)
        return {signal: await prometheus.ask(query) for signal, query in wanted.items()}

    window = PoolWindow(WINDOW_S, 1, 1, (), 0, (), NO_LOAD)
    window, trouble = with_answers(window, f"chat-{role}", asyncio.run(ask()))
    assert trouble is None, trouble
    assert window.load is not None
    return window.load


def samples(url: str) -> dict[tuple[str, str], float]:
    """What a process exposes, by name and bucket."""
    text = httpx.get(url + contract.PATH_METRICS, timeout=10).text
    return {
        (sample.name, sample.labels.get("le", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def stretch(server: PrometheusServer, series: str) -> float:
    """How much more than what grew a rate may say: it reaches beyond its scrapes, by half a gap
    between them at the beginning and up to 1.1 at the end. A busy machine scrapes seldom."""
    (found,) = server.query(f"{series}[{WINDOW_S:g}s]")
    return 1.0 + 1.6 / (len(found["values"]) - 1)


def bucket_ms(
    before: dict[tuple[str, str], float], after: dict[tuple[str, str], float], metric: str
) -> tuple[float, float]:
    """The bounds of the bucket with the 95th percentile of what came between."""
    name = f"{metric}_bucket"
    bounds = sorted(float(le) for found, le in after if found == name)
    grown = {
        float(le): after[key] - before.get(key, 0.0)
        for key in after
        for found, le in [key]
        if found == name
    }
    index = next(i for i, bound in enumerate(bounds) if grown[bound] >= 0.95 * grown[bounds[-1]])
    return (1000 * bounds[index - 1] if index else 0.0), 1000 * bounds[index]


def test_prometheus_says_what_pods_and_gateway_measured(
    prometheus: PrometheusServer,
    gateway: Any,
    split: tuple[Any, Any],
    traced_chat: Callable[..., Any],
) -> None:
    prefill, decode = split
    up = "count(up == 1)"

    def streams_measured(at_least: float) -> bool:
        found = prometheus.query(f'{contract.METRIC_TTFT}_count{{fleet="chat"}}')
        return bool(found) and float(found[0]["value"][1]) >= at_least

    until(lambda: prometheus.query(up)[:1] != [] and prometheus.query(up)[0]["value"][1] == "3")
    # A counter counts from its first scrape on: there has to be one before what is measured.
    prefill_before = samples(prefill.url)
    warm = traced_chat(gateway.url, "Hello.", 4)
    until(lambda: streams_measured(1))
    gateway_before = samples(gateway.url)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda prompt: traced_chat(gateway.url, prompt, 8), PROMPTS))
    gateway_after, prefill_after = samples(gateway.url), samples(prefill.url)
    measured = gateway_after[f"{contract.METRIC_TTFT}_count", ""]
    until(lambda: streams_measured(measured))

    def idle() -> bool:
        return seen(prometheus, "decode").streams == 0

    until(idle)
    for role, metric, value in (
        ("prefill", contract.METRIC_TTFT, seen(prometheus, "prefill").ttft_ms),
        ("decode", contract.METRIC_TPOT, seen(prometheus, "decode").tpot_ms),
    ):
        low_ms, high_ms = bucket_ms(gateway_before, gateway_after, metric)
        assert value is not None
        assert low_ms <= value <= high_ms, (role, value, low_ms, high_ms)

    total, cached = (
        prefill_after[f"{metric}_total", ""] - prefill_before[f"{metric}_total", ""]
        for metric in (contract.METRIC_PROMPT_TOKENS, contract.METRIC_CACHED_TOKENS)
    )
    asked = [warm, *answers]
    assert total - cached <= sum(answer["usage"]["prompt_tokens"] for answer in asked)
    most = stretch(prometheus, f'{contract.METRIC_PROMPT_TOKENS}_total{{pod="chat-prefill-r1-0"}}')
    tokens = seen(prometheus, "prefill").prompt_tokens
    assert 0 < total - most * cached <= tokens * 1.001
    assert tokens <= (most * total - cached) * 1.001

    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
    with client, ExitStack() as held:
        for number in range(HELD):
            stream = client.completions.create(
                model="smollm2-135m",
                prompt=f"Once upon a time there were {number}",
                max_tokens=4000,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            held.callback(stream.close)
            next(iter(stream))
        until(lambda: seen(prometheus, "decode").streams == HELD)
    until(idle)
    decode.wait_empty()
