"""The disk tier: pages in append-only segment files, checksummed, bounded, safe against crashes.

    ROOT/<writer>/lock           held (flock) by the process that writes here
    ROOT/<writer>/00000001.seg   records one after the other (record.py)

Each process writes to a folder of its own, so a segment has one writer, and adopts the folders of
those that have ended. A page can be found only after its segment was synced. After a crash headers
are scanned; what follows a torn record in a segment is ignored. Records of other versions and
layouts are never read, and go when room is needed.

An evicted page leaves a hole; a segment with many holes is given up, its live pages written anew.
The policy therefore gets four fifths of the room.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import xxhash

from tandem_runtime.kv.tiers.contract import Page, Told
from tandem_runtime.kv.tiers.policy import NOWHERE
from tandem_runtime.kv.tiers.record import (
    Header,
    NotARecord,
    decode,
    encode,
    header_bytes,
    header_of,
)
from tandem_runtime.kv.tiers.resident import ResidentTier
from tandem_runtime.kv.tiers.tenants import NOBODY, TenantParts

log = logging.getLogger(__name__)

SEGMENT_BYTES: Final = 64 << 20
_LIVE_SHARE: Final = 0.8
_OFFSET_BITS: Final = 40


class DiskTier(ResidentTier):
    """Implements `contract.Tier`.

    Args:
        root: a folder; made if missing. Several processes may share it.
        capacity_bytes: of this process's segments, those that it adopts included.
        layout_hash: `KvLayout.hash`; other records are ignored.
        page_bytes: of a payload.
        page_tokens: of a page.
        tenants: whose part of it is how large.
        segment_bytes: a segment ends when it is so long; it holds at least one page.

    Raises:
        ValueError: the capacity is too small for a few segments, or a tenant's part for a page.
        OSError: the folder cannot be written.
    """

    name = "disk"

    def __init__(
        self,
        root: Path,
        capacity_bytes: int,
        *,
        layout_hash: bytes,
        page_bytes: int,
        page_tokens: int,
        tenants: TenantParts = NOBODY,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self._layout_hash = layout_hash
        self._page_bytes = page_bytes
        self._page_tokens = page_tokens
        self._record_bytes = header_bytes(page_tokens) + page_bytes
        self._segment_bytes = max(segment_bytes, self._record_bytes)
        usable = capacity_bytes - 2 * self._segment_bytes
        pages = int(usable * _LIVE_SHARE) // self._record_bytes
        if pages < 1:
            least = 2 * self._segment_bytes + int(self._record_bytes / _LIVE_SHARE) + 1
            raise ValueError(
                f"a disk tier of {capacity_bytes} bytes holds no page of {page_bytes} bytes beside "
                f"the segments that it works with: give at least {least}"
            )
        super().__init__(tenants.policy(pages))
        self._capacity_bytes = capacity_bytes
        self._segments: dict[int, Path] = {}
        """By number, oldest first; the last one may be open for writing."""
        self._sizes: dict[int, int] = {}
        self._live: dict[int, int] = {}
        """Pages of each segment that can be found."""
        self._adopted: list[bytes] = []
        """Pages that were here when it was opened, until `tell`."""
        self._number = 0
        self._writing: int | None = None
        self._file: int | None = None
        self._locks: list[int] = []
        root.mkdir(parents=True, exist_ok=True)
        self._folder = root / secrets.token_hex(8)
        self._folder.mkdir()
        self._lock(self._folder)
        for folder in sorted(root.iterdir()):
            if folder.is_dir() and folder != self._folder and self._lock(folder):
                self._recover(folder)
        self._make_room(0)

    @property
    def held_bytes(self) -> int:
        """Of all segments."""
        return sum(self._sizes.values())

    def tell(self, told: Told) -> None:
        self._told = told
        for key in self._adopted:
            if self.policy.place(key) != NOWHERE:
                told(key, True)
        self._adopted.clear()

    # -- the contract -----------------------------------------------------------------------------
    def _load(self, key: bytes, tokens: bytes) -> Page | None:
        place = self.policy.place(key)
        if place == NOWHERE:
            return None
        number, offset = divmod(place, 1 << _OFFSET_BITS)
        try:
            page = self._read(self._segments[number], offset, key, tokens)
        except NotARecord as damage:
            self._lose(key, str(damage))
        except OSError as error:
            log.warning("%s cannot be read: %s", self._segments[number], error)
            self.counters.available = False
            self._lose(key, "unreadable")
        else:
            self.counters.loaded_pages += 1
            return page
        return None

    def store(self, page: Page) -> bool:
        if not self.policy.has(page.key):
            return False  # evicted meanwhile
        if self.policy.place(page.key) != NOWHERE:
            return True
        header = header_of(page, self._layout_hash)
        try:
            self._make_room(self._record_bytes)
            self._append(header, page.payload)
        except OSError as error:
            log.warning("a page cannot be written to %s: %s", self._folder, error)
            self._abandon_segment()
            self.counters.available = False
            self._lose(page.key, "unwritable")
            return False
        self.counters.available = True
        self.counters.stored_pages += 1
        return True

    def forget(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            if self.policy.place(key) == NOWHERE:
                self.policy.drop(key)

    def close(self) -> None:
        self._close_segment()
        for lock in self._locks:
            os.close(lock)
        self._locks.clear()

    # -- records ----------------------------------------------------------------------------------
    def _read(self, segment: Path, offset: int, key: bytes, tokens: bytes) -> Page:
        with segment.open("rb", buffering=0) as file:
            file.seek(offset)
            header = decode(file.read(header_bytes(self._page_tokens)), self._page_tokens)
            if (header.layout_hash, header.key) != (self._layout_hash, key):
                raise NotARecord("damaged")
            if header.tokens != tokens:
                raise NotARecord("collision")
            payload = bytearray(header.payload_bytes)
            view = memoryview(payload)
            while view and (count := file.readinto(view)):
                view = view[count:]
        if view or xxhash.xxh3_64_intdigest(payload) != header.payload_checksum:
            raise NotARecord("damaged")
        return Page(key, header.parent, tokens, payload, header.decoded)

    def _append(self, header: Header, payload: bytes | bytearray | memoryview) -> None:
        number, file = self._open_segment()
        offset = self._sizes[number]
        self._sizes[number] += header.record_bytes
        for part in (encode(header), payload):
            view = memoryview(part).cast("B")
            while view:
                view = view[os.write(file, view) :]
        os.fsync(file)
        self.policy.put(header.key, (number << _OFFSET_BITS) + offset)
        self._live[number] += 1
        self._told(header.key, True)

    def _lose(self, key: bytes, reason: str) -> None:
        self.counters.fail(reason)
        place = self.policy.drop(key)
        self._told(key, False)
        if place != NOWHERE:
            self._left(place)

    def _left(self, place: int) -> None:
        self._live[place >> _OFFSET_BITS] -= 1

    # -- segments ---------------------------------------------------------------------------------
    def _open_segment(self) -> tuple[int, int]:
        """The segment that is being written: its number, and the open file."""
        number, file = self._writing, self._file
        if number is None or file is None or self._is_full(number):
            self._close_segment()
            self._folder.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
            number = self._add_segment(self._folder / f"{self._number + 1:08}.seg", 0)
            self._writing = number
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
            self._file = file = os.open(self._segments[number], flags, 0o600)
            _sync_folder(self._folder)
        return number, file

    def _is_full(self, number: int) -> bool:
        return self._sizes[number] + self._record_bytes > self._segment_bytes

    def _add_segment(self, path: Path, size: int) -> int:
        self._number += 1
        self._segments[self._number] = path
        self._sizes[self._number] = size
        self._live[self._number] = 0
        return self._number

    def _close_segment(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = self._writing = None

    def _abandon_segment(self) -> None:
        """What was written last is torn, so nothing may follow it."""
        number = self._writing
        self._close_segment()
        if number is not None and not self._live[number]:
            self._delete(number)

    def _make_room(self, missing_bytes: int) -> None:
        """Give up segments, those with the most bytes of pages that are gone first."""
        while self.held_bytes + missing_bytes > self._capacity_bytes - self._segment_bytes:
            closed = [number for number in self._segments if number != self._writing]
            most = max(closed, key=self._gone_bytes, default=None)
            if most is not None and self._gone_bytes(most):
                self._give_up(most)
            elif self._writing is not None:
                self._close_segment()
            else:
                return

    def _gone_bytes(self, number: int) -> int:
        return self._sizes[number] - self._live[number] * self._record_bytes

    def _give_up(self, number: int) -> None:
        path = self._segments[number]
        for header, offset in self._records(path):
            if self.policy.place(header.key) != (number << _OFFSET_BITS) + offset:
                continue
            page = self._load(header.key, header.tokens)
            if page is not None:
                self.counters.loaded_pages -= 1
                self._append(header, page.payload)
                self._live[number] -= 1
        self._delete(number)

    def _delete(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self._segments[number].unlink()
        del self._segments[number], self._sizes[number], self._live[number]

    # -- recovery ---------------------------------------------------------------------------------
    def _lock(self, folder: Path) -> bool:
        """Whether the folder is this process's to write to."""
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return False
        self._locks.append(lock)
        return True

    def _recover(self, folder: Path) -> None:
        for path in sorted(folder.glob("*.seg")):
            number = self._add_segment(path, path.stat().st_size)
            for header, offset in self._records(path):
                place = (number << _OFFSET_BITS) + offset
                if header.layout_hash == self._layout_hash and self.policy.adopt(header.key, place):
                    self._live[number] += 1
                    self._adopted.append(header.key)

    def _records(self, path: Path) -> Iterator[tuple[Header, int]]:
        """Headers of a segment's whole records and where they are, up to the first that is none."""
        try:
            size = path.stat().st_size
            with path.open("rb", buffering=0) as file:
                offset = 0
                while offset + self._record_bytes <= size:
                    file.seek(offset)
                    try:
                        header = decode(
                            file.read(header_bytes(self._page_tokens)), self._page_tokens
                        )
                    except NotARecord as stop:
                        self.counters.fail(f"ignored: {stop}")
                        return
                    if header.payload_bytes != self._page_bytes:
                        self.counters.fail("ignored: layout")
                        return
                    yield header, offset
                    offset += header.record_bytes
                if offset < size:
                    self.counters.fail("ignored: torn")
        except OSError as error:
            log.warning("%s cannot be read: %s", path, error)
            self.counters.fail("unreadable")


def _sync_folder(folder: Path) -> None:
    entry = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)
