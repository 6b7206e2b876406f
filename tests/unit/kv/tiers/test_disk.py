"""The disk tier: what is found again, whatever happens to the medium. Never a wrong byte."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_runtime.kv.tiers import disk as disk_module
from tandem_runtime.kv.tiers import record
from tandem_runtime.kv.tiers.contract import Page
from tandem_runtime.kv.tiers.disk import DiskTier
from tandem_runtime.prefix import block_keys, token_bytes

PAGE_TOKENS, PAGE_BYTES = 4, 1000
LAYOUT = bytes(range(32))
OpenTier = Callable[..., DiskTier]


@pytest.fixture
def open_tier(tmp_path: Path) -> Iterator[OpenTier]:
    tiers: list[DiskTier] = []

    def open_one(**changes: Any) -> DiskTier:
        known: dict[str, Any] = {
            "root": tmp_path / "kv",
            "capacity_bytes": 60_000,
            "layout_hash": LAYOUT,
            "page_bytes": PAGE_BYTES,
            "page_tokens": PAGE_TOKENS,
            "segment_bytes": 5000,
        }
        tiers.append(DiskTier(**{**known, **changes}))
        return tiers[-1]

    yield open_one
    for tier in tiers:
        tier.close()


def prompt(number: int, pages: int = 3) -> list[Page]:
    ids = [100 * number + i for i in range(pages * PAGE_TOKENS)]
    keys = block_keys(LAYOUT, ids, PAGE_TOKENS)
    return [
        Page(
            key,
            keys[i - 1] if i else bytes(16),
            token_bytes(ids[i * PAGE_TOKENS : (i + 1) * PAGE_TOKENS]),
            bytes((number * 7 + i * 3 + j) % 256 for j in range(PAGE_BYTES)),
            decoded=i == 2,
        )
        for i, key in enumerate(keys)
    ]


def keep(tier: DiskTier, pages: list[Page]) -> list[bool]:
    wanted = tier.use("tenant", [page.key for page in pages])
    return [tier.store(pages[place]) for place in wanted]


def load(tier: DiskTier, pages: list[Page]) -> list[bool]:
    """Which pages come back; those that do are what was stored."""
    found = []
    for page in pages:
        came = next(iter(tier.load([page.key], [page.tokens])), None)
        assert came is None or came == page
        found.append(came is not None)
    return found


def segments(tier: DiskTier, tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "kv").glob("*/*.seg"))


def test_pages_come_back_and_survive_a_restart(open_tier: OpenTier) -> None:
    tier = open_tier()
    assert keep(tier, prompt(1)) == [True] * 3
    assert load(tier, prompt(1)) == [True] * 3
    assert load(tier, prompt(2)) == [False] * 3
    tier.close()
    again = open_tier()
    assert again.lookup([page.key for page in prompt(1)]) == 3
    assert load(again, prompt(1)) == [True] * 3
    assert keep(again, prompt(1)) == []


@settings(deadline=None, max_examples=25)
@given(steps=st.lists(st.tuples(st.integers(0, 11), st.integers(1, 6)), max_size=60))
def test_it_stays_in_its_bounds_and_gives_back_what_it_was_given(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int]]
) -> None:
    root = tmp_path_factory.mktemp("kv")
    tier = DiskTier(
        root,
        30_000,
        layout_hash=LAYOUT,
        page_bytes=PAGE_BYTES,
        page_tokens=PAGE_TOKENS,
        segment_bytes=3500,
    )
    for number, count in steps:
        pages = prompt(number, count)
        assert all(keep(tier, pages))
        held = tier.lookup([page.key for page in pages])
        assert load(tier, pages)[:held] == [True] * held
        on_disk = sum(path.stat().st_size for path in root.glob("*/*.seg"))
        assert on_disk == tier.held_bytes <= 30_000
    assert not tier.counters.failures
    tier.close()


def test_a_flipped_bit_is_found_and_the_page_dropped(open_tier: OpenTier, tmp_path: Path) -> None:
    tier = open_tier()
    pages = prompt(1)
    keep(tier, pages)
    (segment,) = segments(tier, tmp_path)
    data = bytearray(segment.read_bytes())
    data[data.index(pages[1].payload) + 500] ^= 4
    segment.write_bytes(data)
    assert load(tier, pages) == [True, False, True]
    assert tier.counters.failures == {"damaged": 1}
    assert tier.lookup([page.key for page in pages]) == 1
    assert keep(tier, pages) == [True]  # recomputed, and written anew
    assert load(tier, pages) == [True] * 3


def test_every_flipped_bit_of_a_header_is_found(open_tier: OpenTier, tmp_path: Path) -> None:
    tier = open_tier()
    pages = prompt(1, 1)
    keep(tier, pages)
    (segment,) = segments(tier, tmp_path)
    whole = segment.read_bytes()
    tier.close()
    for place in range(record.header_bytes(PAGE_TOKENS)):
        data = bytearray(whole)
        data[place] ^= 1 << (place % 8)
        segment.write_bytes(data)
        again = open_tier()
        assert load(again, pages) == [False], place
        again.close()


@pytest.mark.parametrize("cut", [1, 500, 1000, 1050, 1110])
def test_a_torn_write_loses_that_page_alone(open_tier: OpenTier, tmp_path: Path, cut: int) -> None:
    tier = open_tier()
    keep(tier, prompt(1))
    tier.close()
    (segment,) = segments(tier, tmp_path)
    os.truncate(segment, segment.stat().st_size - cut)
    again = open_tier()
    assert load(again, prompt(1)) == [True, True, False]
    assert again.counters.failures == {"ignored: torn": 1}


def test_a_full_disk_costs_pages_and_nothing_else(
    open_tier: OpenTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier()
    keep(tier, prompt(1))

    def full(file: int, data: memoryview) -> int:
        written = os.write(file, data[:100]) if len(data) > 200 else 0
        if not written:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written

    class FullOs:
        write = staticmethod(full)

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

    with monkeypatch.context() as patch:
        patch.setattr(disk_module, "os", FullOs())
        assert keep(tier, prompt(2)) == [False] * 3
    assert tier.counters.failures == {"unwritable": 3}
    assert not tier.counters.available
    assert load(tier, prompt(1)) == [True] * 3
    assert tier.lookup([prompt(2)[0].key]) == 0
    assert keep(tier, prompt(2)) == [True] * 3
    assert tier.counters.available
    tier.close()
    again = open_tier()
    assert load(again, prompt(1) + prompt(2)) == [True] * 6


def test_a_medium_that_becomes_read_only(
    open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(segment_bytes=2000)
    keep(tier, prompt(1, 1))

    def read_only(path: object, flags: int, mode: int = 0) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    class ReadOnlyOs:
        open = staticmethod(read_only)

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

    monkeypatch.setattr(disk_module, "os", ReadOnlyOs())
    assert keep(tier, prompt(2)) == [False] * 3
    assert tier.counters.failures == {"unwritable": 3}
    assert load(tier, prompt(1, 1)) == [True]
    assert tier.held_bytes == record.header_bytes(PAGE_TOKENS) + PAGE_BYTES


def test_the_folder_is_deleted_under_it(open_tier: OpenTier, tmp_path: Path) -> None:
    tier = open_tier()
    keep(tier, prompt(1))
    shutil.rmtree(tmp_path / "kv")
    assert load(tier, prompt(1)) == [False] * 3
    assert tier.counters.failures == {"unreadable": 3}
    for number in range(2, 6):
        keep(tier, prompt(number))
    assert load(tier, prompt(5)) == [True] * 3


def test_two_processes_write_one_page(open_tier: OpenTier, tmp_path: Path) -> None:
    one, other = open_tier(), open_tier()
    assert keep(one, prompt(1)) == keep(other, prompt(1)) == [True] * 3
    assert len(segments(one, tmp_path)) == 2
    assert load(one, prompt(1)) == load(other, prompt(1)) == [True] * 3
    one.close()
    other.close()
    again = open_tier()
    assert again.policy.resident_pages == 3
    assert load(again, prompt(1)) == [True] * 3


@pytest.mark.parametrize(
    "changes", [{"layout_hash": bytes(32)}, {"page_bytes": 999}, {"page_tokens": 8}]
)
def test_other_layouts_are_ignored_and_make_room(
    open_tier: OpenTier, tmp_path: Path, changes: dict[str, Any]
) -> None:
    old = open_tier()
    for number in range(8):
        keep(old, prompt(number))
    old.close()
    new = open_tier(**changes)
    assert new.policy.resident_pages == 0
    assert load(new, prompt(1)) == [False] * 3
    assert new.held_bytes <= 60_000


def test_another_version_is_ignored(open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch) -> None:
    old = open_tier()
    keep(old, prompt(1))
    old.close()
    monkeypatch.setattr(record, "VERSION", 2)
    new = open_tier()
    assert load(new, prompt(1)) == [False] * 3
    assert new.counters.failures == {"ignored: version": 1}


def test_other_tokens_under_the_same_key_are_not_taken(open_tier: OpenTier) -> None:
    tier = open_tier()
    keep(tier, prompt(1))
    assert tier.load([prompt(1)[0].key], [prompt(2)[0].tokens]) == []
    assert tier.counters.failures == {"collision": 1}


def test_a_process_killed_while_it_writes(open_tier: OpenTier, tmp_path: Path) -> None:
    source = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_disk as t
tier = t.DiskTier(Path({str(tmp_path / "kv")!r}), 600_000, layout_hash=t.LAYOUT,
    page_bytes=t.PAGE_BYTES, page_tokens=t.PAGE_TOKENS, segment_bytes=5000)
number = 0
while True:
    t.keep(tier, t.prompt(number))
    print(number, flush=True)
    number += 1
"""
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        for _ in range(20):
            done = int(writer.stdout.readline())
        time.sleep(0.003)
        writer.kill()
    tier = open_tier(capacity_bytes=600_000)
    assert all(all(load(tier, prompt(number))) for number in range(done + 1))
    assert set(tier.counters.failures) <= {"ignored: torn"}


def test_a_tier_that_is_too_small_says_how_large_it_must_be(open_tier: OpenTier) -> None:
    with pytest.raises(ValueError, match="a disk tier of 9000 bytes holds no page of 1000 bytes"):
        open_tier(capacity_bytes=9000)
