"""The gateway over real pods of hash engines: pairs, resumption, drain, and what clients see."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import openai
import pytest
from hash_engine import continuation
from hash_pods import MakePod, Served
from tandem_runtime import contract
from tandem_runtime.contract import Role

TEXT = "The quick brown fox jumps over the lazy dog. " * 3


def prompt_ids(served: Served) -> list[int]:
    from tandem_runtime.frontend.tokenizer import Tokenizer

    return Tokenizer(served.pod.bundle).encode(TEXT)


def expected_text(served: Served, count: int) -> str:
    from tandem_runtime.frontend.tokenizer import Tokenizer

    ids = prompt_ids(served)
    tokenizer = Tokenizer(served.pod.bundle)
    return tokenizer.decode(continuation(ids, count))


async def split_fleet(make_pod: MakePod, decodes: int = 1, **options: Any) -> list[Served]:
    """One prefill pod, then decode pods."""
    prefill = await make_pod(role=Role.PREFILL, pod="prefill-0", **options)
    rest = [await make_pod(role=Role.DECODE, pod=f"decode-{n}", **options) for n in range(decodes)]
    return [prefill, *rest]


def body(max_tokens: int = 20, **fields: Any) -> dict[str, Any]:
    return {
        "model": "hash",
        "prompt": TEXT,
        "max_tokens": max_tokens,
        "temperature": 0,
        "seed": 0,
        **fields,
    }


async def complete(front: Any, max_tokens: int = 20, **fields: Any) -> Any:
    reply = await front.http.post(
        "/v1/completions", json=body(max_tokens, **fields), headers={contract.HEADER_TRACE: "1"}
    )
    assert reply.status_code == 200, reply.text
    return reply.json()


async def stream_text(front: Any, max_tokens: int, started: asyncio.Event | None = None) -> str:
    text = ""
    stream = await front.client.completions.create(**body(max_tokens), stream=True)
    async for chunk in stream:
        text += chunk.choices[0].text
        if started is not None and len(text) > 3:
            started.set()
    return text


class TestPairs:
    async def test_prefill_and_decode_serve_one_request(
        self, front: Any, make_pod: MakePod
    ) -> None:
        prefill, decode = await split_fleet(make_pod)
        front.discovery.show(prefill.view(), decode.view())
        answer = await complete(front)
        assert answer["choices"][0]["text"] == expected_text(decode, 20)
        trace = answer["tandem"]
        assert (trace["prefill_pod"], trace["decode_pod"]) == ("prefill-0", "decode-0")
        tokens = len(prompt_ids(decode))
        assert (trace["handoff_tokens"], trace["handoff_bytes"]) == (tokens, 16 * tokens)
        assert (trace["attempts"], trace["cached_tokens"]) == (1, 0)
        again = await complete(front)
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == tokens // 16 * 16
        assert again["choices"][0]["text"] == answer["choices"][0]["text"]
        await decode.empty()
        await prefill.empty()

    async def test_aggregated_pods(self, front: Any, make_pod: MakePod) -> None:
        pod = await make_pod()
        front.discovery.show(pod.view())
        answer = await complete(front)
        assert answer["choices"][0]["text"] == expected_text(pod, 20)
        assert answer["tandem"]["prefill_pod"] == ""

    async def test_a_conversation_stays_where_its_prefix_is(
        self, front: Any, make_pod: MakePod
    ) -> None:
        pods = [await make_pod(pod=f"pod-{n}") for n in range(3)]
        front.discovery.show(*(pod.view() for pod in pods))
        first = await complete(front, 40)
        generated = continuation(prompt_ids(pods[0]), 40)
        longer = [*prompt_ids(pods[0]), *generated, 1, 2, 3]
        for _ in range(5):
            again = await complete(front, prompt=longer)
            assert again["tandem"]["decode_pod"] == first["tandem"]["decode_pod"]
            assert again["tandem"]["cached_tokens"] >= 160

    async def test_models_and_names(self, front: Any, make_pod: MakePod) -> None:
        one = await make_pod(pod="a", fleet="one", served_names=("m", "n"))
        two = await make_pod(pod="b", fleet="two", served_names=("o", "m"))
        front.discovery.show(
            one.view(created_unix_s=5.0), two.view(created_unix_s=9.0, ready=False)
        )
        models = await front.client.models.list()
        assert [(m.id, m.owned_by) for m in models.data] == [
            ("m", "one"),
            ("n", "one"),
            ("o", "two"),
        ]
        answer = await complete(front, model="m")
        assert answer["tandem"]["decode_pod"] == "a"
        with pytest.raises(openai.NotFoundError, match="served models: m, n, o"):
            await front.client.completions.create(model="x", prompt="x")

    async def test_nobody_ready(self, front: Any, make_pod: MakePod) -> None:
        pod = await make_pod()
        front.discovery.show(pod.view(ready=False))
        with pytest.raises(openai.InternalServerError) as busy:
            await front.client.completions.create(**body())
        assert busy.value.status_code == 503
        assert busy.value.response.headers["retry-after"] == "5"
        assert "1 pods exist, 0 are ready" in str(busy.value)

    async def test_before_the_first_view(self, front: Any) -> None:
        front.discovery.synced = False
        assert (await front.http.get(contract.PATH_READY)).status_code == 503
        with pytest.raises(openai.InternalServerError, match="has not seen any pods yet"):
            await front.client.completions.create(**body())

    async def test_bad_requests_are_the_clients(self, front: Any, make_pod: MakePod) -> None:
        pod = await make_pod()
        front.discovery.show(pod.view())
        with pytest.raises(openai.BadRequestError, match="1024 tokens that this pod's KV"):
            await front.client.completions.create(**body(2000))
        with pytest.raises(openai.BadRequestError, match="context of 8192 tokens"):
            await front.client.completions.create(**body(8192))

    async def test_a_wrong_secret_never_serves(self, front: Any, make_pod: MakePod) -> None:
        pod = await make_pod(secret=b"quite another secret than that")
        front.discovery.show(pod.view())
        with pytest.raises(openai.InternalServerError, match="bearer token does not fit"):
            await front.client.completions.create(**body())


class TestRetry:
    async def test_a_pod_that_is_gone_before_the_first_token(
        self, front: Any, make_pod: MakePod
    ) -> None:
        prefill, one, two = await split_fleet(make_pod, decodes=2)
        front.discovery.show(prefill.view(), one.view(), two.view())
        await complete(front)
        await one.end()
        for _ in range(4):
            answer = await complete(front)
            assert answer["tandem"]["decode_pod"] == "decode-1"
            assert answer["choices"][0]["text"] == expected_text(two, 20)

    async def test_without_a_prefill_pod_the_decode_pod_does_it(
        self, front: Any, make_pod: MakePod
    ) -> None:
        prefill, decode = await split_fleet(make_pod)
        front.discovery.show(prefill.view(), decode.view())
        await prefill.end()
        answer = await complete(front)
        assert answer["choices"][0]["text"] == expected_text(decode, 20)
        assert (answer["tandem"]["attempts"], answer["tandem"]["prefill_pod"]) == (2, "")

    async def test_a_draining_pod_is_left_out(self, front: Any, make_pod: MakePod) -> None:
        prefill, one, two = await split_fleet(make_pod, decodes=2)
        front.discovery.show(prefill.view(), one.view(), two.view())
        await one.http.post(contract.PATH_DRAIN, json={"mode": "drain"})
        for _ in range(4):
            answer = await complete(front)
            assert answer["tandem"]["decode_pod"] == "decode-1"

    async def test_three_failures_are_enough(self, front: Any, make_pod: MakePod) -> None:
        pods = [await make_pod(pod=f"pod-{n}") for n in range(5)]
        front.discovery.show(*(pod.view() for pod in pods))
        await complete(front)
        for pod in pods:
            await pod.end()
        with pytest.raises(openai.InternalServerError) as busy:
            await front.client.completions.create(**body())
        assert busy.value.status_code == 503
        assert "3 attempts failed, the last one because pod" in str(busy.value)

    async def test_all_draining(self, front: Any, make_pod: MakePod) -> None:
        pod = await make_pod()
        front.discovery.show(pod.view())
        await complete(front)
        await pod.http.post(contract.PATH_DRAIN, json={"mode": "drain"})
        with pytest.raises(openai.InternalServerError, match="can serve now"):
            await front.client.completions.create(**body())


class TestResume:
    """A stream whose pod fails in mid-answer: the client sees a pause and the same text."""

    async def test_the_decode_pod_dies(self, front: Any, make_pod: MakePod) -> None:
        prefill, one, two = await split_fleet(make_pod, decodes=2, step_s=0.02)
        front.discovery.show(prefill.view(), one.view(), two.view(leaving=True))
        started = asyncio.Event()
        running = asyncio.create_task(stream_text(front, 60, started))
        await started.wait()
        front.discovery.show(prefill.view(), one.view(), two.view())
        await one.end()
        assert await asyncio.wait_for(running, 20) == expected_text(two, 60)
        await two.empty()
        metrics = (await front.http.get(contract.PATH_METRICS)).text
        assert (
            'tandem_gateway_attempt_failures_total{begun="true",code="unreachable"} 1.0' in metrics
        )

    @pytest.mark.parametrize("front", [{"resume": False}], indirect=True)
    async def test_switched_off(self, front: Any, make_pod: MakePod) -> None:
        """A stream that has begun ends with its pod; one that has not is tried again."""
        one, two = await make_pod(pod="a", step_s=0.02), await make_pod(pod="b")
        front.discovery.show(one.view(), two.view(ready=False))
        started = asyncio.Event()
        running = asyncio.create_task(stream_text(front, 200, started))
        await started.wait()
        front.discovery.show(one.view(), two.view())
        await one.end()
        with pytest.raises(openai.APIError, match="1 attempts failed"):
            await asyncio.wait_for(running, 20)
        assert await stream_text(front, 20) == expected_text(two, 20)

    async def test_the_decode_pod_ends_its_streams(self, front: Any, make_pod: MakePod) -> None:
        prefill, one, two = await split_fleet(make_pod, decodes=2, step_s=0.02)
        front.discovery.show(prefill.view(), one.view(), two.view(leaving=True))
        started = asyncio.Event()
        running = asyncio.create_task(stream_text(front, 60, started))
        await started.wait()
        front.discovery.show(prefill.view(), one.view(leaving=True), two.view())
        await one.http.post(contract.PATH_DRAIN, json={"mode": "end", "deadline_s": 0})
        assert await asyncio.wait_for(running, 20) == expected_text(two, 60)
        await one.empty()

    async def test_it_waits_for_a_pod_to_come(self, front: Any, make_pod: MakePod) -> None:
        pod, other = await make_pod(pod="a", step_s=0.02), await make_pod(pod="b")
        front.discovery.show(pod.view(), other.view(ready=False))
        started = asyncio.Event()
        running = asyncio.create_task(stream_text(front, 60, started))
        await started.wait()
        front.discovery.show(other.view(ready=False))
        await pod.end()
        await asyncio.sleep(0.5)
        assert not running.done()
        front.discovery.show(other.view())
        assert await asyncio.wait_for(running, 20) == expected_text(other, 60)

    async def test_many_streams_move_at_once(self, front: Any, make_pod: MakePod) -> None:
        prefill, one, two = await split_fleet(make_pod, decodes=2, step_s=0.02)
        front.discovery.show(prefill.view(), one.view(), two.view())
        events = [asyncio.Event() for _ in range(8)]
        running = [asyncio.create_task(stream_text(front, 50, event)) for event in events]
        for event in events:
            await event.wait()
        assert one.pod.streams.running
        assert two.pod.streams.running
        await one.end()
        texts = await asyncio.wait_for(asyncio.gather(*running), 30)
        assert set(texts) == {expected_text(two, 50)}

    async def test_a_pod_that_falls_silent(self, front: Any, make_pod: MakePod) -> None:
        """Its process is stopped, its connections stay open: nothing fails by itself."""
        one, two = await make_pod(pod="a", step_s=0.02), await make_pod(pod="b")
        silent = asyncio.Event()

        async def forever(*_: Any) -> None:
            await silent.wait()

        front.discovery.show(one.view(), two.view(leaving=True))
        started = asyncio.Event()
        running = asyncio.create_task(stream_text(front, 500, started))
        await started.wait()
        stuck = threading.Event()
        one.runner.before_step = lambda batch: stuck.wait()
        one.server.app = forever
        front.discovery.show(one.view(), two.view())
        try:
            # Seconds of silence, then the other pod; on a busy machine more of them.
            assert await asyncio.wait_for(running, 60) == expected_text(two, 500)
        finally:
            stuck.set()
            silent.set()

    async def test_a_pod_that_the_api_no_longer_knows(self, front: Any, make_pod: MakePod) -> None:
        one, two = await make_pod(pod="a", step_s=0.05), await make_pod(pod="b")
        front.discovery.show(one.view(), two.view(leaving=True))
        started = asyncio.Event()
        running = asyncio.create_task(stream_text(front, 60, started))
        await started.wait()
        front.discovery.show(two.view())
        assert await asyncio.wait_for(running, 20) == expected_text(two, 60)
        await one.empty()


class TestClientsThatLeave:
    async def test_both_pods_are_freed(self, front: Any, make_pod: MakePod) -> None:
        prefill, decode = await split_fleet(make_pod, step_s=0.02)
        front.discovery.show(prefill.view(), decode.view())
        stream = await front.client.completions.create(**body(500), stream=True)
        await anext(aiter(stream))
        await stream.close()
        await decode.empty()
        await prefill.empty()
        assert front.gateway.backend.streams == 0


class TestState:
    async def test_latency_of_the_last_minute(self, front: Any, make_pod: MakePod) -> None:
        prefill, decode = await split_fleet(make_pod)
        front.discovery.show(prefill.view(), decode.view())
        for _ in range(3):
            await complete(front)
        state = (await front.http.get(contract.PATH_STATE)).json()
        assert (state["pod"], state["ready"], state["streams"]) == ("gateway-0", True, 0)
        latency = state["fleets"]["fleet-1"]
        assert latency["requests"] == 3
        assert 0 < latency["ttft_p50_s"] <= latency["ttft_p95_s"] < 5
        assert 0 < latency["tpot_p50_s"] < 1
        metrics = (await front.http.get(contract.PATH_METRICS)).text
        labels = '{fleet="fleet-1",model_name="hash"}'
        assert f"vllm:time_to_first_token_seconds_count{labels} 3.0" in metrics
        assert f"vllm:request_time_per_output_token_seconds_count{labels} 3.0" in metrics

    async def test_stopping_finishes_streams(self, front: Any, make_pod: MakePod) -> None:
        pod = await make_pod(step_s=0.02)
        front.discovery.show(pod.view())
        started = asyncio.Event()
        running = asyncio.create_task(stream_text(front, 40, started))
        await started.wait()
        front.ended = True
        stopping = asyncio.create_task(front.gateway.stop())
        await asyncio.sleep(0.05)
        assert (await front.http.get(contract.PATH_READY)).status_code == 503
        assert not stopping.done()
        assert await running == expected_text(pod, 40)
        await asyncio.wait_for(stopping, 30)
