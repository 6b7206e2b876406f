"""Streams whose gateway is lost: a client that comes back has all of it, once."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hash_engine import continuation
from hash_pods import MakePod, Served, eventually
from tandem_runtime import contract
from tandem_runtime.contract import Role
from tandem_runtime.engine.batch import Batch

TEXT = "The quick brown fox jumps over the lazy dog. " * 3
LONG = 200


def body(max_tokens: int = LONG, **fields: Any) -> dict[str, Any]:
    asked = {"model": "hash", "prompt": TEXT, "max_tokens": max_tokens, "temperature": 0, "seed": 0}
    return {**asked, "stream": True, **fields}


@dataclass
class Reading:
    """What a client has of one answer, from however many gateways."""

    stream: str = ""
    last_event_id: str = ""
    chunks: list[dict[str, Any]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    """Of the chunks."""
    done: bool = False
    error: dict[str, Any] | None = None
    lines: Any = None

    async def read(self, reply: httpx.Response, events: int | None = None) -> None:
        """Up to so many events more, the stream's end, or the break of its connection."""
        assert reply.status_code == 200
        self.stream = reply.headers[contract.HEADER_STREAM]
        wanted = None if events is None else len(self.chunks) + events
        event_id = ""
        # Dropped, it would close the connection, as a client does that leaves.
        if self.lines is None:
            self.lines = reply.aiter_lines()
        async for line in self.lines:
            if line.startswith("id: "):
                event_id = line.removeprefix("id: ")
            elif line == "data: [DONE]":
                self.done = True
            elif line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    self.error = chunk["error"]
                    return
                self.chunks.append(chunk)
                self.ids.append(event_id)
                self.last_event_id = event_id
            if wanted is not None and len(self.chunks) >= wanted:
                return

    async def begin(self, front: Any, events: int, asked: dict[str, Any], **headers: str) -> None:
        path = "/v1/chat/completions" if "messages" in asked else "/v1/completions"
        async with front.http.stream("POST", path, json=asked, headers=headers) as reply:
            await self.read(reply, events)
            await front.kill()

    async def go_on(self, front: Any, **headers: str) -> None:
        self.lines = None
        headers = {"last-event-id": self.last_event_id, **headers}
        path = f"/v1/streams/{self.stream}"
        async with front.http.stream("GET", path, headers=headers) as reply:
            await self.read(reply)

    def text(self, index: int = 0) -> str:
        choices = (c for chunk in self.chunks for c in chunk["choices"] if c["index"] == index)
        return "".join(c["text"] if "text" in c else c["delta"]["content"] for c in choices)

    def finishes(self) -> list[str]:
        choices = (c for chunk in self.chunks for c in chunk["choices"])
        return [c["finish_reason"] for c in choices if c["finish_reason"]]


async def whole(front: Any, asked: dict[str, Any], **headers: str) -> Reading:
    """An undisturbed answer."""
    reading = Reading()
    path = "/v1/chat/completions" if "messages" in asked else "/v1/completions"
    async with front.http.stream("POST", path, json=asked, headers=headers) as reply:
        await reading.read(reply)
    assert reading.done
    return reading


def expected(served: Served, count: int) -> str:
    from tandem_runtime.frontend.tokenizer import Tokenizer

    tokenizer = Tokenizer(served.pod.bundle)
    return tokenizer.decode(continuation(tokenizer.encode(TEXT), count))


class Hold:
    """Of a pod between two steps, so that its stream still runs when it is taken over."""

    def __init__(self, pod: Served) -> None:
        self._pod = pod
        self._released = threading.Event()
        pod.runner.before_step = self._before_step

    def _before_step(self, batch: Batch) -> None:
        self._released.wait()

    async def taken_over(self, stream: str) -> None:
        kept = self._pod.pod.kept._streams[f"{stream}.0"]
        await eventually(lambda: kept.epoch > 0)
        self._released.set()


