"""Engines as a pod builds them, from a source URI."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.config import EngineConfig
from tandem_runtime.engine import build
from tandem_runtime.engine.batch import Batch
from tandem_runtime.engine.build import build_engine
from tandem_runtime.engine.sequence import Request, SampledToken
from tandem_runtime.engine.swap import Rates
from tandem_runtime.engine.warmup import measure_rates
from tandem_runtime.kv.cache import pinned_bytes
from tandem_runtime.kv.layout import KvLayout, Payload
from tandem_runtime.kv.tiers.host import HostTier
from tandem_runtime.protocol import Sampling

MakeConfig = Callable[..., EngineConfig]
GREEDY = Sampling(max_tokens=6, temperature=0.0, ignore_eos=True)


@pytest.fixture
def config(tiny_checkpoint: Callable[..., Path]) -> MakeConfig:
    def make(**values: Any) -> EngineConfig:
        small = {"dtype": "float32", "max_running": 4, "kv_cache_bytes": 1 << 22}
        return EngineConfig(f"file://{tiny_checkpoint()}", **(small | values))

    return make


@pytest.mark.parametrize("kv_cache", ["auto", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_two_built_engines_hand_a_stream_over(
    config: MakeConfig, dtype: str, kv_cache: str
) -> None:
    engines = (build_engine(config(dtype=dtype, kv_cache=kv_cache)) for _ in range(3))
    prefill, decode, alone = engines
    ask = Request("s", list(range(40)), GREEDY)
    decode.expect(ask)
    prefill.add(replace(ask, export=True))
    (output,) = prefill.step().streams
    assert output.token is not None
    assert decode.grant("s", 40) is not None
    decode.write_kv("s", 0, bytes(prefill.read_kv("s", 0, 40)))
    decode.start_decode("s", output.token)
    tokens = [output.token]
    while decode.has_work:
        tokens += [stream.token for stream in decode.step().streams if stream.token]
    alone.add(ask)
    expected = []
    while alone.has_work:
        expected += [stream.token for stream in alone.step().streams if stream.token]
    assert tokens == expected


def test_the_same_model_has_one_layout_hash_and_another_dtype_another(config: MakeConfig) -> None:
    one, again, other = (
        build_engine(config(**values))
        for values in ({}, {"kv_block_tokens": 32}, {"dtype": "bfloat16"})
    )
    assert one.layout_hash == again.layout_hash != other.layout_hash
    assert again.block_tokens == 32


def test_the_context_can_be_limited_but_not_stretched(config: MakeConfig) -> None:
    assert build_engine(config(max_context_tokens=100)).max_context_tokens == 100
    with pytest.raises(ModelError, match="maxContextTokens is 513, but the model was made for 512"):
        build_engine(config(max_context_tokens=513))


def test_a_small_context_is_warmed_up_within_its_bounds(config: MakeConfig) -> None:
    engine = build_engine(config(max_context_tokens=20, max_batch_tokens=64))
    assert engine.add(Request("s", [1] * 14, GREEDY)) is None
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize("pool_tokens", [1 << 14, 64])
def test_an_engine_that_may_swap_has_measured_what_tokens_cost(
    config: MakeConfig, pool_tokens: int
) -> None:
    plain = build_engine(config())
    engine = build_engine(
        config(swap_bytes=1 << 20, kv_cache_bytes=(pool_tokens + 64) * plain.layout.token_bytes)
    )
    swap = engine._scheduler.swap
    assert swap is not None
    assert min(swap._rates.compute_s, swap._rates.copy_s) > 0
    assert plain._scheduler.swap is None
    outputs = []
    for each in (plain, engine):
        each.add(Request("s", list(range(40)), GREEDY))
        tokens = []
        while each.has_work:
            tokens += [stream.token for stream in each.step().streams if stream.token]
        outputs.append(tokens)
    assert outputs[0] == outputs[1], "the measurement left something in the pool"


def test_a_steps_threads_are_the_runners_and_torch_has_one(config: MakeConfig) -> None:
    torch.set_num_threads(2)
    engine = build_engine(config(threads=2))
    assert torch.get_num_threads() == 1
    assert engine._runner._team.threads == 2  # type: ignore[attr-defined]


def test_a_pool_without_room_is_refused(config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="no room for a KV cache: kv_cache_bytes is 1000, but"):
        build_engine(config(kv_cache_bytes=1000))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu_is_refused(config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="torch finds no CUDA device; use device cpu"):
        build_engine(config(device="cuda"))


def test_eos_of_the_model_ends_a_stream(config: MakeConfig) -> None:
    engine = build_engine(config())
    assert engine.eos_token_ids == {2}
    assert engine.vocab_size == 101


@pytest.mark.parametrize(
    "beside",
    [{}, {"kv_cache": "fp8"}, {"threads": 2}, {"swap_bytes": 1 << 20}],
    ids=["alone", "fp8", "threads", "swap"],
)
def test_a_built_engine_takes_a_prompt_from_disk_after_a_restart(
    config: MakeConfig, tmp_path: Path, beside: dict[str, Any]
) -> None:
    values = beside | {
        "memory_tier_bytes": 1 << 24,
        "disk_tier_bytes": 1 << 28,
        "disk_tier_dir": str(tmp_path / "kv"),
    }
    outputs = []
    for _ in range(2):
        engine = build_engine(config(**values))
        assert engine.tiers is not None
        woken = threading.Event()
        engine.tiers.wake = woken.set
        engine.add(Request("s", [i % 90 for i in range(300)], GREEDY))
        assert woken.wait(10)
        tokens = []
        while engine.has_work:
            tokens += [stream.token for stream in engine.step().streams if stream.token]
        outputs.append(tokens)
        cached_tokens = engine.stats().cached_tokens
        engine.close()
    assert cached_tokens == 256
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("values", "pages"),
    [({"device": "cuda"}, 2), ({"device": "cuda", "tensor_parallel": 2}, 3), ({}, 3)],
)
def test_a_pinned_page_takes_a_power_of_two(values: dict[str, Any], pages: int) -> None:
    layout = KvLayout(layers=40, kv_heads=8, head_dim=128, dtype="bfloat16")
    page_bytes = 256 * layout.token_bytes
    assert pinned_bytes(page_bytes) == 1 << 26 > page_bytes > 1 << 25
    set_up = EngineConfig("file:///m", memory_tier_bytes=2 << 26, **values)
    tiers = build._tiers(set_up, layout, b"", lambda: Rates(compute_s=2, copy_s=1), b"")
    assert tiers is not None
    assert isinstance(tiers.tiers[0], HostTier)
    assert tiers.tiers[0].policy.capacity_pages == pages
    tiers.close()


def test_peers_alone_are_a_tier_without_room() -> None:
    layout = KvLayout(layers=2, kv_heads=1, head_dim=8, dtype="bfloat16")
    set_up = EngineConfig("file:///m", peer_tier=True)
    tiers = build._tiers(set_up, layout, b"", lambda: Rates(compute_s=2, copy_s=1), b"secret")
    assert tiers is not None
    assert (tiers.tiers, [source.name for source in tiers.sources]) == ((), ["peer"])
    assert not tiers.keeps_below
    tiers.close()


def test_a_disk_tier_that_cannot_be_written_is_refused(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"the disk tier cannot use .*/kv: .*; mount a folder"):
        build_engine(config(disk_tier_bytes=1 << 28, disk_tier_dir=str(tmp_path / "file/kv")))


def test_what_a_token_costs_is_measured_once(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(*args: Any) -> Rates:
        measured.append(args)
        return Rates(compute_s=2, copy_s=1)

    monkeypatch.setattr(build, "measure_rates", measure)
    build_engine(config(swap_bytes=1 << 20, memory_tier_bytes=1 << 24)).close()
    assert len(measured) == 1
    build_engine(config()).close()
    assert len(measured) == 1, "nobody asks"


def test_what_copying_costs_is_measured_with_memory_that_is_free_again() -> None:
    class Runner:
        overlaps = False
        pages: ClassVar[list[weakref.ref[memoryview]]] = []

        def launch(self, batch: Batch) -> None:
            assert batch.rows == 40

        def collect(self, launched: None) -> list[SampledToken | None]:
            return [SampledToken(0)]

        def read_kv(self, block_ids: list[int], start: int, end: int) -> memoryview:
            assert all(page() is None for page in self.pages), "pinned memory is pinned anew"
            page = memoryview(bytearray(end - start))
            self.pages.append(weakref.ref(page))
            return page

        def write_kv(self, block_ids: list[int], start: int, payload: Payload) -> None:
            assert memoryview(payload).nbytes == 40

        def close(self) -> None: ...

    rates = measure_rates(Runner(), 40, 16)
    assert len(Runner.pages) == 2
    assert rates.copy_s > 0
