"""What is lent beside a running engine is what its key says, or nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_runtime.engine.blocks import BlockPool
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.lending import Lending
from tandem_runtime.engine.sequence import Request
from tandem_runtime.kv.tiers.contract import Lent
from tandem_runtime.prefix import block_keys, root_key, token_bytes
from tandem_runtime.protocol import Sampling

SIZE = 4
BLOCKS = 4
"""One of them is scrap: the others hold the longest prompt alone."""


class Memory:
    """A pool whose blocks hold the key that they were written for. A `Runner` as far as lending
    goes; while it copies, the engine's thread does what the test says."""

    def __init__(self) -> None:
        self.pool = BlockPool(BLOCKS)
        self.written: list[bytes] = [b"nothing"] * BLOCKS
        self.meanwhile: Callable[[], None] = lambda: None

    def compute(self, root: bytes, ids: list[int]) -> None:
        """A stream comes, finds what is there, computes the rest, and ends."""
        keys = block_keys(root, ids, SIZE)
        tokens = [token_bytes(ids[n * SIZE : (n + 1) * SIZE]) for n in range(len(keys))]
        found = self.pool.match(keys, tokens)
        self.pool.hold(found)
        fresh = self.pool.allocate(len(keys) - len(found))
        for block, key, ids_ in zip(fresh, keys[len(found) :], tokens[len(found) :], strict=True):
            self.written[block] = b"half of " + key
            self.written[block] = key
            self.pool.register(block, key, ids_)
        self.pool.release(found + fresh)

    def read_beside(self, block_ids: list[int], start: int, end: int) -> memoryview:
        half = [self.written[block] for block in block_ids[::2]]
        self.meanwhile()
        rest = [self.written[block] for block in block_ids[1::2]]
        content = [b""] * len(block_ids)
        content[::2], content[1::2] = half, rest
        assert (start, end) == (0, len(block_ids) * SIZE)
        return memoryview(b"".join(content))


def lent(memory: Memory, root: bytes, ids: list[int]) -> bytes | None:
    runner: Any = memory
    lent = Lending(memory.pool, runner, SIZE).read(block_keys(root, ids, SIZE), token_bytes(ids))
    return None if lent is None else bytes(lent.payload)


PROMPTS = st.lists(st.integers(0, 1), min_size=SIZE, max_size=3 * SIZE).map(
    lambda ids: ids[: len(ids) // SIZE * SIZE]
)
STREAMS = st.lists(st.tuples(st.sampled_from([b"a" * 32, b"b" * 32]), PROMPTS), max_size=8)


@settings(max_examples=60)
@given(before=STREAMS, meanwhile=STREAMS, wanted=PROMPTS, computed=st.booleans())
def test_never_another_streams_bytes(
    before: list[tuple[bytes, list[int]]],
    meanwhile: list[tuple[bytes, list[int]]],
    wanted: list[int],
    computed: bool,
) -> None:
    memory, root = Memory(), b"a" * 32
    for stream in before + [(root, wanted)] * computed:
        memory.compute(*stream)

    def run() -> None:
        for stream in meanwhile:
            memory.compute(*stream)

    memory.meanwhile = run
    keys = block_keys(root, wanted, SIZE)
    here = memory.pool.present(keys) == len(keys)
    found = lent(memory, root, wanted)
    assert found in (None, b"".join(keys))
    if here and not meanwhile:
        assert found is not None
    if not here:
        assert found is None
    memory.pool.check_integrity()


def test_a_page_that_is_overtaken_is_dropped() -> None:
    memory, ids = Memory(), [1] * 8
    memory.compute(b"a" * 32, ids)
    assert lent(memory, b"a" * 32, ids) == b"".join(block_keys(b"a" * 32, ids, SIZE))
    # Others take all blocks, and then the same prompt is computed again, into the same ones.
    memory.meanwhile = lambda: [memory.compute(b"a" * 32, p) for p in ([2] * 12, ids)] and None
    assert lent(memory, b"a" * 32, ids) is None


def test_lending_beside_a_running_engine(make_engine: Callable[..., Engine]) -> None:
    """Real memory, real threads: streams take each other's blocks while one is read over and
    over."""
    engine = make_engine(blocks=12, max_batch_tokens=64)
    ids = [7, 11, 13, 17] * 16
    prompts = [ids, [5] * 96, ids, [3] * 144]
    root = root_key(engine.layout_hash, b"", "default", "")
    keys, tokens = block_keys(root, ids, 16), token_bytes(ids)
    _run(engine, ids)
    page = engine.lending.read(keys, tokens)
    assert page is not None
    expected, ended = bytes(page.payload), threading.Event()
    found: list[Lent | None] = []

    def read() -> None:
        while not ended.is_set():
            found.append(engine.lending.read(keys, tokens))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for prompt in prompts * 6:
            _run(engine, prompt)
    finally:
        ended.set()
        reader.join()
    assert None in found
    given = [bytes(page.payload) for page in found if page is not None]
    assert given
    assert set(given) == {expected}
    engine.check_integrity()


def _run(engine: Engine, prompt: list[int]) -> None:
    sampling = Sampling(max_tokens=2, temperature=0.0, ignore_eos=True)
    engine.add(Request("s", prompt, sampling))
    while engine.has_work:
        engine.step()


def test_lending_holds_nothing() -> None:
    memory, ids = Memory(), [1] * 8
    memory.compute(b"a" * 32, ids)

    def look() -> None:
        assert memory.pool.free_blocks == memory.pool.total_blocks
        memory.pool.check_references({})

    memory.meanwhile = look
    assert lent(memory, b"a" * 32, ids) is not None