class TestAfterItsDeath:
    async def test_the_stream_goes_on(self, front: Any, second: Any, make_pod: MakePod) -> None:
        pod = await make_pod(step_s=0.01)
        front.discovery.show(pod.view())
        reading = Reading()
        await reading.begin(front, 5, body())
        assert not reading.done
        await reading.go_on(second)
        assert reading.done
        assert reading.text() == expected(pod, LONG)
        assert reading.finishes() == ["length"]
        assert len({chunk["id"] for chunk in reading.chunks}) == 1
        assert reading.stream == reading.chunks[0]["id"]
        assert pod.pod.worker.stats.arrivals == 1, "nothing was computed again"
        metrics = (await second.http.get(contract.PATH_METRICS)).text
        assert 'tandem_gateway_resumptions_total{outcome="resumed"} 1.0' in metrics
        assert "vllm:time_to_first_token_seconds_count" not in metrics, "it was the other's"
        await pod.empty()

    async def test_prefill_and_decode(self, front: Any, second: Any, make_pod: MakePod) -> None:
        prefill = await make_pod(role=Role.PREFILL, pod="prefill-0")
        decodes = [
            await make_pod(role=Role.DECODE, pod=f"decode-{n}", step_s=0.01) for n in range(2)
        ]
        front.discovery.show(prefill.view(), *(pod.view() for pod in decodes))
        reading = Reading()
        await reading.begin(front, 3, body())
        await reading.go_on(second)
        assert reading.text() == expected(prefill, LONG)
        for pod in (prefill, *decodes):
            await pod.empty()

    async def test_the_pod_dies_afterwards(
        self, front: Any, second: Any, make_pod: MakePod
    ) -> None:
        """The second gateway has the journal then: it resumes like any stream of its own."""
        one = await make_pod(pod="a", step_s=0.02)
        two = await make_pod(pod="b")
        front.discovery.show(one.view(), two.view(ready=False))
        reading = Reading()
        await reading.begin(front, 3, body(400))
        reading.lines = None
        headers = {"last-event-id": reading.last_event_id}
        path = f"/v1/streams/{reading.stream}"
        async with second.http.stream("GET", path, headers=headers) as reply:
            await reading.read(reply, 3)
            front.discovery.show(one.view(), two.view())
            await one.end()
            await reading.read(reply)
        assert reading.done
        assert reading.text() == expected(two, 400)
        assert two.pod.worker.stats.arrivals == 1

    async def test_both_die(self, front: Any, second: Any, make_pod: MakePod) -> None:
        pod, other = await make_pod(pod="a", step_s=0.02), await make_pod(pod="b")
        front.discovery.show(pod.view(), other.view(ready=False))
        reading = Reading()
        await reading.begin(front, 3, body())
        await pod.end()
        reply = await second.http.get(f"/v1/streams/{reading.stream}")
        assert reply.status_code == 404
        assert reply.json()["error"]["code"] == "stream_not_found"
        assert "Send the request again" in reply.json()["error"]["message"]
        front.discovery.show(other.view())
        async with openai.AsyncOpenAI(
            base_url=str(second.client.base_url), api_key="none", max_retries=2
        ) as client:
            stream = await client.completions.create(**body(20))
            text = "".join([chunk.choices[0].text async for chunk in stream])
        assert text == expected(other, 20)

    async def test_it_was_away_too_long(self, front: Any, second: Any, make_pod: MakePod) -> None:
        pod = await make_pod(step_s=0.01, hold_s=0.1)
        front.discovery.show(pod.view())
        reading = Reading()
        await reading.begin(front, 3, body())
        await pod.empty()
        await eventually(lambda: not pod.pod.kept._streams)
        reply = await second.http.get(f"/v1/streams/{reading.stream}")
        assert reply.status_code == 404

    async def test_its_end_is_kept(self, front: Any, second: Any, make_pod: MakePod) -> None:
        pod = await make_pod(step_s=0.002)
        front.discovery.show(pod.view())
        reading = Reading()
        await reading.begin(front, 3, body())
        await pod.empty()
        await reading.go_on(second)
        assert reading.text() == expected(pod, LONG)
        assert reading.done

    async def test_its_connection_breaks_again(
        self, front: Any, second: Any, make_pod: MakePod
    ) -> None:
        pod = await make_pod(step_s=0.02)
        front.discovery.show(pod.view())
        reading = Reading()
        await reading.begin(front, 3, body())
        reading.lines = None
        headers = {"last-event-id": reading.last_event_id}
        path = f"/v1/streams/{reading.stream}"
        async with second.http.stream("GET", path, headers=headers) as reply:
            await reading.read(reply, 3)
        # A client that leaves cancels; what came of it is kept, and the rest is computed.
        await pod.empty()
        await reading.go_on(second)
        assert reading.text() == expected(pod, LONG)


