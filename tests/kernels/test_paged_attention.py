"""Paged attention: prefill chunks, decodes and mixtures, against plain softmax attention."""

from __future__ import annotations

import pytest
import torch
from tandem_runtime.kernels.attention_plan import GpuWork, Step, plan_gpu, upload
from tandem_runtime.kernels.cpu_attention import pack, paged_attention_cpu, plan_cpu, unpack
from tandem_runtime.kernels.fp8_quantize import FP8
from tandem_runtime.kernels.paged_attention import paged_attention_triton, query_tile_tokens

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# [(query tokens, context tokens)] of each sequence; those of one row first.
STEPS = {
    "one decode": [(1, 1)],
    "decodes over a split's edge": [(1, 255), (1, 256), (1, 257), (1, 600)],
    "one prompt": [(37, 37)],
    "a chunk over context": [(45, 130)],
    "a chunk of two tokens": [(2, 300)],
    "mixed": [(1, 17), (1, 290), (5, 5), (70, 200)],
}
HEADS = {"grouped by 3": (9, 3, 64), "ungrouped": (2, 2, 80), "one kv head": (8, 1, 16)}
BLOCK = 16


def make_step(
    sequences: list[tuple[int, int]], random: torch.Generator, block: int = BLOCK
) -> Step:
    counts = [-(-context // block) for _, context in sequences]
    ids = (torch.randperm(sum(counts), generator=random) + 1).tolist()
    tables = [[ids.pop() for _ in range(count)] for count in counts]
    return Step([q for q, _ in sequences], [c for _, c in sequences], tables, block)


def lay_out(step: Step, q: torch.Tensor, cache: torch.Tensor, device: torch.device) -> GpuWork:
    tile = query_tile_tokens(q.shape[1] // cache.shape[2])
    return upload(plan_gpu(step, tile), device)


def plain_attention(q: torch.Tensor, cache: torch.Tensor, step: Step, scale: float) -> torch.Tensor:
    """The formula, sequence by sequence, in float64."""
    out, row = torch.zeros(q.shape, dtype=torch.float64), 0
    for queries, context, table in zip(
        step.query_tokens, step.context_tokens, step.block_tables, strict=True
    ):
        kv = cache[:, table].transpose(2, 3).reshape(2, -1, *cache.shape[2::2])[:, :context]
        kv = kv.double().repeat_interleave(q.shape[1] // cache.shape[2], dim=2)
        scores = torch.einsum("qhd,thd->hqt", q[row : row + queries].double(), kv[0]) * scale
        position = torch.arange(context - queries, context)[:, None]
        scores = scores.masked_fill(torch.arange(context) > position, float("-inf"))
        out[row : row + queries] = torch.einsum("hqt,thd->qhd", scores.softmax(-1), kv[1])
        row += queries
    return out


def on_cpu(q: torch.Tensor, laid: torch.Tensor, step: Step, scale: float) -> torch.Tensor:
    return paged_attention_cpu(q, laid, plan_cpu(step), scale)


def inputs(
    sequences: list[tuple[int, int]],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    random: torch.Generator,
    block: int = BLOCK,
) -> tuple[torch.Tensor, torch.Tensor, Step]:
    heads, kv_heads, dim = shape
    step = make_step(sequences, random, block)
    blocks = sum(len(table) for table in step.block_tables) + 1
    cache = torch.randn(2, blocks, kv_heads, block, dim, generator=random).to(dtype)
    wide = torch.randn(sum(step.query_tokens), heads + 3, dim, generator=random).to(dtype)
    return wide[:, :heads], cache, step


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("sequences", STEPS.values(), ids=STEPS)
def test_kernels_follow_the_formula(
    sequences: list[tuple[int, int]],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    random: torch.Generator,
) -> None:
    q, cache, step = inputs(sequences, shape, dtype, random)
    scale = shape[2] ** -0.5
    exact = plain_attention(q, cache, step, scale)
    expected = on_cpu(q, pack(cache), step, scale)
    work = lay_out(step, q, cache, device)
    on_device = q._base.to(device)[:, : shape[0]]  # type: ignore[union-attr]
    kernel = paged_attention_triton(on_device, cache.to(device), work, scale)
    limits = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(expected.double(), exact, **limits)
    torch.testing.assert_close(kernel.cpu().double(), exact, **limits)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("sequences", [STEPS["mixed"], STEPS["a chunk over context"]])
def test_a_pool_of_fp8(
    sequences: list[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    random: torch.Generator,
) -> None:
    q, cache, step = inputs(sequences, (9, 3, 64), dtype, random)
    cache = (cache * 100).clamp(-448, 448).to(FP8)
    scale = 0.01 * 64**-0.5
    exact = plain_attention(q, cache, step, scale)
    expected = on_cpu(q, pack(cache), step, scale)
    work = lay_out(step, q, cache, device)
    kernel = paged_attention_triton(q.to(device).contiguous(), cache.to(device), work, scale)
    limits = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype] * 100}
    torch.testing.assert_close(expected.double(), exact, **limits)
    torch.testing.assert_close(kernel.cpu().double(), exact, **limits)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_what_lies_in_other_blocks_has_no_effect(
    dtype: torch.dtype, device: torch.device, random: torch.Generator
) -> None:
    q, cache, step = inputs([(1, 70), (20, 50)], (4, 2, 16), dtype, random)
    work = lay_out(step, q, cache, device)
    before = paged_attention_triton(q.to(device).contiguous(), cache.to(device), work, 0.25)
    expected = on_cpu(q, pack(cache), step, 0.25)
    used = {block for table in step.block_tables for block in table}
    cache[:, [b for b in range(1, cache.shape[1]) if b not in used]] = float("nan")
    assert torch.equal(on_cpu(q, pack(cache), step, 0.25), expected)
    # The kernels load nothing beyond a context; the CPU's rely on zeros there (kv/cache.py).
    cache[:, 0] = float("nan")
    for table, context in zip(step.block_tables, step.context_tokens, strict=True):
        cache[:, table[-1], :, (context - 1) % BLOCK + 1 :] = float("nan")
    after = paged_attention_triton(q.to(device).contiguous(), cache.to(device), work, 0.25)
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(9, 3, 64), (2, 2, 64), (8, 2, 128)])
@pytest.mark.parametrize("block", [BLOCK, 64])
def test_rows_do_not_depend_on_batch_or_chunk_on_the_cpu(
    block: int, shape: tuple[int, int, int], dtype: torch.dtype, random: torch.Generator
) -> None:
    q, cache, step = inputs([(400, 400)], shape, dtype, random, block)
    laid = pack(cache)
    whole = on_cpu(q, laid, step, 0.125)
    table = step.block_tables[0]
    for end, count in [
        (400, 1),
        (400, 7),
        (129, 3),
        (257, 128),
        (300, 200),
        (320, 65),
        (2, 1),
        (1, 1),
    ]:
        alone = Step([count], [end], [table], block)
        rows = q[end - count : end]
        part = on_cpu(rows, laid, alone, 0.125)
        assert torch.equal(part, whole[end - count : end]), f"{count} rows up to {end}"
    for end in range(1, 401, 3):
        alone = Step([1], [end], [table], block)
        row = on_cpu(q[end - 1 : end], laid, alone, 0.125)
        assert torch.equal(row[0], whole[end - 1]), f"the decode row at {end}"
    ends = [1, 5, 130, 256, 400]
    batch = Step([1] * 5, ends, [table] * 5, block)
    together = on_cpu(q[torch.tensor(ends) - 1], laid, batch, 0.125)
    assert torch.equal(together, whole[torch.tensor(ends) - 1])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_layout_on_the_cpu_is_the_one_that_is_written_down(
    dtype: torch.dtype, random: torch.Generator
) -> None:
    cache = torch.randn(2, 2, 5, 3, 8, 6, generator=random).to(dtype)
    laid, p = pack(cache), 4 // dtype.itemsize
    assert torch.equal(unpack(laid), cache)
    keys, values = laid.flatten(-2).unbind(1)
    for t, d in [(0, 0), (3, 5), (7, 2), (6, 1)]:
        of_key, of_value = d // p * 8 * p + t * p + d % p, t // p * 6 * p + d * p + t % p
        assert torch.equal(keys[..., of_key], cache[:, 0, ..., t, d])
        assert torch.equal(values[..., of_value], cache[:, 1, ..., t, d])


def test_kernel_decode_rows_do_not_depend_on_the_batch(
    device: torch.device, random: torch.Generator
) -> None:
    q, cache, step = inputs([(1, 600), (1, 40), (1, 257)], (6, 2, 32), torch.float32, random)
    q, cache = q.to(device).contiguous(), cache.to(device)
    together = paged_attention_triton(q, cache, lay_out(step, q, cache, device), 0.2)
    for row in range(3):
        alone = Step([1], [step.context_tokens[row]], [step.block_tables[row]], BLOCK)
        out = paged_attention_triton(q[row : row + 1], cache, lay_out(alone, q, cache, device), 0.2)
        assert torch.equal(out[0], together[row])


def test_wrong_input_is_a_sentence(device: torch.device, random: torch.Generator) -> None:
    q, cache, step = inputs([(1, 9)], (4, 2, 16), torch.float32, random)
    q, cache = q.to(device), cache.to(device)
    work = lay_out(step, q, cache, device)
    for bad_q, bad_cache, sentence in [
        (q.half(), cache, r"q is torch\.float16, the cache torch\.float32"),
        (q[:, :3], cache, "3 heads over 2 kv heads"),
        (q[..., :8], cache, "q has head dim 8, cache 16"),
        (q, cache[:, ::2], "must be contiguous"),
        (q, cache[0], r"\[2, blocks, heads, tokens, dim\] needed"),
        (q.transpose(1, 2).contiguous().transpose(1, 2), cache, "must be adjacent"),
        (q.repeat(1, 80, 1), cache, "160 query heads a kv head, at most 128 are packed"),
    ]:
        with pytest.raises(AssertionError, match=sentence):
            paged_attention_triton(bad_q, bad_cache, work, 0.25)
