"""How many blocks a pod takes, and what it says when there is no room."""

from __future__ import annotations

import re

import pytest
from tandem_runtime.config import DEFAULT_CPU_KV_BYTES, EngineConfig
from tandem_runtime.kv import sizing
from tandem_runtime.kv.layout import KvLayout

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=8, dtype="float32")  # 128 bytes a token
BLOCK_BYTES = 16 * 128
HUGE = 10**9


def test_bytes_that_were_asked_for_are_taken() -> None:
    config = EngineConfig("file:///m", kv_block_tokens=16, kv_cache_bytes=10 * BLOCK_BYTES + 5)
    assert sizing.block_count(config, LAYOUT, HUGE) == 10


def test_no_more_than_the_streams_could_use() -> None:
    config = EngineConfig("file:///m", kv_block_tokens=16, kv_cache_bytes=HUGE, max_running=3)
    assert sizing.block_count(config, LAYOUT, 100) == 3 * 7 + 1


def test_a_gibibyte_without_a_limit() -> None:
    config = EngineConfig("file:///m", kv_block_tokens=16, kv_cache_percent=100)
    assert sizing.block_count(config, LAYOUT, HUGE) == DEFAULT_CPU_KV_BYTES // BLOCK_BYTES


def test_a_share_of_what_the_limit_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "resident_bytes", lambda: 1000 * BLOCK_BYTES)
    config = EngineConfig(
        "file:///m", kv_block_tokens=16, kv_cache_percent=50, memory_limit_bytes=1200 * BLOCK_BYTES
    )
    assert sizing.block_count(config, LAYOUT, HUGE) == 100


def test_resident_bytes_are_this_process_s() -> None:
    assert 10_000_000 < sizing.resident_bytes() < 20_000_000_000


def test_no_room_is_said_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "resident_bytes", lambda: 5000)
    config = EngineConfig("file:///m", kv_block_tokens=16, memory_limit_bytes=6000)
    with pytest.raises(ValueError, match="no room for a KV cache") as caught:
        sizing.block_count(config, LAYOUT, HUGE)
    assert str(caught.value) == (
        "no room for a KV cache: 90 % of the 1000 bytes left of the memory limit of 6000, but a "
        "block of 16 tokens takes 2048 bytes and at least two are needed; give the pod more memory"
    )


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is none of float32, bfloat16, float16"),
        ({"device": "tpu"}, "device 'tpu' is none of cpu, cuda"),
        ({"threads": 0}, "threads is 0: give at least 1"),
        ({"max_batch_tokens": -1}, "max_batch_tokens is -1: give at least 1, or leave it out"),
        ({"max_context_tokens": 0}, "max_context_tokens is 0: give at least 1, or leave it out"),
        ({"kv_cache_percent": 101}, "kv_cache_percent is 101: give 1 to 100"),
        ({"kv_block_tokens": 24}, "kv_block_tokens is 24: give a divisor of a page's 256"),
        (
            {"max_running": 300, "max_batch_tokens": 256},
            "max_running is 300, but a step has only 256 tokens (max_batch_tokens): a running "
            "stream needs one in each step",
        ),
    ],
)
def test_a_bad_configuration_is_refused_with_a_sentence(
    values: dict[str, int | str], sentence: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        EngineConfig("file:///m", **values)  # type: ignore[arg-type]


def test_the_budget_of_a_step_follows_the_device() -> None:
    assert EngineConfig("file:///m").batch_tokens == 128
    assert EngineConfig("file:///m", device="cuda").batch_tokens == 2048
    assert EngineConfig("file:///m", max_batch_tokens=300).batch_tokens == 300
