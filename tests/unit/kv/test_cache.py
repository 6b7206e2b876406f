"""The pool's memory and canonical pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tandem_runtime import kernels
from tandem_runtime.kernels.cpu_attention import unpack
from tandem_runtime.kv.cache import DTYPES, KvCache
from tandem_runtime.kv.layout import KvLayout

BLOCK = 4


def filled(dtype: str, blocks: int = 6) -> KvCache:
    layout = KvLayout(layers=3, kv_heads=2, head_dim=6, dtype=dtype)
    cache = KvCache(layout, blocks, BLOCK, torch.device("cpu"))
    values = torch.arange(cache.data.numel()) % 251
    cache.data.copy_(values.view(cache.data.shape))
    return cache


def tokens_of(cache: KvCache, blocks: list[int]) -> torch.Tensor:
    """[layers, 2, heads, tokens, dim] by the definition of the layout."""
    slots = [(block, offset) for block in blocks for offset in range(BLOCK)]
    kv = unpack(cache.data)
    return torch.stack([kv[:, :, block, :, offset] for block, offset in slots], dim=3)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 12), (3, 5), (4, 8), (7, 11)])
def test_pages_are_canonical_and_come_back_bit_for_bit(dtype: str, start: int, end: int) -> None:
    source, target = filled(dtype), filled(dtype)
    target.data.zero_()
    page = source.read([4, 1, 2], start, end)
    assert page.nbytes == (end - start) * source.layout.token_bytes
    as_tensor = torch.frombuffer(bytearray(page), dtype=DTYPES[dtype]).view(3, 2, 2, -1, 6)
    assert torch.equal(as_tensor, tokens_of(source, [4, 1, 2])[:, :, :, start:end])
    target.write([5, 3, 0], start, page)
    assert bytes(target.read([5, 3, 0], start, end)) == bytes(page)
    outside = tokens_of(target, [5, 3, 0])
    outside[:, :, :, start:end] = 0
    assert not outside.any(), "a page wrote outside of its tokens"
    assert not target.data[:, :, [1, 2, 4]].any(), "a page wrote outside of its blocks"


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("start", "end"), [(0, 12), (3, 5), (7, 11)])
def test_layers_written_one_after_the_other_are_the_page(dtype: str, start: int, end: int) -> None:
    source, whole, pieces = (filled(dtype) for _ in range(3))
    page = source.read([4, 1, 2], start, end)
    whole.write([5, 3, 0], start, page)
    size = page.nbytes // 3
    for layers in (range(2), range(2, 3)):
        part = page[layers.start * size : layers.stop * size]
        pieces.write([5, 3, 0], start, part, layers)
    assert torch.equal(pieces.data.view(torch.uint8), whole.data.view(torch.uint8))


@pytest.mark.parametrize(("piece_bytes", "pieces"), [(1, [1, 1, 1]), (2 * 9 * 48, [2, 1])])
def test_a_long_page_goes_a_few_layers_at_a_time(
    monkeypatch: pytest.MonkeyPatch, piece_bytes: int, pieces: list[int]
) -> None:
    source, target = filled("bfloat16"), filled("bfloat16")
    whole = bytes(source.read([4, 1, 2], 1, 10))
    assert source.layout.token_bytes == 3 * 48
    gather, moved = kernels.gather_blocks, list[int]()

    def watched(pool: torch.Tensor, *rest: Any) -> torch.Tensor:
        moved.append(len(pool))
        return gather(pool, *rest)

    monkeypatch.setattr(kernels, "gather_blocks", watched)
    monkeypatch.setattr("tandem_runtime.kv.cache._PIECE_BYTES", piece_bytes)
    assert bytes(source.read([4, 1, 2], 1, 10)) == whole
    assert moved == pieces
    target.data.zero_()
    target.write([5, 3, 0], 1, whole)
    assert bytes(target.read([5, 3, 0], 1, 10)) == whole


def test_a_page_is_a_copy() -> None:
    cache = filled("float32")
    page = cache.read([1], 0, 4)
    before = bytes(page)
    cache.data.zero_()
    assert bytes(page) == before


def test_token_bytes_of_the_demo_model() -> None:
    assert KvLayout(layers=30, kv_heads=3, head_dim=64, dtype="bfloat16").token_bytes == 23040


def test_layout_hashes_differ_in_whatever_matters() -> None:
    base = KvLayout(layers=3, kv_heads=2, head_dim=5, dtype="float32")
    others = [
        KvLayout(4, 2, 5, "float32"),
        KvLayout(3, 1, 5, "float32"),
        KvLayout(3, 2, 6, "float32"),
        KvLayout(3, 2, 5, "bfloat16"),
    ]
    hashes = {layout.hash("digest") for layout in [base, *others]} | {base.hash("other")}
    assert len(hashes) == 6
    assert KvLayout(3, 2, 5, "float32").hash("digest") == base.hash("digest")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="'int8' is none of float32, bfloat16, float16"):
        KvLayout(1, 1, 1, "int8")


def test_reading_a_page_touches_no_more_than_the_page() -> None:
    cache = filled("bfloat16", blocks=4000)
    with torch.profiler.profile(profile_memory=True) as profile:
        page = cache.read([7, 3], 0, 2 * BLOCK)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert 0 < allocated < 10 * len(page), "the pool was copied"