class TestWhoMayGoOn:
    async def test_a_foreign_tenant_is_told_what_everybody_is(
        self, front: Any, second: Any, make_pod: MakePod
    ) -> None:
        pod = await make_pod(step_s=0.01)
        front.discovery.show(pod.view())
        mine = {contract.HEADER_TENANT: "mine"}
        reading = Reading()
        await reading.begin(front, 3, body(), **mine)
        unknown = "cmpl-" + "0" * 32
        said = []
        for stream, tenant in ((reading.stream, "other"), (unknown, "mine"), ("x", "mine")):
            path, headers = f"/v1/streams/{stream}", {contract.HEADER_TENANT: tenant}
            reply = await second.http.get(path, headers=headers)
            assert reply.status_code == 404
            said.append(reply.text.replace(stream, "ID"))
        assert len(set(said)) == 1
        await reading.go_on(second, **mine)
        assert reading.text() == expected(pod, LONG)

    @pytest.mark.parametrize("event_id", ["x", "1,2", "-1", "1g", "9" * 30])
    async def test_a_wrong_event_id(
        self, front: Any, second: Any, make_pod: MakePod, event_id: str
    ) -> None:
        pod = await make_pod()
        front.discovery.show(pod.view())
        reading = await whole(front, body(5))
        path = f"/v1/streams/{reading.stream}"
        reply = await second.http.get(path, headers={"last-event-id": event_id})
        assert reply.status_code == 400
        assert "Last-Event-ID" in reply.json()["error"]["message"]

    async def test_the_old_gateway_lives_and_is_cut_off(
        self, front: Any, second: Any, make_pod: MakePod
    ) -> None:
        """As after SIGSTOP: its client has gone to another one, and it wakes."""
        pod = await make_pod(step_s=0.02)
        front.discovery.show(pod.view())
        reading, old = Reading(), Reading()
        async with front.http.stream("POST", "/v1/completions", json=body()) as reply:
            await old.read(reply, 3)
            hold = Hold(pod)
            reading.stream, reading.last_event_id = old.stream, old.last_event_id
            reading.chunks = list(old.chunks)
            going_on = asyncio.create_task(reading.go_on(second))
            await hold.taken_over(old.stream)
            await going_on
        assert reading.text() == expected(pod, LONG)
        assert pod.pod.worker.stats.arrivals == 1
        await eventually(lambda: front.gateway.backend.streams == 0)
        await pod.empty()

    async def test_what_the_old_gateway_says_then(
        self, front: Any, second: Any, make_pod: MakePod
    ) -> None:
        pod = await make_pod(step_s=0.02)
        front.discovery.show(pod.view())
        old = Reading()
        started: asyncio.Future[Hold] = asyncio.get_running_loop().create_future()

        async def read() -> None:
            async with front.http.stream("POST", "/v1/completions", json=body()) as reply:
                old.stream = reply.headers[contract.HEADER_STREAM]
                hold = Hold(pod)
                started.set_result(hold)
                await old.read(reply)

        reading = asyncio.create_task(read())
        hold = await started
        new = Reading(old.stream)
        going_on = asyncio.create_task(new.go_on(second))
        await hold.taken_over(old.stream)
        await going_on
        await asyncio.wait_for(reading, 20)
        assert old.error is not None
        assert old.error["code"] == "stream_superseded"
        assert new.text() == expected(pod, LONG)

    @pytest.mark.parametrize("front", [{"resume": False}], indirect=True)
    async def test_switched_off(self, front: Any, make_pod: MakePod) -> None:
        pod = await make_pod()
        front.discovery.show(pod.view())
        reply = await front.http.post("/v1/completions", json=body(5))
        assert contract.HEADER_STREAM not in reply.headers
        assert "id: " not in reply.text
        assert (await front.http.get("/v1/streams/x")).status_code == 404


ANSWERS: dict[str, dict[str, Any]] = {
    "completion": body(60),
    "usage and log probabilities": body(
        60, logprobs=2, stream_options={"include_usage": True}, echo=None
    ),
    "choices": body(30, n=3, temperature=1, stream_options={"include_usage": True}),
    "prompts": body(20, prompt=[TEXT, TEXT[:50]], n=2, echo=True),
    "chat": {
        "model": "hash",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 40,
        "seed": 3,
        "stream": True,
        "logprobs": True,
    },
}


