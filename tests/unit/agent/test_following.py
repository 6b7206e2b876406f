from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tandem.agent import following
from tandem.agent.following import read_log
from tandem.agent.logs import LogOptions
from tandem.agent.shim import logwriter
from tandem.agent.shim.logwriter import LogWriter
from tandem.agent.store import Ending, RunDir


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr(following, "POLL_S", 0.005)
    run = RunDir(tmp_path / "0")
    run.path.mkdir()
    return run


async def collect(run: RunDir, options: LogOptions) -> bytes:
    async with asyncio.timeout(60):
        return b"".join([piece async for piece in read_log(run, options)])


async def test_without_follow_it_ends_at_the_end(run: RunDir) -> None:
    LogWriter(str(run.log)).feed("stdout", b"a\nb\n")
    assert await collect(run, LogOptions()) == b"a\nb\n"
    assert await collect(run, LogOptions(tail_lines=1)) == b"b\n"


async def test_no_log_yet(run: RunDir) -> None:
    assert await collect(run, LogOptions()) == b""
    waiting = asyncio.create_task(collect(run, LogOptions(follow=True)))
    await asyncio.sleep(0.02)
    LogWriter(str(run.log)).feed("stdout", b"first\n")
    run.write_ending(Ending(0, 0, 0.0))
    assert await waiting == b"first\n"


async def test_a_run_that_ended_without_a_log(run: RunDir) -> None:
    run.write_ending(Ending(128, 0, 0.0))
    assert await collect(run, LogOptions(follow=True)) == b""


async def test_follow_misses_nothing_though_the_log_is_set_aside(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logwriter, "FILE_LIMIT_BYTES", 300)
    writer = LogWriter(str(run.log))
    following_it = asyncio.create_task(collect(run, LogOptions(follow=True)))
    lines = [f"line {n}\n".encode() for n in range(40)]
    for line in lines:
        writer.feed("stdout", line)
        await asyncio.sleep(0.01)
    writer.close()
    run.write_ending(Ending(0, 0, 0.0))
    assert await following_it == b"".join(lines)
