"""Pages that another pod of the revision holds, asked for over HTTP (`contract.PATH_PEER_PAGES`).

The gateway names the pod; this one asks it for keys that it has computed from its own prompt and
its own tenant's root, and believes nothing: a page is a record (record.py) whose checksums, key and
token ids are compared. What is wrong, torn or late is dropped, counted and computed.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Annotated, Final

import msgspec

from tandem_runtime import contract
from tandem_runtime.kv.tiers.breaker import Breaker
from tandem_runtime.kv.tiers.contract import Counters, Page
from tandem_runtime.kv.tiers.record import NotARecord, header_bytes, page_of
from tandem_runtime.kv.tiers.speed import Speed
from tandem_runtime.prefix import KEY_BYTES
from tandem_runtime.protocol import PrefillTarget

log = logging.getLogger(__name__)

CONNECT_S: Final = 1.0
"""To connect."""
SILENT_S: Final = 2.0
"""For which a pod may send nothing."""
TRIP_BYTES: Final = 8 << 20
"""Of payloads that one answer carries, or one page."""
MOST_PAGES: Final = 64
"""In one question."""
_MOST_PEERS: Final = 256
"""That are remembered: connections, and how fast they are."""


class WantedPage(msgspec.Struct, frozen=True):
    """A page by all its names."""

    key: bytes
    """Under which tiers keep it."""
    parent: bytes
    """Key of the page before; zeros for a first page."""
    blocks: bytes
    """Keys of its KV blocks, joined: under which the accelerator keeps it."""
    tokens: bytes
    """Its token ids, which whoever gives it compares (`prefix.token_bytes`)."""


class WantedPages(msgspec.Struct, frozen=True):
    """Asks for the leading ones of successive pages; answered by so many records, joined."""

    layout: bytes
    """`KvLayout.hash`."""
    pages: Annotated[tuple[WantedPage, ...], msgspec.Meta(max_length=MOST_PAGES)]


class _Failed(Exception):
    """The peer is not asked for a while; the text is the reason, in a word, for metrics."""


class _Peer:
    """A pod as this one knows it."""

    def __init__(self, address: PrefillTarget) -> None:
        self.address = address
        self.breaker = Breaker()
        self.speed = Speed()
        self._connection: HTTPConnection | None = None

    def post(self, body: bytes, headers: Mapping[str, str], until_s: float) -> HTTPResponse:
        """The answer's beginning. Raises `OSError` and `HTTPException`."""
        if self._connection is not None:
            try:
                return self._send(self._connection, body, headers, until_s)
            except TimeoutError:
                raise
            except (OSError, HTTPException):
                self.close()  # it was idle for so long that the pod has closed it
        address = self.address
        self._connection = HTTPConnection(
            address.host, address.port, timeout=min(CONNECT_S, _left_s(until_s))
        )
        return self._send(self._connection, body, headers, until_s)

    def _send(
        self, connection: HTTPConnection, body: bytes, headers: Mapping[str, str], until_s: float
    ) -> HTTPResponse:
        if connection.sock is None:
            connection.connect()
        self.await_until(until_s)
        connection.request("POST", contract.PATH_PEER_PAGES, body, headers)
        return connection.getresponse()

    def await_until(self, until_s: float) -> None:
        """Nothing is waited for beyond that. Raises `TimeoutError` when it is past."""
        if self._connection is not None and self._connection.sock is not None:
            self._connection.sock.settimeout(min(SILENT_S, _left_s(until_s)))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Peers:
    """The pods that were named so far. One thread has them.

    Args:
        token: that pods show each other (`contract.pod_token`).
        layout_hash: `KvLayout.hash`.
        page_bytes: of a payload.
        page_tokens: of a page.
        block_tokens: of a KV block, in this pod and in its peers.
        clock: for how long to leave a peer alone.
    """

    name = "peer"

    def __init__(
        self,
        token: str,
        *,
        layout_hash: bytes,
        page_bytes: int,
        page_tokens: int,
        block_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters = Counters()
        self.speed = Speed()
        """Of the one that gave pages last; each has its own."""
        self.layout_hash = layout_hash
        self.page_bytes = page_bytes
        self.page_tokens = page_tokens
        self.trip_pages = max(1, TRIP_BYTES // page_bytes)
        self.headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
        self.clock = clock
        self._block_tokens = block_tokens
        self._peers: OrderedDict[tuple[str, int], _Peer] = OrderedDict()

    def at(
        self,
        address: PrefillTarget,
        block_keys: Sequence[bytes],
        keys: Sequence[bytes],
        until_s: float,
    ) -> PeerPages:
        """A prompt's pages at a peer.

        Args:
            address: where it serves HTTP.
            block_keys: of its full blocks.
            keys: of its full pages.
            until_s: on `time.monotonic`: nothing that comes later is of use.
        """
        count = self.page_tokens // self._block_tokens
        blocks = [b"".join(block_keys[n * count : (n + 1) * count]) for n in range(len(keys))]
        parents = (bytes(KEY_BYTES), *keys)
        names = {k: (p, b) for k, p, b in zip(keys, parents, blocks, strict=False)}
        return PeerPages(self, self._peer(address), names, until_s)

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()

    def _peer(self, address: PrefillTarget) -> _Peer:
        place = (address.host, address.port)
        peer = self._peers.get(place)
        if peer is None or peer.address.pod != address.pod:
            if peer is not None:
                peer.close()  # another pod has the address now
            peer = self._peers[place] = _Peer(address)
        self._peers.move_to_end(place)
        while len(self._peers) > _MOST_PEERS:
            self._peers.popitem(last=False)[1].close()
        return peer


class PeerPages:
    """One prompt's pages at one peer. Implements `contract.Source`."""

    name = Peers.name

    def __init__(
        self,
        peers: Peers,
        peer: _Peer,
        names: Mapping[bytes, tuple[bytes, bytes]],
        until_s: float,
    ) -> None:
        self.counters = peers.counters
        self.speed = peer.speed
        self._peers = peers
        self._peer = peer
        self._names = names
        """By key: the parent's key, and the blocks'."""
        self._until_s = until_s

    def load(self, keys: Sequence[bytes], tokens: Sequence[bytes]) -> list[Page]:
        found: list[Page] = []
        while len(found) < len(keys):
            trip = slice(len(found), len(found) + self._peers.trip_pages)
            came = self._trip(keys[trip], tokens[trip])
            found += came
            if len(came) < len(keys[trip]):
                break
        self.counters.loaded_pages += len(found)
        return found

    def _trip(self, keys: Sequence[bytes], tokens: Sequence[bytes]) -> list[Page]:
        peer = self._peer
        if time.monotonic() >= self._until_s or not peer.breaker.allows(self._peers.clock()):
            return []
        found: list[Page] = []
        try:
            self._ask(keys, tokens, found)
        except _Failed as failure:
            self._failed(str(failure))
        except NotARecord as damage:
            self._failed(str(damage))
        except TimeoutError:
            self._failed("slow")
        except (OSError, HTTPException):
            self._failed("unreachable")
        else:
            peer.breaker.succeeded()
        return found

    def _ask(self, keys: Sequence[bytes], tokens: Sequence[bytes], found: list[Page]) -> None:
        """Add the leading pages to `found`; raises for what went wrong after them."""
        wanted = WantedPages(
            self._peers.layout_hash,
            tuple(WantedPage(k, *self._names[k], t) for k, t in zip(keys, tokens, strict=True)),
        )
        body = msgspec.json.encode(wanted)
        reply = self._peer.post(body, self._peers.headers, self._until_s)
        if reply.status != 200:
            raise _Failed(_REASONS.get(reply.status, "refused"))
        size = header_bytes(self._peers.page_tokens) + self._peers.page_bytes
        if reply.length is None:
            raise NotARecord("torn")
        count, rest = divmod(reply.length, size)
        if rest or count > len(keys):
            raise NotARecord("torn")
        for key, ids in zip(keys[:count], tokens, strict=False):
            record = self._read(reply, size)
            page = page_of(
                record,
                layout_hash=self._peers.layout_hash,
                key=key,
                tokens=ids,
                page_bytes=self._peers.page_bytes,
            )
            found.append(page)
        reply.read()  # nothing: the connection can be used again

    def _read(self, reply: HTTPResponse, size: int) -> bytearray:
        record = bytearray()
        while len(record) < size:
            self._peer.await_until(self._until_s)
            piece = reply.read1(size - len(record))
            if not piece:
                raise NotARecord("torn")
            record += piece
        return record

    def _failed(self, reason: str) -> None:
        peer = self._peer
        peer.close()
        self.counters.fail(reason)
        if not peer.breaker.failing:
            level = logging.DEBUG if reason == "busy" else logging.WARNING
            log.log(level, "pod %s gives no pages: %s", peer.address.pod, reason)
        peer.breaker.failed(self._peers.clock())


_REASONS: Final = {503: "busy", 409: "layout"}


def _left_s(until_s: float) -> float:
    """Raises `TimeoutError` when nothing is left."""
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("time is up")
    return left_s
