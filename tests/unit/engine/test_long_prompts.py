"""What a long prompt costs the engine's thread: nothing is hashed, and its ids are copied once."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import pytest
from tandem_runtime.context_keys import ContextKeys
from tandem_runtime.engine import prefixes
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request, RequestRefused
from tandem_runtime.kv.layout import KvLayout
from tandem_runtime.kv.tiers.cache import TierCache
from tandem_runtime.kv.tiers.host import HostTier
from tandem_runtime.kv.tiers.jobs import Job
from tandem_runtime.prefix import compact
from tandem_runtime.protocol import Sampling

MakeEngine = Callable[..., Engine]
PAGE = 32
PROMPT = [n * n % 97 + 3 for n in range(150)]
ONE = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)


class Later:
    """Jobs that run when the test says so."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []

    def put(self, job: Job, *, urgent: bool = False) -> None:
        self._jobs.append(job)

    def later(self, delay_s: float, job: Job) -> None: ...

    def run(self) -> None:
        while self._jobs:
            self._jobs.pop(0)()

    def close(self) -> None:
        self.run()


def tiers(jobs: Later) -> Callable[[KvLayout, bytes], TierCache]:
    def make(layout: KvLayout, layout_hash: bytes) -> TierCache:
        size = layout.token_bytes * PAGE
        tier = HostTier(20 * size, page_bytes=size)
        return TierCache((tier,), jobs, page_tokens=PAGE, compute_s=1)

    return make


def test_a_prompt_is_hashed_on_the_tiers_thread(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, hashed = Later(), []
    engine = make_engine(tiers=tiers(jobs), page_tokens=PAGE)
    keys_of, extend_keys = ContextKeys.keys, prefixes.extend_keys

    def counted(keys: list[bytes], *rest: object) -> None:
        before = len(keys)
        extend_keys(keys, *rest)  # type: ignore[arg-type]
        hashed.append(len(keys) - before)

    monkeypatch.setattr(prefixes, "extend_keys", counted)
    found = []

    def noted(self: ContextKeys, *asked: Any) -> list[list[bytes]]:
        keys = keys_of(self, *asked)
        found.append(keys[0])
        return keys

    monkeypatch.setattr(ContextKeys, "keys", noted)
    for name, held in (("first", 0), ("again", 128)):
        engine.add(Request(name, compact(PROMPT), ONE))
        assert not found
        jobs.run()
        assert len(found.pop()) == len(PROMPT) // 16
        while engine.has_work:
            for stream in engine.step().streams:
                assert stream.cached_tokens // PAGE * PAGE == held
        jobs.run()
    assert hashed
    assert not any(hashed)


@pytest.mark.parametrize("form", [list, compact])
def test_unknown_tokens_are_refused(
    make_engine: MakeEngine, form: Callable[[list[int]], list[int]]
) -> None:
    engine = make_engine()
    for token_id in (101, 2**32 - 1, 2**32, -1):
        with pytest.raises(RequestRefused, match=f"token id {token_id} is not in the vocabulary"):
            engine.add(Request("s", form([*PROMPT, token_id]), ONE))
    assert engine.add(Request("s", form([*PROMPT, 100]), ONE)) is None


def test_ids_are_copied() -> None:
    ids = array("I", PROMPT)
    copied = compact(ids)
    ids[0] += 1
    assert list(copied) == PROMPT
