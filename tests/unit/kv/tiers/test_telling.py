"""What a pod's own tiers tell of their pages is what can be loaded from them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_runtime.kv.tiers.cache import TierCache
from tandem_runtime.kv.tiers.contract import Page, Tier
from tandem_runtime.kv.tiers.disk import DiskTier
from tandem_runtime.kv.tiers.host import HostTier
from tandem_runtime.kv.tiers.jobs import Job
from tandem_runtime.prefix import block_keys, token_bytes

PAGE_TOKENS, PAGE_BYTES = 4, 100
LAYOUT = bytes(32)
RECORD_BYTES = 96 + 4 * PAGE_TOKENS + 8 + PAGE_BYTES


class Now:
    """`Jobs` that run when they are put."""

    def put(self, job: Job, *, urgent: bool = False) -> None:
        job()

    def later(self, delay_s: float, job: Job) -> None: ...

    def close(self) -> None: ...


def prompt(number: int, pages: int) -> list[Page]:
    ids = [100 * number + i for i in range(pages * PAGE_TOKENS)]
    keys = block_keys(LAYOUT, ids, PAGE_TOKENS)
    tokens = [token_bytes(ids[n * PAGE_TOKENS : (n + 1) * PAGE_TOKENS]) for n in range(pages)]
    parents = (bytes(16), *keys)
    return [
        Page(key, parent, ids_, bytes(PAGE_BYTES))
        for key, parent, ids_ in zip(keys, parents, tokens, strict=False)
    ]


def open_disk(folder: Path, pages: int) -> DiskTier:
    return DiskTier(
        folder,
        pages * RECORD_BYTES,
        layout_hash=LAYOUT,
        page_bytes=PAGE_BYTES,
        page_tokens=PAGE_TOKENS,
        segment_bytes=2 * RECORD_BYTES,
    )


class Told:
    def __init__(self, tiers: list[Tier]) -> None:
        self.keys: set[bytes] = set()
        self.tiers = tiers
        self.cache = TierCache(tiers, Now(), page_tokens=PAGE_TOKENS, compute_s=1.0)
        self.cache.tell(self.keys.add, self.keys.discard)

    def use(self, pages: list[Page], skip: int) -> None:
        """A prompt; every `skip`th page that is wanted never comes."""
        for tier in self.tiers:
            for number, place in enumerate(tier.use("t", [page.key for page in pages])):
                if number % skip == 0:
                    tier.forget([pages[place].key])
                else:
                    tier.store(pages[place])

    def check(self, pages: list[Page]) -> None:
        for page in pages:
            here = any(tier.load([page.key], [page.tokens]) for tier in self.tiers)
            assert (page.key in self.keys) == here


PROMPTS = [prompt(number, 3) for number in range(4)]
USES = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(2, 9)), max_size=12)


@settings(max_examples=40, deadline=None)
@given(USES)
def test_what_is_told_can_be_loaded_and_nothing_else(uses: list[tuple[int, int, int]]) -> None:
    with TemporaryDirectory() as folder:
        host = HostTier(2 * PAGE_BYTES, page_bytes=PAGE_BYTES)
        told = Told([host, open_disk(Path(folder), 7)])
        for number, pages, skip in uses:
            told.use(PROMPTS[number][:pages], skip)
            told.check([page for pages_ in PROMPTS for page in pages_])
        told.cache.close()
        # A process that finds the volume tells what the other one left.
        again = Told([open_disk(Path(folder), 7)])
        again.check([page for pages_ in PROMPTS for page in pages_])
        again.cache.close()


def test_a_damaged_page_is_told_to_be_gone(tmp_path: Path) -> None:
    told = Told([open_disk(tmp_path, 9)])
    told.use(PROMPTS[0], 99)
    told.check(PROMPTS[0])
    lost = [page for page in PROMPTS[0] if page.key in told.keys]
    assert len(lost) == 2
    for segment in tmp_path.glob("*/*.seg"):
        segment.unlink()
    told.tiers[0].load([page.key for page in lost], [page.tokens for page in lost])
    told.check(PROMPTS[0])
    assert lost[0].key not in told.keys
    told.cache.close()