class TestEveryPosition:
    """The answer is kept beyond its end: what follows each of its events can be had again."""

    @pytest.mark.parametrize("name", ANSWERS)
    async def test_what_follows_is_what_followed(
        self, front: Any, second: Any, make_pod: MakePod, name: str
    ) -> None:
        pods = [await make_pod(pod=f"pod-{n}") for n in range(2)]
        front.discovery.show(*(pod.view() for pod in pods))
        reading = await whole(front, ANSWERS[name])
        usage = reading.chunks[-1].get("usage")
        for cut in range(len(reading.chunks) + 1):
            again = Reading(reading.stream, reading.ids[cut - 1] if cut else "")
            await again.go_on(second)
            assert again.done
            before = Reading(chunks=reading.chunks[:cut])
            for index in range(4):
                text = before.text(index) + again.text(index)
                assert text == reading.text(index), (cut, index)
            both = before.chunks + again.chunks
            assert _logprobs(both) == _logprobs(reading.chunks)
            assert len(before.finishes() + again.finishes()) == len(reading.finishes())
            if usage is not None:
                told = both[-1]["usage"]
                assert told["total_tokens"] == usage["total_tokens"]

    async def test_stop_strings_across_the_cut(
        self, front: Any, second: Any, make_pod: MakePod
    ) -> None:
        pod = await make_pod()
        front.discovery.show(pod.view())
        text = (await whole(front, body(60))).text()
        stop = text[40:46]
        assert text.find(stop) == 40
        reading = await whole(front, body(60, stop=[stop, "never to be found"]))
        assert reading.text() == text[:40]
        for cut in range(len(reading.chunks) + 1):
            again = Reading(reading.stream, reading.ids[cut - 1] if cut else "")
            await again.go_on(second)
            before = Reading(chunks=reading.chunks[:cut])
            assert before.text() + again.text() == text[:40]
            assert before.finishes() + again.finishes() == ["stop"]


def _logprobs(chunks: list[dict[str, Any]]) -> dict[int, list[Any]]:
    said: dict[int, list[Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            logprobs = choice["logprobs"] or {}
            said.setdefault(choice["index"], []).extend(
                logprobs.get("content") or list(zip(*logprobs.values(), strict=True))
            )
    return said


async def test_choices_that_had_not_begun(front: Any, second: Any, make_pod: MakePod) -> None:
    """They follow from the one that had, which is all that reached a pod."""
    pod = await make_pod()
    front.discovery.show(pod.view())
    asked = body(30, n=3, temperature=1)
    undisturbed = await whole(front, asked)
    reading = await whole(front, asked)
    for stream in [s for s in pod.pod.kept._streams if s.startswith(reading.stream)][1:]:
        pod.pod.kept._forget(pod.pod.kept._streams[stream])
    first = next(n for n, chunk in enumerate(reading.chunks) if chunk["choices"][0]["index"] == 0)
    cut = Reading(reading.stream, reading.ids[first], reading.chunks[: first + 1])
    assert cut.last_event_id.endswith(",0,0")
    await cut.go_on(second)
    for index in range(3):
        assert cut.text(index) == undisturbed.text(index)
    pod.pod.kept._forget(pod.pod.kept._streams[f"{reading.stream}.1"])
    path = f"/v1/streams/{reading.stream}"
    reply = await second.http.get(path, headers={"last-event-id": "3,3,0"})
    assert reply.status_code == 404, "nobody has the second choice, and the client some of it"


async def test_a_client_that_leaves_frees_its_pod(front: Any, make_pod: MakePod) -> None:
    pod = await make_pod(step_s=0.05)
    front.discovery.show(pod.view())
    async with front.http.stream("POST", "/v1/completions", json=body(500)) as reply:
        await anext(reply.aiter_lines())
    await pod.empty()
    assert pod.pod.kept.outcomes["expired"] == 0


async def test_the_client_of_the_how_to(front: Any, second: Any, make_pod: MakePod) -> None:
    pod = await make_pod(step_s=0.01)
    front.discovery.show(pod.view())
    page = Path(__file__).parents[3] / "docs/how-to/resume-a-stream.md"
    code = re.findall(r"```python\n(.*?)\nbody = ", page.read_text(), re.DOTALL)[0]
    defined: dict[str, Any] = {}
    exec(code, defined)
    urls = [str(gateway.http.base_url).rstrip("/") for gateway in (front, second)]
    chunks: list[dict[str, Any]] = []

    def read_on() -> None:
        for chunk in defined["stream"](urls, "/v1/completions", body()):
            chunks.append(chunk)

    reading = asyncio.create_task(asyncio.to_thread(read_on))
    await eventually(lambda: len(chunks) > 4)
    await front.kill()
    await asyncio.wait_for(reading, 30)
    assert Reading(chunks=chunks).text() == expected(pod, LONG)
    assert pod.pod.worker.stats.arrivals == 1


async def test_openai_clients_do_not_mind_ids(front: Any, make_pod: MakePod) -> None:
    pod = await make_pod()
    front.discovery.show(pod.view())
    text = expected(pod, 20)
    stream = await front.client.completions.create(**body(20))
    assert "".join([chunk.choices[0].text async for chunk in stream]) == text

    def synchronous() -> str:
        url = str(front.client.base_url)
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            stream = client.completions.create(**body(20))
            return "".join(chunk.choices[0].text for chunk in stream)

    assert await asyncio.to_thread(synchronous) == text
