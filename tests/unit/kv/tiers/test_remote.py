"""The remote tier on real servers: what is found again, and by whom, whatever becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import valkey
from model_servers import S3, Site, serving
from stores import ValkeyServer, tls_in_front, valkey_server
from tandem.cluster.pki import Authority
from tandem_runtime.kv.tiers import stores as stores_module
from tandem_runtime.kv.tiers.contract import Page
from tandem_runtime.kv.tiers.remote import RemoteTier
from tandem_runtime.kv.tiers.stores import open_store
from tandem_runtime.prefix import block_keys, token_bytes

PAGE_TOKENS, PAGE_BYTES = 4, 1000
LAYOUT = bytes(range(32))
OpenTier = Callable[..., RemoteTier]


@pytest.fixture(scope="module")
def running() -> Iterator[ValkeyServer]:
    with valkey_server() as server:
        yield server


@pytest.fixture
def server(running: ValkeyServer) -> ValkeyServer:
    with running.client() as client:
        client.flushall()
    return running


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "kv").mkdir()
    with serving(Site(tmp_path), S3) as site:
        yield site


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_tier(clock: Clock) -> Iterator[OpenTier]:
    tiers: list[RemoteTier] = []

    def open_one(uri: str, credentials: dict[str, str] | None = None, **changes: Any) -> RemoteTier:
        known: dict[str, Any] = {
            "layout_hash": LAYOUT,
            "page_bytes": PAGE_BYTES,
            "page_tokens": PAGE_TOKENS,
            "remembered_pages": 100,
            "clock": clock,
        }
        store = open_store(uri, credentials or {}, ttl_s=60, value_bytes=PAGE_BYTES)
        tiers.append(RemoteTier(store, **{**known, **changes}))
        return tiers[-1]

    yield open_one
    for tier in tiers:
        tier.close()


@pytest.fixture(params=["valkey", "s3"])
def open_any(request: pytest.FixtureRequest, open_tier: OpenTier) -> OpenTier:
    """A tier on each kind of store."""
    if request.param == "valkey":
        server = request.getfixturevalue("server")
        return lambda **changes: open_tier(server.uri, **changes)
    site = request.getfixturevalue("site")
    return lambda **changes: open_tier("s3://kv/some/where", aws(site), **changes)


def aws(site: Site) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_ENDPOINT_URL": site.url,
        "AWS_REGION": "here",
    }


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


def keep(tier: RemoteTier, pages: list[Page]) -> list[bool]:
    wanted = tier.use("tenant", [page.key for page in pages])
    return [tier.store(pages[place]) for place in wanted]


def load(tier: RemoteTier, pages: list[Page]) -> int:
    """How many leading pages come back; those that do are what was stored."""
    found = tier.load([page.key for page in pages], [page.tokens for page in pages])
    for page, came in zip(pages, found, strict=False):
        assert came == page
    return len(found)


def test_one_pod_stores_and_another_loads(open_any: OpenTier) -> None:
    one, other = open_any(), open_any()
    assert keep(one, prompt(1)) == [True] * 3
    assert load(other, prompt(1)) == load(one, prompt(1)) == 3
    assert load(other, prompt(2)) == 0
    # What was found there is not sent again.
    assert keep(other, prompt(1)) == keep(one, prompt(1)) == []
    assert (one.counters.stored_pages, other.counters.stored_pages) == (3, 0)
    assert not one.counters.failures
    assert not other.counters.failures


def test_two_pods_write_one_page(open_any: OpenTier) -> None:
    tiers = [open_any(), open_any()]
    pages = prompt(1, 20)
    threads = [Thread(target=keep, args=(tier, pages)) for tier in tiers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [load(tier, pages) for tier in tiers] == [20, 20]
    assert [tier.counters.failures for tier in tiers] == [{}, {}]


def test_other_models_and_versions_never_meet(
    open_any: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(open_any(), prompt(1))
    other_model = open_any(layout_hash=bytes(32))
    assert load(other_model, prompt(1)) == 0
    with monkeypatch.context() as patch:
        patch.setattr("tandem_runtime.kv.tiers.remote.VERSION", 2)
        assert load(open_any(), prompt(1)) == 0
    assert load(open_any(), prompt(1)) == 3


def damage(client: valkey.Valkey, page: Page, change: Callable[[bytearray], object]) -> None:
    (name,) = client.keys(f"*{page.key.hex()}")
    value = bytearray(client.get(name))
    change(value)
    client.set(name, bytes(value))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda value: value.__setitem__(-300, value[-300] ^ 4), "damaged"),
        (lambda value: value.__setitem__(30, value[30] ^ 4), "damaged"),
        (lambda value: value.__setitem__(4, value[4] + 1), "version"),
        (lambda value: value.__delitem__(slice(-1, None)), "damaged"),
        (lambda value: value.extend(b"x"), "damaged"),
        (lambda value: value.clear(), "torn"),
    ],
    ids=["payload", "header", "version", "short", "long", "empty"],
)
def test_a_value_that_is_not_what_was_stored_is_dropped(
    server: ValkeyServer,
    open_tier: OpenTier,
    change: Callable[[bytearray], object],
    reason: str,
) -> None:
    tier, pages = open_tier(server.uri), prompt(1)
    keep(tier, pages)
    with server.client() as client:
        damage(client, pages[1], change)
    assert load(tier, pages) == 1
    assert tier.counters.failures == {reason: 1}
    assert keep(tier, pages) == [True]  # computed, and written anew
    assert load(tier, pages) == 3


def test_token_ids_are_compared(server: ValkeyServer, open_tier: OpenTier) -> None:
    tier = open_tier(server.uri)
    keep(tier, prompt(1))
    assert tier.load([prompt(1)[0].key], [prompt(2)[0].tokens]) == []
    assert tier.counters.failures == {"collision": 1}


def test_a_server_that_is_wiped(server: ValkeyServer, open_tier: OpenTier) -> None:
    tier = open_tier(server.uri)
    keep(tier, prompt(1))
    with server.client() as client:
        client.flushall()
    assert load(tier, prompt(1)) == 0
    assert tier.counters.evicted_pages == 1
    assert not tier.counters.failures
    # Each page is found to be gone when it is asked for.
    for number in range(1, 3):
        assert load(tier, prompt(1)[number:]) == 0
    assert keep(tier, prompt(1)) == [True] * 3
    assert load(tier, prompt(1)) == 3


def test_a_server_that_is_stopped_is_left_alone_for_a_while(
    server: ValkeyServer, open_tier: OpenTier, clock: Clock
) -> None:
    tier = open_tier(server.uri)
    keep(tier, prompt(1))
    server.stop()
    assert load(tier, prompt(1)) == 0
    assert tier.counters.failures == {"unreachable": 1}
    assert not tier.counters.available
    # Nothing is asked, and nothing is wanted.
    assert tier.lookup([page.key for page in prompt(1)]) == 0
    assert load(tier, prompt(1)) == 0
    assert keep(tier, prompt(2)) == []
    assert tier.counters.failures == {"unreachable": 1}
    clock.now_s += 1.5
    assert load(tier, prompt(1)) == 0
    assert tier.counters.failures == {"unreachable": 2}
    clock.now_s += 1.5  # the second pause is twice as long
    assert load(tier, prompt(1)) == 0
    assert tier.counters.failures == {"unreachable": 2}
    server.start()
    clock.now_s += 1
    assert keep(tier, prompt(2)) == [True] * 3
    assert load(tier, prompt(2)) == 3
    assert tier.counters.available


def test_a_server_that_answers_nothing(
    server: ValkeyServer, open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores_module, "SILENT_S", 0.1)
    tier = open_tier(server.uri)
    keep(tier, prompt(1))
    server.freeze()
    assert load(tier, prompt(1)) == 0
    assert tier.counters.failures == {"slow": 1}
    assert tier.lookup([prompt(1)[0].key]) == 0
    server.thaw()


def test_a_full_server_is_still_read(open_tier: OpenTier, clock: Clock) -> None:
    with valkey_server("--maxmemory", "1mb", "--maxmemory-policy", "noeviction") as server:
        tier = open_tier(server.uri)
        with server.client() as client:
            client.config_set("maxmemory", 0)
            keep(tier, prompt(1))
            client.config_set("maxmemory", 1)
            assert keep(tier, prompt(2)) == [False] * 3
            assert tier.counters.failures == {"full": 1, "unavailable": 2}
            assert load(tier, prompt(1)) == 3
            client.config_set("maxmemory", 0)
            clock.now_s += 2
            assert keep(tier, prompt(2)) == [True] * 3


def test_a_page_is_kept_for_its_time_after_its_last_use(
    server: ValkeyServer, open_tier: OpenTier
) -> None:
    tier = open_tier(server.uri)
    keep(tier, prompt(1, 1))
    with server.client() as client:
        (name,) = client.keys()
        assert 50 < client.ttl(name) <= 60
        client.expire(name, 5)
        load(tier, prompt(1, 1))
        assert 50 < client.ttl(name) <= 60
        assert name.startswith(b"tandem-kv/")


def test_a_password(open_tier: OpenTier) -> None:
    with valkey_server("--requirepass", "open sesame") as server:
        stranger = open_tier(server.uri)
        assert keep(stranger, prompt(1)) == [False] * 3
        assert stranger.counters.failures == {"refused": 1, "unavailable": 2}
        wrong = open_tier(server.uri, {"PASSWORD": "open"})
        assert load(wrong, prompt(1)) == 0
        assert wrong.counters.failures == {"refused": 1}
        known = open_tier(server.uri, {"USERNAME": "default", "PASSWORD": "open sesame"})
        assert keep(known, prompt(1)) == [True] * 3
        assert load(known, prompt(1)) == 3


def test_tls_trusts_the_authority_of_the_secret_alone(
    server: ValkeyServer, open_tier: OpenTier, tmp_path: Path
) -> None:
    now = datetime.now(UTC)
    authority = Authority.create(tmp_path, "an authority", now)
    pair = authority.issue("valkey", "valkey", now, hosts=["localhost"])
    trusted = {"CA_CERT": authority.path.read_text()}
    with tls_in_front(server, pair.certificate, pair.key) as port:
        known = open_tier(f"rediss://localhost:{port}", trusted)
        assert keep(known, prompt(1)) == [True] * 3
        assert load(known, prompt(1)) == 3
        known.close()
        for uri, credentials in (
            (f"valkeys://localhost:{port}", {}),
            (f"valkeys://127.0.0.1:{port}", trusted),  # the certificate is of another name
        ):
            tier = open_tier(uri, credentials)
            assert load(tier, prompt(1)) == 0
            assert tier.counters.failures == {"unreachable": 1}


def test_a_bucket_that_fails_and_comes_back(site: Site, open_tier: OpenTier, clock: Clock) -> None:
    tier = open_tier("s3://kv", aws(site))
    keep(tier, prompt(1))
    site.failures = 3
    assert load(tier, prompt(1)) == 0
    assert tier.counters.failures == {"unreachable": 1}
    site.failures = 0
    clock.now_s += 2
    assert load(tier, prompt(1)) == 3
    site.token = "somebody else"
    assert load(tier, prompt(1)) == 0
    assert tier.counters.failures == {"unreachable": 1, "refused": 1}


def test_a_bucket_that_is_not_there(
    site: Site, open_tier: OpenTier, caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_tier("s3://other", aws(site))
    assert load(tier, prompt(1)) == 0
    assert keep(tier, prompt(1)) == [False] * 3
    assert tier.counters.failures == {"refused": 1, "unavailable": 2}
    assert "there is no such bucket" in caplog.text


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("memcached://a", "names no store: write valkey://HOST:6379"),
        ("valkey:///3", "names no store"),
        ("valkey://a:b@c", "USERNAME and PASSWORD into a Secret"),
        ("valkey://c?db=2", "leave out"),
        ("valkey://c/names", "number of a database"),
        ("valkey://c:99999", "the port is no number"),
    ],
)
def test_bad_uris(uri: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        open_store(uri, {}, ttl_s=1, value_bytes=1)
