"""Every stream that is not handed over is counted once at each end that heard of it, with why."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from handoff_ends import DecodePod, Peer, PlayedPrefill, PrefillPod, ask, eventually, quick
from tandem_runtime.engine.sequence import RequestRefused
from tandem_runtime.kv import wire
from tandem_runtime.kv.handoff.exporter import Exporter, Refusal
from tandem_runtime.kv.handoff.importer import Importer
from tandem_runtime.kv.handoff.link import HandoffFailed

Make = Callable[..., Any]
Play = Callable[[PrefillPod], Awaitable[Peer]]
SHORT = list(range(10))
LONG = [n % 256 for n in range(600)]


def counted(end: Exporter | Importer) -> dict[str, int]:
    return {reason: count for reason, count in end.counters.failures.items() if count}


async def fails(decode: DecodePod, target: Any, prompt: list[int] = SHORT, **fields: Any) -> None:
    with pytest.raises(HandoffFailed):
        await asyncio.wait_for(decode.generate(ask(prompt, target, **fields)), 20)


async def test_none_for_streams_that_arrive(make_prefill: Make, make_decode: Make) -> None:
    prefill, decode = await make_prefill(), await make_decode()
    await decode.generate(ask(LONG[:100], prefill.target))
    await eventually(lambda: prefill.exporter.counters.streams == 1)
    assert counted(decode.importer) == counted(prefill.exporter) == {}
    assert prefill.exporter.counters.failures["draining"] == 0, "a series from the start"


async def test_nobody_at_the_address(make_prefill: Make, make_decode: Make) -> None:
    prefill, decode = await make_prefill(), await make_decode()
    await prefill.exporter.close()
    await fails(decode, prefill.target)
    await fails(decode, prefill.target, stream="t")
    assert counted(decode.importer) == {"unreachable": 2}


@pytest.mark.parametrize(
    "options", [{"secret": b"another"}, {"layout": {"revision": "r2"}}, {"name": "prefill-7"}]
)
async def test_pods_that_do_not_belong_together(
    make_prefill: Make, make_decode: Make, options: dict[str, Any]
) -> None:
    prefill, decode = await make_prefill(**options), await make_decode()
    await fails(decode, prefill.target)
    assert counted(decode.importer) == {"refused": 1}
    await eventually(lambda: counted(prefill.exporter) == {"refused": 1})


@pytest.mark.parametrize("code", ["draining", "overloaded"])
async def test_a_prefill_pod_that_admits_nothing(
    make_prefill: Make, make_decode: Make, code: str
) -> None:
    prefill, decode = await make_prefill(), await make_decode()
    prefill.refusal.append(Refusal(code, "not now"))
    await fails(decode, prefill.target)
    assert counted(decode.importer) == counted(prefill.exporter) == {code: 1}


async def test_what_can_never_be_served(make_prefill: Make, make_decode: Make) -> None:
    small, prefill, decode = await make_prefill(blocks=4), await make_prefill(), await make_decode()
    await fails(decode, small.target, LONG[:100])
    assert counted(decode.importer) == counted(small.exporter) == {"bad_request": 1}
    with pytest.raises(RequestRefused):
        await decode.generate(ask([999], prefill.target, stream="t"))
    assert counted(decode.importer) == {"bad_request": 2}
    assert counted(prefill.exporter) == {}


async def test_the_prefill_pod_ends_its_streams(make_prefill: Make, make_decode: Make) -> None:
    prefill, decode = await make_prefill(step_s=0.05), await make_decode()
    stream = asyncio.create_task(fails(decode, prefill.target, LONG))
    await eventually(lambda: prefill.exporter.streams.total == 1)
    prefill.exporter.end_all("draining", "this pod ends its streams")
    await stream
    assert counted(decode.importer) == counted(prefill.exporter) == {"draining": 1}


async def test_either_end_dies(make_prefill: Make, make_decode: Make) -> None:
    for dying in ("prefill", "decode"):
        prefill, decode = await make_prefill(step_s=0.02), await make_decode()
        stream = asyncio.create_task(fails(decode, prefill.target, LONG))
        await eventually(lambda pod=prefill: pod.exporter.counters.bytes > 0)
        await (prefill.exporter if dying == "prefill" else decode.importer).close()
        await stream
        assert counted(decode.importer) == {"prefill_lost": 1}
        gone = "ended_early" if dying == "prefill" else "connection_lost"
        await eventually(lambda pod=prefill, gone=gone: counted(pod.exporter) == {gone: 1})


async def test_a_caller_that_leaves(make_prefill: Make, make_decode: Make) -> None:
    prefill, decode = await make_prefill(step_s=0.05), await make_decode()
    stream = asyncio.create_task(decode.generate(ask(LONG, prefill.target)))
    await eventually(lambda: prefill.exporter.streams.total == 1)
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)
    assert counted(decode.importer) == {"ended_early": 1}
    await eventually(lambda: counted(prefill.exporter) == {"ended_early": 1})


@quick
async def test_a_decode_pod_that_falls_silent(make_prefill: Make, play_decode: Play) -> None:
    pod = await make_prefill()
    peer = await play_decode(pod)
    await peer.send(wire.Request(ask(LONG[:10], None)))
    await peer.expect(wire.Offer)

    async def heartbeats() -> None:
        while True:
            await peer.send(wire.Heartbeat(()))
            await asyncio.sleep(0.05)

    beating = asyncio.create_task(heartbeats())
    abort = await peer.expect(wire.Abort)
    beating.cancel()
    assert abort.code == "lease_expired"
    assert counted(pod.exporter) == {"lease_expired": 1}


async def test_reasons_stay_a_bounded_set(make_decode: Make, played_prefill: PlayedPrefill) -> None:
    """A peer of a later version may know reasons that this one does not."""
    decode = await make_decode()
    stream = asyncio.create_task(fails(decode, played_prefill.target))
    peer = await played_prefill.peer()
    await peer.expect(wire.Request)
    await peer.send(wire.Abort("s", 0, "struck by lightning", "so it was"))
    await stream
    assert counted(decode.importer) == {"internal": 1}
