"""HTTP to runtime pods: answers, refusals and nonsense."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from aiohttp import web
from tandem_operator.runtime_pods import MAX_BYTES, TIMEOUT_S, RuntimePods
from tandem_runtime.contract import PATH_DRAIN, PATH_STATE
from tandem_runtime.protocol import DrainRequest, PodState

PORT = 18_472
STATE = PodState("p", "decode", "r", "m", True, False, 1, 2, 3, 0.5, 100, 0.0)


@pytest.fixture
async def asked() -> list[bytes]:
    return []


async def serve(asked: list[bytes], state: web.Response, slow_s: float = 0.0) -> web.AppRunner:
    async def drain(request: web.Request) -> web.Response:
        asked.append(await request.read())
        asked.append(request.headers["authorization"].encode())
        return web.Response(body=msgspec.json.encode(STATE))

    async def get(_: web.Request) -> web.Response:
        if not slow_s:
            return state
        await asyncio.sleep(slow_s)
        return web.Response(body=msgspec.json.encode(STATE))

    app = web.Application()
    app.add_routes([web.post(PATH_DRAIN, drain), web.get(PATH_STATE, get)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", PORT).start()
    return runner


async def test_drain_and_state(asked: list[bytes]) -> None:
    runner = await serve(asked, web.Response(body=msgspec.json.encode(STATE)))
    async with RuntimePods(PORT) as pods:
        assert await pods.drain("127.0.0.1", "8a7d", DrainRequest("end", deadline_s=30.0)) == STATE
        assert await pods.state("127.0.0.1") == STATE
    assert msgspec.json.decode(asked[0]) == {"mode": "end", "deadline_s": 30.0}
    assert asked[1] == b"Bearer 8a7d"
    await runner.cleanup()


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (500, b"oops", "answered 500: oops"),
        (200, b"{}", "ValidationError"),
        (200, b"<", "Decode"),
        (200, b'{"pod": "\xff"}', "UnicodeDecodeError"),
        (200, b'{"x": ' + b"[" * 100_000, "RecursionError"),
    ],
)
async def test_a_bad_answer_is_an_os_error(
    asked: list[bytes], status: int, body: bytes, sentence: str
) -> None:
    runner = await serve(asked, web.Response(status=status, body=body))
    async with RuntimePods(PORT) as pods:
        with pytest.raises(OSError, match=sentence):
            await pods.state("127.0.0.1")
    await runner.cleanup()


async def test_nobody_there_is_an_os_error() -> None:
    async with RuntimePods(PORT) as pods:
        with pytest.raises(OSError, match=r"127\.0\.0\.1"):
            await pods.state("127.0.0.1")


async def test_an_answer_without_end_is_not_read(asked: list[bytes]) -> None:
    runner = await serve(asked, web.Response(body=b"x" * (2 * MAX_BYTES)))
    async with RuntimePods(PORT) as pods:
        with pytest.raises(OSError, match="more than"):
            await pods.state("127.0.0.1")
    await runner.cleanup()


async def test_no_redirect_is_followed(asked: list[bytes]) -> None:
    """A pod of a user's must not choose whom the operator talks to."""
    elsewhere = web.Response(status=307, headers={"Location": PATH_DRAIN})
    runner = await serve(asked, elsewhere)
    async with RuntimePods(PORT) as pods:
        with pytest.raises(OSError, match="answered 307"):
            await pods.state("127.0.0.1")
    await runner.cleanup()


async def test_silent_pods_take_nobodys_turn(asked: list[bytes]) -> None:
    """More than a session's usual number of connections, each for most of the timeout."""
    runner = await serve(asked, web.Response(), slow_s=0.6 * TIMEOUT_S)
    async with RuntimePods(PORT) as pods:
        answers = await asyncio.gather(*(pods.state("127.0.0.1") for _ in range(150)))
    assert answers == [STATE] * 150
    await runner.cleanup()
