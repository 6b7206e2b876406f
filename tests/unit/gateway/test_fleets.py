"""What a name stands for, as its fleet's pods change: the template, the limits, and whether."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from hash_pods import MakePod, eventually
from tandem_runtime.contract import Role

TEMPLATE = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]


async def complete(front: Any, prompt_tokens: int, max_tokens: int = 10) -> Any:
    body = {"model": "hash", "prompt": [7] * prompt_tokens, "max_tokens": max_tokens}
    return await front.http.post("/v1/completions", json=body, headers={"x-tandem-trace": "1"})


async def limit(front: Any) -> int:
    """The context that clients are told."""
    reply = await complete(front, 1, max_tokens=100_000)
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    message: str = reply.json()["error"]["message"]
    return int(message.split("context of ")[1].split()[0])


class TestNames:
    async def test_while_the_last_pod_is_replaced_clients_are_to_come_again(
        self, front: Any, make_pod: MakePod
    ) -> None:
        pod = await make_pod()
        front.discovery.show(pod.view())
        assert (await complete(front, 3)).status_code == 200
        front.discovery.show()
        with pytest.raises(openai.InternalServerError) as error:
            await front.client.completions.create(model="hash", prompt="x")
        assert error.value.status_code == 503
        assert error.value.response.headers["retry-after"] == "5"
        assert "No pod of fleet 'fleet-1' can serve now: 0 pods exist" in str(error.value)
        reply = await front.http.post("/v2/models/hash/generate", json={"text_input": "x"})
        assert reply.status_code == 503
        front.discovery.show(pod.view(ip="", ready=False))
        assert (await complete(front, 3)).status_code == 503
        front.discovery.show(pod.view())
        assert (await complete(front, 3)).status_code == 200

    async def test_a_name_nobody_knew_is_not_found(self, front: Any, make_pod: MakePod) -> None:
        front.discovery.show((await make_pod()).view())
        with pytest.raises(openai.NotFoundError, match="served models: alias, hash"):
            await front.client.completions.create(model="other", prompt="x")

    async def test_a_gateway_that_never_saw_a_pod_knows_no_name(self, front: Any) -> None:
        assert (await complete(front, 3)).status_code == 404


class TestBundles:
    async def test_a_rollout_changes_the_template_and_the_limits(
        self, front: Any, make_pod: MakePod
    ) -> None:
        old = await make_pod(pod="old", bundle={"context_tokens": 100})
        bundle = {"context_tokens": 300, "chat_template": TEMPLATE}
        new = await make_pod(pod="new", revision="r2", bundle=bundle)
        front.discovery.show(old.view())
        assert await limit(front) == 100
        answer = await front.client.chat.completions.create(
            model="hash", messages=MESSAGES, max_tokens=2
        )
        assert answer.usage.prompt_tokens == len("user: Hi\n")
        front.discovery.show(new.view())
        assert await limit(front) == 300
        answer = await front.client.chat.completions.create(
            model="hash", messages=MESSAGES, max_tokens=2
        )
        assert answer.usage.prompt_tokens == len("<Hi>")

    async def test_what_no_pod_has_any_more_is_forgotten(
        self, front: Any, make_pod: MakePod
    ) -> None:
        old, new = await make_pod(pod="old"), await make_pod(pod="new", revision="r2")
        models = front.gateway._fleets._models
        front.discovery.show(old.view(), new.view())
        await eventually(lambda: {revision for _, revision in models} == {"r1", "r2"})
        front.discovery.show(new.view())
        await eventually(lambda: {revision for _, revision in models} == {"r2"})

    async def test_a_broken_tokenizer_is_told(self, front: Any, make_pod: MakePod) -> None:
        pod = await make_pod()
        pod.pod.bundle = type(pod.pod.bundle)("d", "{}", 100, 256, ())
        front.discovery.show(pod.view())
        reply = await complete(front, 3)
        assert reply.status_code == 503
        assert "the tokenizer of pod pod-0 is broken" in reply.json()["error"]["message"]


class TestLimits:
    async def test_the_smallest_pod_that_takes_part_is_the_limit(
        self, front: Any, make_pod: MakePod
    ) -> None:
        decode = await make_pod(pod="decode", role=Role.DECODE, bundle={"context_tokens": 1000})
        small = {"context_tokens": 128}
        prefill = await make_pod(pod="prefill", role=Role.PREFILL, blocks=8, bundle=small)
        health = front.gateway._health
        front.discovery.show(decode.view(), prefill.view(ready=False))
        assert await limit(front) == 1000
        front.discovery.show(decode.view(), prefill.view())
        await eventually(lambda: health.context_tokens("uid-prefill") == 128)
        assert await limit(front) == 128
        reply = await complete(front, 200)
        assert reply.status_code == 400
        assert "context of 128 tokens; the prompt has 200" in reply.json()["error"]["message"]
        front.discovery.show(decode.view())
        assert await limit(front) == 1000
        assert (await complete(front, 200)).status_code == 200

    async def test_the_pod_that_gave_the_tokenizer_does_not_decide(
        self, front: Any, make_pod: MakePod
    ) -> None:
        small = await make_pod(pod="small", blocks=8, bundle={"context_tokens": 128})
        large = await make_pod(pod="large", bundle={"context_tokens": 1000})
        front.discovery.show(small.view())
        assert await limit(front) == 128
        front.discovery.show(large.view())
        await eventually(lambda: front.gateway._health.context_tokens("uid-large") == 1000)
        assert await limit(front) == 1000

    async def test_what_one_pod_refuses_another_is_asked(
        self, front: Any, make_pod: MakePod
    ) -> None:
        """A pod may have said nothing of its limit yet."""
        small = await make_pod(pod="small", role=Role.PREFILL, blocks=8)
        decode = await make_pod(pod="decode", role=Role.DECODE)
        front.discovery.show(small.view(), decode.view())
        reply = await complete(front, 200)
        assert reply.status_code == 200, reply.text
        trace = reply.json()["tandem"]
        assert (trace["attempts"], trace["prefill_pod"]) == (2, "")
