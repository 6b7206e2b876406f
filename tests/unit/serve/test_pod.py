"""A pod's endpoints: streams for gateways, drain, state, probes, metrics."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from hash_engine import continuation
from hash_pods import PROMPT, SECRET, ask, collect, events, ids
from tandem_runtime import contract
from tandem_runtime.contract import Role
from tandem_runtime.protocol import GenerateRequest, PrefillTarget, TokenizerBundle

Make = Callable[..., Any]


async def counts(pod: Any, *, finished: int = 0, ended: int = 0, failed: int = 0) -> None:
    """Streams by how they ended: by themselves, by whoever asked for them, by a failure."""
    text = (await pod.http.get(contract.PATH_METRICS)).text
    for series, count in (
        ('vllm:request_success_total{engine="0",finished_reason="length",', finished),
        ('vllm:request_success_total{engine="0",finished_reason="abort",', ended),
        ('tandem_request_failures_total{engine="0",', failed),
    ):
        values = [line for line in text.splitlines() if series in line]
        assert [float(line.split()[-1]) for line in values] == [count] * bool(count), series


class TestGenerate:
    async def test_events_of_a_stream(self, make_pod: Make) -> None:
        pod = await make_pod()
        received = await collect(pod, ask())
        assert ids(received) == continuation(PROMPT, 5)
        assert received[0].prompt_tokens == 50
        assert received[-1].finish_reason == "length"
        assert all(event.epoch == 0 and event.error is None for event in received)
        again = await collect(pod, ask(stream="t"))
        assert again[0].cached_tokens == 48
        await pod.empty()

    async def test_a_resumed_stream(self, make_pod: Make) -> None:
        pod = await make_pod()
        whole = continuation(PROMPT, 8)
        received = await collect(pod, ask(epoch=3, max_tokens=8, output_ids=whole[:5]))
        assert ids(received) == whole[5:]
        assert {event.epoch for event in received} == {3}
        ended = await collect(pod, ask(epoch=4, max_tokens=5, output_ids=whole[:5]))
        assert [(e.token_ids, e.finish_reason) for e in ended] == [((), "length")]

    async def test_logprobs(self, make_pod: Make) -> None:
        pod = await make_pod()
        received = await collect(pod, ask(logprobs=2))
        for event in received:
            assert len(event.logprobs) == len(event.top_logprobs) == len(event.token_ids)
            assert [entry.token_id for entry in event.logprobs] == list(event.token_ids)
            assert all(len(top) == 2 for top in event.top_logprobs)

    @pytest.mark.parametrize("decode_role", [Role.DECODE])
    async def test_prefill_here_decode_there(self, make_pod: Make, decode_role: Role) -> None:
        prefill = await make_pod(role=Role.PREFILL, pod="prefill-0")
        decode = await make_pod(role=decode_role, pod="decode-0")
        received = await collect(decode, ask(prefill=prefill.target))
        assert ids(received) == continuation(PROMPT, 5)
        handoff = received[0].handoff
        assert handoff is not None
        assert (handoff.prefill_pod, handoff.tokens, handoff.bytes) == ("prefill-0", 50, 50 * 16)
        alone = await collect(decode, ask(stream="t"))
        assert ids(alone) == ids(received), "a decode pod computes a prompt when nobody else does"
        await decode.empty()
        await prefill.empty()

    @pytest.mark.parametrize(
        ("request_", "sentence"),
        [
            (ask(prefill=PrefillTarget("p", "127.0.0.1", 1)), "takes no KV from others"),
            (ask(take_from=PrefillTarget("p", "127.0.0.1", 1)), "takes no streams from others"),
        ],
    )
    async def test_without_a_secret_there_are_no_others(
        self, make_pod: Make, request_: GenerateRequest, sentence: str
    ) -> None:
        served = await make_pod(secret=b"")
        [event] = [event async for event in served.pod.streams.generate(request_)]
        assert (event.error_code, event.retryable) == ("bad_request", False)
        assert sentence in (event.error or "")

    @pytest.mark.parametrize(
        ("request_", "code", "sentence", "retryable"),
        [
            (ask([], stream="x"), "bad_request", "the prompt is empty", False),
            (ask([999], stream="x"), "bad_request", "token id 999 is not in", False),
            (ask(max_tokens=9000), "bad_request", "more than the context of 8192", False),
            (ask(max_tokens=2000), "bad_request", "1024 tokens that this pod's KV", False),
        ],
    )
    async def test_what_cannot_be_served(
        self, make_pod: Make, request_: GenerateRequest, code: str, sentence: str, retryable: bool
    ) -> None:
        pod = await make_pod()
        [event] = await collect(pod, request_)
        assert (event.error_code, event.retryable) == (code, retryable)
        assert sentence in (event.error or "")
        await pod.empty()

    async def test_a_prefill_pod_that_is_gone(self, make_pod: Make) -> None:
        decode = await make_pod(role=Role.DECODE)
        [event] = await collect(decode, ask(prefill=PrefillTarget("p", "127.0.0.1", 1)))
        assert (event.error_code, event.retryable) == ("prefill_lost", True)
        await decode.empty()

    async def test_a_full_queue(self, make_pod: Make) -> None:
        pod = await make_pod(step_s=0.2)
        streams = [asyncio.create_task(collect(pod, ask(stream=f"s{n}"))) for n in range(4)]
        while pod.pod.streams.waiting < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        [event] = await collect(pod, ask(stream="one too many"))
        assert (event.error_code, event.retryable) == ("overloaded", True)
        assert "4 streams wait on this pod already" in (event.error or "")
        assert all(
            ids(received) == continuation(PROMPT, 5) for received in await asyncio.gather(*streams)
        )

    async def test_a_newer_attempt_ends_the_older_one(self, make_pod: Make) -> None:
        pod = await make_pod(step_s=0.02)
        older = asyncio.create_task(collect(pod, ask(epoch=1, max_tokens=200)))
        await asyncio.sleep(0.1)
        newer = await collect(pod, ask(epoch=2))
        assert ids(newer) == continuation(PROMPT, 5)
        last = (await older)[-1]
        assert "a newer attempt" in (last.error or "")
        running = asyncio.create_task(collect(pod, ask(epoch=4, max_tokens=50)))
        await asyncio.sleep(0.1)
        [refused] = await collect(pod, ask(epoch=3))
        assert "older than one that runs" in (refused.error or "")
        assert len(ids(await running)) == 50

    async def test_a_gateway_that_hangs_up_cancels(self, make_pod: Make) -> None:
        pod = await make_pod(step_s=0.02)
        async for event in events(pod, ask(max_tokens=500)):
            assert event.token_ids
            break
        await pod.empty()
        await counts(pod, ended=1)

    async def test_a_stop_string_is_no_failure(self, make_pod: Make) -> None:
        pod = await make_pod(step_s=0.01)
        body = {"model": "hash", "prompt": "x" * 50, "max_tokens": 100, "seed": 0}
        whole = (await pod.http.post("/v1/completions", json=body, timeout=20)).json()
        body["stop"] = whole["choices"][0]["text"][10:14]
        cut = (await pod.http.post("/v1/completions", json=body, timeout=20)).json()
        assert cut["choices"][0]["finish_reason"] == "stop"
        await pod.empty()
        await counts(pod, finished=1, ended=1)

    async def test_a_stream_that_the_pod_ends_is_a_failure(self, make_pod: Make) -> None:
        pod = await make_pod(step_s=0.02)
        running = asyncio.create_task(collect(pod, ask(max_tokens=500)))
        await asyncio.sleep(0.1)
        await pod.http.post(contract.PATH_DRAIN, json={"mode": "end", "deadline_s": 0})
        assert (await running)[-1].error_code == "draining"
        await counts(pod, failed=1)

    async def test_an_engine_that_fails(self, make_pod: Make) -> None:
        pod = await make_pod(step_s=0.01)
        running = asyncio.create_task(collect(pod, ask(max_tokens=500)))
        await asyncio.sleep(0.1)

        def explode(batch: object) -> None:
            raise RuntimeError("out of memory")

        pod.runner.before_step = explode
        last = (await asyncio.wait_for(running, 30))[-1]
        assert (last.error_code, last.retryable) == ("internal", True)
        assert (await pod.http.get(contract.PATH_HEALTH)).status_code == 503


class TestAuthorization:
    @pytest.mark.parametrize("header", ["", "Bearer wrong", "Basic x"])
    async def test_strangers(self, make_pod: Make, header: str) -> None:
        pod = await make_pod()
        headers = {"authorization": header}
        for reply in (
            await pod.http.post(contract.PATH_GENERATE, headers=headers, content=b"{}"),
            await pod.http.get(contract.PATH_TOKENIZER, headers=headers),
        ):
            assert reply.status_code == 403
            assert "does not fit this pod's handoff secret" in reply.json()["error"]["message"]

    async def test_a_pod_without_a_secret_lets_nobody_in(self, make_pod: Make) -> None:
        pod = await make_pod(secret=b"")
        reply = await pod.http.get(contract.PATH_TOKENIZER)
        assert reply.status_code == 403
        assert "has no handoff secret" in reply.json()["error"]["message"]
        answer = await pod.http.post("/v1/completions", json={"model": "hash", "prompt": "x"})
        assert answer.status_code == 200

    async def test_the_tokenizer(self, make_pod: Make) -> None:
        pod = await make_pod()
        reply = await pod.http.get(contract.PATH_TOKENIZER)
        bundle = msgspec.json.decode(reply.content, type=TokenizerBundle)
        assert bundle == pod.pod.bundle

    async def test_malformed_requests(self, make_pod: Make) -> None:
        pod = await make_pod()
        for content in (b"{", b"[]", b'{"stream_id": 5}', b"\xff"):
            reply = await pod.http.post(contract.PATH_GENERATE, content=content)
            assert reply.status_code == 400
            assert "The body is no GenerateRequest" in reply.json()["error"]["message"]


class TestFrontEnd:
    async def test_served_names_and_answers(self, make_pod: Make) -> None:
        pod = await make_pod()
        models = (await pod.http.get("/v1/models")).json()["data"]
        assert [(m["id"], m["owned_by"]) for m in models] == [
            ("hash", "fleet-1"),
            ("alias", "fleet-1"),
        ]
        body = {"model": "alias", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        reply = await pod.http.post("/v1/chat/completions", json=body)
        assert reply.json()["usage"]["completion_tokens"] == 4

    async def test_a_prefill_pod_points_to_the_gateway(self, make_pod: Make) -> None:
        pod = await make_pod(role=Role.PREFILL)
        reply = await pod.http.post("/v1/completions", json={"model": "hash", "prompt": "x"})
        assert reply.status_code == 400
        assert "send requests to the gateway" in reply.json()["error"]["message"]

    async def test_a_prompt_over_the_pool(self, make_pod: Make) -> None:
        pod = await make_pod()
        body = {"model": "hash", "prompt": "x" * 2000}
        reply = await pod.http.post("/v1/completions", json=body)
        assert reply.status_code == 400
        message = reply.json()["error"]["message"]
        assert "2000 tokens and max_tokens is 16" in message
        assert "1024 tokens that this pod's KV cache holds" in message

    async def test_draining_is_unavailable(self, make_pod: Make) -> None:
        pod = await make_pod()
        await pod.http.post(contract.PATH_DRAIN, json={"mode": "drain"})
        reply = await pod.http.post("/v1/completions", json={"model": "hash", "prompt": "x"})
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert reply.json()["error"]["message"] == "This pod is draining."


class TestDrain:
    async def test_drain_finishes_what_runs_and_admits_nothing(self, make_pod: Make) -> None:
        pod = await make_pod(step_s=0.02)
        running = asyncio.create_task(collect(pod, ask(max_tokens=20)))
        await asyncio.sleep(0.1)
        reply = await pod.http.post(contract.PATH_DRAIN, json={"mode": "drain"})
        assert reply.json()["draining"] is True
        state = await pod.state()
        assert (state.ready, state.draining, state.in_flight) == (False, True, 1)
        assert (await pod.http.get(contract.PATH_READY)).status_code == 200, "not empty yet"
        [refused] = await collect(pod, ask(stream="late"))
        assert (refused.error_code, refused.retryable) == ("draining", True)
        assert ids(await running) == continuation(PROMPT, 20)
        assert (await pod.state()).in_flight == 0
        assert (await pod.http.get(contract.PATH_READY)).status_code == 503
        assert (await pod.http.get(contract.PATH_HEALTH)).status_code == 200

    async def test_a_drain_can_be_undone(self, make_pod: Make) -> None:
        pod = await make_pod()
        for mode in ("drain", "drain", "cancel"):
            await pod.http.post(contract.PATH_DRAIN, json={"mode": mode})
        assert ids(await collect(pod, ask())) == continuation(PROMPT, 5)

    async def test_end_gives_a_deadline(self, make_pod: Make) -> None:
        pod = await make_pod(step_s=0.02)
        running = asyncio.create_task(collect(pod, ask(max_tokens=500)))
        await asyncio.sleep(0.1)
        await pod.http.post(contract.PATH_DRAIN, json={"mode": "end", "deadline_s": 0.2})
        assert not running.done()
        received = await asyncio.wait_for(running, 30)
        assert (received[-1].error_code, received[-1].retryable) == ("draining", True)
        assert ids(received) == continuation(PROMPT, 500)[: len(ids(received))]
        await pod.empty()

    async def test_end_reaches_streams_that_await_kv(self, make_pod: Make) -> None:
        prefill = await make_pod(role=Role.PREFILL, pod="prefill-0", step_s=0.2)
        decode = await make_pod(role=Role.DECODE, pod="decode-0")
        long_prompt = [n % 256 for n in range(600)]
        running = asyncio.create_task(collect(decode, ask(long_prompt, prefill=prefill.target)))
        async with asyncio.timeout(30):
            while (await prefill.state()).running == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert (await decode.state()).waiting == 1
        await decode.http.post(contract.PATH_DRAIN, json={"mode": "end", "deadline_s": 0})
        [event] = await asyncio.wait_for(running, 30)
        assert event.error_code == "draining"
        await decode.empty()
        await prefill.empty()

    async def test_end_on_a_prefill_pod(self, make_pod: Make) -> None:
        prefill = await make_pod(role=Role.PREFILL, pod="prefill-0", step_s=0.2)
        decode = await make_pod(role=Role.DECODE, pod="decode-0")
        long_prompt = [n % 256 for n in range(600)]
        running = asyncio.create_task(collect(decode, ask(long_prompt, prefill=prefill.target)))
        await asyncio.sleep(0.3)
        await prefill.http.post(contract.PATH_DRAIN, json={"mode": "end", "deadline_s": 0})
        [event] = await asyncio.wait_for(running, 30)
        assert (event.error_code, event.retryable) == ("draining", True)
        await prefill.empty()

    @pytest.mark.parametrize("secret", [SECRET, b""])
    async def test_strangers_drain_nothing(self, make_pod: Make, secret: bytes) -> None:
        pod = await make_pod(secret=secret, uid="uid-0")
        body = {"mode": "end"}
        for token in ("", "Bearer", "Bearer uid-1", "uid-0"):
            headers = {"authorization": token}
            reply = await pod.http.post(contract.PATH_DRAIN, json=body, headers=headers)
            assert reply.status_code == 403
            assert reply.json()["error"]["message"] == "The bearer token is not this pod's uid."
        assert not (await pod.state()).draining
        headers = {"authorization": "Bearer uid-0"}
        reply = await pod.http.post(contract.PATH_DRAIN, json=body, headers=headers)
        assert reply.json()["draining"]

    async def test_a_pod_without_a_uid_is_drained_by_nobody(self, make_pod: Make) -> None:
        pod = await make_pod(secret=b"", uid="")
        for token in ("Bearer", ""):
            headers = {"authorization": token}
            reply = await pod.http.post(contract.PATH_DRAIN, json={"mode": "end"}, headers=headers)
            assert reply.status_code == 403

    async def test_nonsense(self, make_pod: Make) -> None:
        pod = await make_pod()
        reply = await pod.http.post(contract.PATH_DRAIN, json={"mode": "explode"})
        assert reply.status_code == 400
        assert "Invalid enum value 'explode'" in reply.json()["error"]["message"]


class TestProbesAndMetrics:
    async def test_state(self, make_pod: Make) -> None:
        pod = await make_pod(role=Role.DECODE)
        state = await pod.state()
        assert (state.pod, state.role, state.revision, state.model) == (
            "pod-0",
            "decode",
            "r1",
            "hash",
        )
        assert (state.ready, state.draining, state.in_flight) == (True, False, 0)
        assert state.kv_capacity_tokens == 64 * 16
        assert state.kv_usage == 0

    async def test_the_work_of_two_looks_differs_by_what_happened(self, make_pod: Make) -> None:
        pod = await make_pod(role=Role.BOTH)
        before = (await pod.state()).work
        assert before is not None
        await asyncio.gather(*(collect(pod, ask(stream=f"s{n}")) for n in range(3)))
        await pod.empty()
        after = (await pod.state()).work
        assert after is not None
        assert after.requests - before.requests == 3
        assert after.output_tokens - before.output_tokens == 15
        assert (after.queued_tokens, after.kv_tokens) == (0, 0)
        steps = after.steps
        # Each stream's first token comes with its prompt, the other four of five on their own.
        assert steps.streams - before.steps.streams == 12
        computed = after.prompt_tokens - before.prompt_tokens
        assert steps.prompt - before.steps.prompt == computed
        assert 0 < computed <= 3 * len(PROMPT)
        assert steps.seconds > before.steps.seconds
        assert steps.streams_streams >= steps.streams
        assert after.max_streams > 0
        assert after.step_tokens >= after.max_streams

    async def test_a_stuck_step_fails_the_liveness_probe(self, make_pod: Make) -> None:
        pod = await make_pod()
        stuck = threading.Event()
        pod.runner.before_step = lambda batch: bool(stuck.wait())
        stream = asyncio.create_task(collect(pod, ask()))
        try:
            assert (await pod.http.get(contract.PATH_HEALTH)).status_code == 200
            await asyncio.sleep(2)
            assert (await pod.http.get(contract.PATH_HEALTH)).status_code == 503
            assert (await pod.http.get(contract.PATH_READY)).status_code == 503
        finally:
            stuck.set()
        assert ids(await stream) == continuation(PROMPT, 5)
        assert (await pod.http.get(contract.PATH_HEALTH)).status_code == 200

    async def test_metrics_have_vllms_names(self, make_pod: Make) -> None:
        prefill = await make_pod(role=Role.PREFILL, pod="prefill-0")
        decode = await make_pod(role=Role.DECODE, pod="decode-0")
        await collect(decode, ask(prefill=prefill.target))
        await decode.empty()
        text = (await decode.http.get(contract.PATH_METRICS)).text
        labels = 'engine="0",model_name="hash"'
        for line in (
            f"vllm:time_to_first_token_seconds_count{{{labels}}} 1.0",
            f"vllm:request_time_per_output_token_seconds_count{{{labels}}} 1.0",
            f"vllm:e2e_request_latency_seconds_count{{{labels}}} 1.0",
            'vllm:request_success_total{engine="0",finished_reason="length",model_name="hash"} 1.0',
            f"vllm:num_requests_running{{{labels}}} 0.0",
            f"vllm:num_requests_waiting{{{labels}}} 0.0",
            f"vllm:kv_cache_usage_perc{{{labels}}} 0.0",
            f"vllm:generation_tokens_total{{{labels}}} 5.0",
            f"tandem_handoff_seconds_count{{{labels}}} 1.0",
            f'tandem_handoff_bytes_total{{direction="received",{labels}}} 800.0',
        ):
            assert line in text, line
        text = (await prefill.http.get(contract.PATH_METRICS)).text
        assert f'tandem_handoff_bytes_total{{direction="sent",{labels}}} 800.0' in text
        assert f"vllm:prompt_tokens_total{{{labels}}} 50.0" in text
        assert 'block_size="16"' in text


async def test_before_loading_probes_tell_alive_from_ready() -> None:
    from tandem_runtime.frontend.server import HttpServer

    server = HttpServer("127.0.0.1", 0)
    url = f"http://127.0.0.1:{await server.start()}"
    async with httpx.AsyncClient(base_url=url) as http:
        assert (await http.get(contract.PATH_HEALTH)).status_code == 200
        assert (await http.get(contract.PATH_READY)).status_code == 503
        reply = await http.post("/v1/completions", json={})
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "5"
    await server.stop()
