"""What runs beside the requests: health checks, tokenizers. None of it dies unnoticed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hash_pods import SECRET, MakePod, Served, eventually
from played_api import PlayedApi, kubeconfig
from starlette.responses import JSONResponse, PlainTextResponse, Response
from tandem_runtime import contract
from tandem_runtime.gateway import run
from tandem_runtime.gateway.health import PodHealth
from tandem_runtime.gateway.options import GatewayOptions
from tandem_runtime.gateway.pod_client import PodClient, PodUnreachable


def answers(served: Served, path: str, answer: Callable[[], Any]) -> None:
    """From now on the pod answers a path otherwise; `answer` may take its time."""
    app: Any = served.server.app

    async def instead(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != path:
            await app(scope, receive, send)
            return
        response: Response = await answer()
        await response(scope, receive, send)

    served.server.app = instead


async def something_else() -> Response:
    return JSONResponse({"hello": "world"})


async def no_json() -> Response:
    return PlainTextResponse("<html>")


async def too_deep() -> Response:
    return PlainTextResponse('{"x": ' + "[" * 100_000)


@dataclass
class Late:
    """An answer that comes once it is allowed to."""

    then: Callable[[], Awaitable[Response]]
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    allowed: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self) -> Response:
        self.asked.set()
        await self.allowed.wait()
        return await self.then()


async def complete(front: Any, tokens: int = 3) -> Any:
    body = {"model": "hash", "prompt": "x", "max_tokens": tokens}
    return await front.http.post("/v1/completions", json=body, headers={"x-tandem-trace": "1"})


@pytest.mark.parametrize("answer", [something_else, no_json, too_deep])
async def test_an_answer_of_somebody_else_counts_as_none(
    make_pod: MakePod, answer: Callable[[], Any]
) -> None:
    served = await make_pod()
    for path in (contract.PATH_STATE, contract.PATH_TOKENIZER):
        answers(served, path, answer)
    client = PodClient(SECRET)
    for call, kind in ((client.state, "PodState"), (client.tokenizer, "TokenizerBundle")):
        with pytest.raises(PodUnreachable, match=f"pod pod-0 answered what is no {kind}: "):
            await call(served.view())
    await client.close()


async def test_silence_is_noticed_beside_a_pod_that_talks_nonsense(
    front: Any, make_pod: MakePod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem_runtime.gateway.health.SILENCE_S", 1.0)
    odd, good = await make_pod(pod="odd"), await make_pod(pod="good")
    front.discovery.show(odd.view(), good.view())
    assert (await complete(front)).status_code == 200
    answers(odd, contract.PATH_STATE, something_else)
    health = front.gateway._health
    await eventually(lambda: health.unusable == {"uid-odd"})
    await good.http.post(contract.PATH_DRAIN, json={"mode": "drain"})
    await eventually(lambda: health.unusable == {"uid-odd", "uid-good"})


async def test_a_pod_that_comes_during_a_round_keeps_its_streams(
    front: Any, make_pod: MakePod
) -> None:
    """What the API shows while a slow pod is asked counts, not what it showed before."""
    slow, new = await make_pod(pod="slow"), await make_pod(pod="new", revision="r2", step_s=0.02)
    late = Late(something_else)
    answers(slow, contract.PATH_STATE, late)
    front.discovery.show(slow.view())
    await asyncio.wait_for(late.asked.wait(), 30)
    front.discovery.show(new.view())
    asking = asyncio.create_task(complete(front, 50))
    await eventually(lambda: "uid-new" in front.gateway._client.live_uids)
    late.allowed.set()
    assert (await asking).status_code == 200


async def test_a_slow_tokenizer_holds_up_no_health_check(front: Any, make_pod: MakePod) -> None:
    slow, good = await make_pod(pod="slow", revision="r2"), await make_pod(pod="good")
    late = Late(no_json)
    answers(slow, contract.PATH_TOKENIZER, late)
    front.discovery.show(slow.view())
    await asyncio.wait_for(late.asked.wait(), 30)
    front.discovery.show(slow.view(), good.view())
    await good.http.post(contract.PATH_DRAIN, json={"mode": "drain"})
    await eventually(lambda: front.gateway._health.unusable == {"uid-good"})
    late.allowed.set()


async def test_one_hanging_tokenizer_keeps_no_other_from_coming(
    front: Any, make_pod: MakePod
) -> None:
    slow, good = await make_pod(pod="slow", fleet="a"), await make_pod(pod="good", fleet="b")
    late = Late(no_json)
    answers(slow, contract.PATH_TOKENIZER, late)
    front.discovery.show(slow.view(fleet="a"), good.view(fleet="b"))
    fleets = front.gateway._fleets
    await eventually(lambda: set(fleets._models) == {("b", "r1")})
    late.allowed.set()


async def test_a_round_that_fails_is_told_and_followed_by_another(
    front: Any, make_pod: MakePod, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = await make_pod()
    rounds = 0

    def keep(uids: object) -> None:
        nonlocal rounds
        rounds += 1
        raise KeyError("a fault of ours")

    monkeypatch.setattr(front.gateway._health._loads, "keep", keep)
    front.discovery.show(served.view())
    await eventually(lambda: rounds > 2)
    assert "a round of health checks failed" in caplog.text
    assert "a fault of ours" in caplog.text


async def test_a_task_that_ends_ends_the_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run, "_LINGER_S", 0.0)

    async def ends(*_: Any) -> None:
        await asyncio.sleep(0.1)

    monkeypatch.setattr(PodHealth, "run", ends)
    api = PlayedApi()
    await api.start()
    config = tmp_path / "config"
    config.write_text(kubeconfig(api.port))
    options = GatewayOptions("ns", str(config), "127.0.0.1", 0, 0, SECRET, "gateway-0")
    with caplog.at_level(logging.ERROR):
        assert await asyncio.wait_for(run.run(options), 10) == 1
    assert "the health checks ended" in caplog.text
    await api.stop()
