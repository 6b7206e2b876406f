"""A pod that asks another for pages, whatever that one answers. Never a wrong byte."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest
from tandem_runtime import contract
from tandem_runtime.kv.tiers import peer as peer_module
from tandem_runtime.kv.tiers.contract import Page
from tandem_runtime.kv.tiers.peer import PeerPages, Peers, WantedPages
from tandem_runtime.kv.tiers.record import encode, header_of
from tandem_runtime.prefix import block_keys, token_bytes
from tandem_runtime.protocol import PrefillTarget

PAGE_TOKENS, BLOCK_TOKENS, PAGE_BYTES = 8, 4, 1000
LAYOUT, ROOT = bytes(range(32)), b"r" * 32
IDS = list(range(40))
KEYS, BLOCKS = block_keys(ROOT, IDS, PAGE_TOKENS), block_keys(ROOT, IDS, BLOCK_TOKENS)
TOKENS = [token_bytes(IDS[n * PAGE_TOKENS : (n + 1) * PAGE_TOKENS]) for n in range(5)]
FAR_S = 1e9


def payload(number: int) -> bytes:
    return bytes((7 * number + n) % 256 for n in range(PAGE_BYTES))


def record(number: int, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "key": KEYS[number],
        "parent": KEYS[number - 1] if number else bytes(16),
        "tokens": TOKENS[number],
        "payload": payload(number),
    }
    layout = changes.pop("layout", LAYOUT)
    page = Page(**{**fields, **changes})
    return encode(header_of(page, layout)) + bytes(page.payload)


class PlayedPod:
    """Answers as the test says."""

    def __init__(self) -> None:
        self.asked: list[WantedPages] = []
        self.tokens: list[str] = []
        self.connections = 0
        self.status = 200
        self.answer: Callable[[WantedPages], bytes] = lambda wanted: b"".join(
            record(KEYS.index(page.key)) for page in wanted.pages
        )
        self.length: int | None = None
        """That it claims; None: the true one."""
        self.write: Callable[[Any, bytes], None] = lambda stream, body: stream.write(body)
        pod = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                pod.connections += 1

            def do_POST(self) -> None:
                assert self.path == contract.PATH_PEER_PAGES
                body = self.rfile.read(int(self.headers["content-length"]))
                pod.asked.append(msgspec.json.decode(body, type=WantedPages))
                pod.tokens.append(self.headers["authorization"])
                answer = pod.answer(pod.asked[-1])
                self.send_response(pod.status)
                length = len(answer) if pod.length is None else pod.length
                self.send_header("content-length", str(length))
                self.end_headers()
                pod.write(self.wfile, answer)
                self.close_connection = pod.length is not None

            def log_message(self, *_: object) -> None: ...

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:  # whoever asked has gone
                    self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def address(self) -> PrefillTarget:
        return PrefillTarget("pod-1", "127.0.0.1", self.server.server_address[1])

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


@pytest.fixture
def pod() -> Iterator[PlayedPod]:
    pod = PlayedPod()
    yield pod
    pod.stop()


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def peers(clock: Clock) -> Iterator[Peers]:
    peers = Peers(
        "token",
        layout_hash=LAYOUT,
        page_bytes=PAGE_BYTES,
        page_tokens=PAGE_TOKENS,
        block_tokens=BLOCK_TOKENS,
        clock=clock,
    )
    yield peers
    peers.close()


def pages_at(peers: Peers, pod: PlayedPod, within_s: float = FAR_S) -> PeerPages:
    return peers.at(pod.address, BLOCKS, KEYS, time.monotonic() + within_s)


def load(peers: Peers, pod: PlayedPod, first: int = 0, within_s: float = FAR_S) -> int:
    """How many leading pages come, all of them as they should be."""
    found = pages_at(peers, pod, within_s).load(KEYS[first:], TOKENS[first:])
    for number, page in enumerate(found, first):
        assert bytes(page.payload) == payload(number)
    return len(found)


def test_pages_are_asked_for_by_all_their_names(pod: PlayedPod, peers: Peers) -> None:
    assert load(peers, pod, 1) == 4
    (asked,) = pod.asked
    assert (asked.layout, pod.tokens) == (LAYOUT, ["Bearer token"])
    joined = b"".join(BLOCKS)
    for number, page in enumerate(asked.pages, 1):
        assert (page.key, page.parent) == (KEYS[number], KEYS[number - 1])
        assert page.tokens == TOKENS[number]
        assert page.blocks == joined[32 * number : 32 * (number + 1)]
    assert (peers.counters.loaded_pages, peers.counters.failures) == (4, {})


def test_a_connection_is_used_again_and_replaced_when_the_pod_closed_it(
    pod: PlayedPod, peers: Peers
) -> None:
    assert load(peers, pod) == load(peers, pod) == 5
    assert pod.connections == 1
    pod.length = len(b"".join(map(record, range(5))))  # it closes after this answer
    assert load(peers, pod) == 5
    assert load(peers, pod) == 5
    assert pod.connections == 2
    assert peers.counters.failures == {}


def test_an_answer_carries_about_8_mib(
    pod: PlayedPod, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers.trip_pages = 2
    assert load(peers, pod) == 5
    assert [len(asked.pages) for asked in pod.asked] == [2, 2, 1]
    held = 3
    pod.answer = lambda wanted: b"".join(
        record(n) for page in wanted.pages if (n := KEYS.index(page.key)) < held
    )
    assert load(peers, pod) == 3
    assert len(pod.asked) == 5  # what follows a missing page is not asked for
    assert peers.counters.failures == {}


def test_a_pod_that_holds_nothing_is_no_failure(pod: PlayedPod, peers: Peers) -> None:
    pod.answer = lambda wanted: b""
    assert load(peers, pod) == 0
    assert load(peers, pod) == 0
    assert len(pod.asked) == 2
    assert peers.counters.failures == {}


def damaged(wanted: WantedPages) -> bytes:
    second = bytearray(record(1))
    second[-300] ^= 4
    return record(0) + bytes(second) + record(2)


def other_tokens(wanted: WantedPages) -> bytes:
    return record(0) + record(1, tokens=TOKENS[3]) + record(2)


def other_layout(wanted: WantedPages) -> bytes:
    return record(0) + record(1, layout=bytes(32)) + record(2)


def other_page(wanted: WantedPages) -> bytes:
    return record(0) + record(2) + record(1)


def other_version(wanted: WantedPages) -> bytes:
    second = bytearray(record(1))
    second[4] += 1
    return record(0) + bytes(second)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (damaged, "damaged"),
        (other_tokens, "collision"),
        (other_layout, "damaged"),
        (other_page, "damaged"),
        (other_version, "version"),
    ],
)
def test_a_page_that_is_not_what_it_should_be_is_dropped(
    pod: PlayedPod,
    peers: Peers,
    clock: Clock,
    answer: Callable[[WantedPages], bytes],
    reason: str,
) -> None:
    honest, pod.answer = pod.answer, answer
    assert load(peers, pod) == 1
    assert peers.counters.failures == {reason: 1}
    assert load(peers, pod) == 0  # for a while nothing is asked of it
    assert len(pod.asked) == 1
    clock.now_s += 1.5
    pod.answer = honest
    assert load(peers, pod) == 5
    assert peers.counters.failures == {reason: 1}


@pytest.mark.parametrize("length", [10, 4999, 6 * len(record(0)), 1 << 40, -1])
def test_an_answer_of_a_wrong_length_is_not_read(pod: PlayedPod, peers: Peers, length: int) -> None:
    pod.length = length
    assert load(peers, pod) == 0
    assert peers.counters.failures == {"torn": 1}


def test_an_answer_that_breaks_off_gives_what_came(pod: PlayedPod, peers: Peers) -> None:
    pod.length = 5 * len(record(0))
    pod.write = lambda stream, body: stream.write(body[: int(2.5 * len(record(0)))])
    assert load(peers, pod) == 2
    assert peers.counters.failures == {"torn": 1}


@pytest.mark.parametrize(
    ("status", "reason"), [(503, "busy"), (409, "layout"), (403, "refused"), (404, "refused")]
)
def test_a_pod_that_says_no(pod: PlayedPod, peers: Peers, status: int, reason: str) -> None:
    pod.status = status
    assert load(peers, pod) == 0
    assert load(peers, pod) == 0
    assert peers.counters.failures == {reason: 1}
    assert len(pod.asked) == 1


def test_a_pod_that_is_gone(peers: Peers, clock: Clock) -> None:
    pod = PlayedPod()
    pod.stop()
    assert load(peers, pod) == 0
    assert load(peers, pod) == 0
    assert peers.counters.failures == {"unreachable": 1}
    clock.now_s += 1.5
    assert load(peers, pod) == 0
    assert peers.counters.failures == {"unreachable": 2}
    # Another pod at the same address is another pod.
    named = PrefillTarget("pod-2", pod.address.host, pod.address.port)
    assert peers.at(named, BLOCKS, KEYS, time.monotonic() + FAR_S).load(KEYS, TOKENS) == []
    assert peers.counters.failures == {"unreachable": 3}


def test_one_peer_that_fails_is_not_another_ones_fault(pod: PlayedPod, peers: Peers) -> None:
    gone = PlayedPod()
    gone.stop()
    assert load(peers, gone) == 0
    assert load(peers, pod) == 5


def test_a_pod_that_says_nothing(
    pod: PlayedPod, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_module, "SILENT_S", 0.2)
    go_on = threading.Event()

    def write(stream: Any, body: bytes) -> None:
        stream.write(body[: len(record(0)) + 7])
        go_on.wait(60)

    pod.write = write
    try:
        assert load(peers, pod) == 1
        assert peers.counters.failures == {"slow": 1}
        assert load(peers, pod) == 0
        assert len(pod.asked) == 1
    finally:
        go_on.set()


def test_nothing_is_waited_for_beyond_its_time(pod: PlayedPod, peers: Peers) -> None:
    go_on = threading.Event()

    def drip(stream: Any, body: bytes) -> None:
        for n in range(len(body)):
            stream.write(body[n : n + 1])
            stream.flush()
            if go_on.wait(0.02):
                return

    pod.write = drip
    try:
        assert load(peers, pod, within_s=0.5) == 0  # all of it would take 100 s
        assert peers.counters.failures == {"slow": 1}
    finally:
        go_on.set()


def test_a_prompt_whose_time_is_up_asks_nobody(pod: PlayedPod, peers: Peers) -> None:
    assert load(peers, pod, within_s=-1.0) == 0
    assert pod.asked == []
    assert peers.counters.failures == {}
    assert load(peers, pod) == 5


def test_peers_of_long_ago_are_forgotten(
    pod: PlayedPod, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_module, "_MOST_PEERS", 2)
    assert load(peers, pod) == 5
    for port in (1, 2, 3):
        peers.at(PrefillTarget("other", "127.0.0.1", port), BLOCKS, KEYS, FAR_S)
    assert len(peers._peers) == 2
    assert load(peers, pod) == 5
    assert pod.connections == 2
