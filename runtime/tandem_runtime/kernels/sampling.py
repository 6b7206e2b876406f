"""Choosing the next token: greedy, or temperature, top-k, top-p and min-p with counter-based noise.

    greedy (temperature 0):  argmax_i x_i
    else:                    argmax_{i in kept} x_i / temperature + g(seed, position, i)

which samples from softmax(x / temperature) restricted to the tokens kept (the Gumbel-max trick).
The noise is a function of (seed, position, token id) alone: no generator state, so a stream goes on
with the same tokens on any pod. Ties go to the lowest id.

Kept are all tokens whose scaled logit reaches a floor, the highest of three (so tokens of equal
probability are in or out together, and no order of summation matters):

    min-p: best - reach, where reach = -log(min_p); infinite for none
    top-k: the k-th largest scaled logit; k 0 for none
    top-p: of what these two keep, the least likely token needed to reach top_p of its probability,
           taken from the most likely down (the nucleus); 1 for none

Noise: (seed, position) is hashed to two 32-bit keys on the host (`noise_keys`, splitmix64); for
each token id two rounds of the `lowbias32` mixer (Wellons, "Prospecting for hash functions") give
h, and g = -log(-log(u)) with u = ((h >> 9) + 1/2) / 2^23: 24 bits, as float32 has, so that u < 1.

logits: [n, vocabulary] float32; controls: [n, 4] float32, rows (temperature, top-k, top-p, reach);
keys: [n, 2] int64; tokens out: [n] int64.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

_MASK64: Final = (1 << 64) - 1


def noise_keys(seed: int, position: int) -> tuple[int, int]:
    """Two unsigned 32-bit words for one stream's seed and one position."""
    mixed = _splitmix64((_splitmix64(seed & _MASK64) ^ position) & _MASK64)
    return mixed & 0xFFFFFFFF, mixed >> 32


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


# -- reference -------------------------------------------------------------------------------------
def _lowbias32_(x: Tensor) -> Tensor:
    """One round in place on int32, whose products wrap as unsigned ones; masks undo the sign."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - (1 << 32)
    x ^= (x >> 16) & 0xFFFF
    return x


def gumbel_noise(token_ids: Tensor, key0: Tensor, key1: Tensor) -> Tensor:
    """g of int64 token ids under keys of a shape that broadcasts with theirs; float32."""
    hashed = _lowbias32_(token_ids.int() ^ key0.int())
    hashed = _lowbias32_(hashed.bitwise_xor_(key1.int()))
    u = ((hashed >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)
    return u.log_().neg_().log_().neg_()


def sample_reference(logits: Tensor, controls: Tensor, keys: Tensor) -> Tensor:
    """The chosen token of each row."""
    # NumPy's takes a tenth of the time of torch's, which looks at one logit after the other.
    chosen = torch.from_numpy(logits.numpy().argmax(-1))
    noisy = (controls[:, 0] > 0).nonzero().flatten()
    if len(noisy) == 0:
        return chosen
    temperature, top_k, top_p, reach = controls[noisy].unsqueeze(-1).unbind(1)
    scaled = logits[noisy] / temperature
    best = scaled.amax(-1, keepdim=True)
    floor = best - reach
    few = (top_k[:, 0] > 0).nonzero().flatten()
    if len(few):
        floor[few] = torch.maximum(floor[few], _kth_largest(scaled[few], top_k[few].long()))
    narrow = (top_p[:, 0] < 1).nonzero().flatten()
    if len(narrow):
        kept = scaled[narrow]
        if bool(floor[narrow].isfinite().any()):
            kept = kept.masked_fill(kept < floor[narrow], float("-inf"))
        floor[narrow] = torch.maximum(floor[narrow], _nucleus_floor(kept, top_p[narrow]))
    noise = gumbel_noise(
        torch.arange(logits.shape[-1], device=logits.device), *keys[noisy].mT.unsqueeze(-1)
    )
    scores = noise.add_(scaled).masked_fill_(scaled < floor, float("-inf"))
    chosen[noisy] = torch.from_numpy(scores.numpy().argmax(-1))
    return chosen


def _kth_largest(scaled: Tensor, k: Tensor) -> Tensor:
    """[n, 1] of each row; `k`: [n, 1] int64, the smallest value where it exceeds the row."""
    k = k.clamp(max=scaled.shape[-1])
    return scaled.topk(int(k.max())).values.gather(-1, k - 1)


def _nucleus_floor(scaled: Tensor, top_p: Tensor, guess: int = 256) -> Tensor:
    """[n, 1] the smallest scaled logit that belongs to each row's nucleus, which is looked for
    among the `guess` largest first."""
    total = scaled.logsumexp(-1, keepdim=True)
    best = scaled.topk(min(guess, scaled.shape[-1])).values
    mass = (best - total).exp().cumsum(-1)
    last = (mass < top_p).sum(-1, keepdim=True).clamp_(max=best.shape[-1] - 1)
    floor = best.gather(-1, last)
    wider = (mass[:, -1] < top_p[:, 0]).nonzero().flatten()
    if len(wider) and guess < scaled.shape[-1]:
        floor[wider] = _nucleus_floor(scaled[wider], top_p[wider], guess * 8)
    return floor


# -- kernel ----------------------------------------------------------------------------------------
@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _ordered(x):
    """float32 to int64 so that order is kept."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _unordered(key):
    bits = tl.cast(key, tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _mass(logits, vocabulary, temperature, best, floor, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Over x / temperature >= floor: how many, or the sum of exp(x / temperature - best)."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(logits + token, mask=token < vocabulary, other=float("-inf")) / temperature
        weight = 1.0 if COUNT else tl.exp(x - best)
        total += tl.where(x >= floor, weight, 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _highest_floor(
    logits, vocabulary, temperature, best, lowest, needed, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    """The highest floor over which `needed` is left, or `lowest`; by bisection over the floats."""
    low = _ordered(lowest)
    high = _ordered(best) + 1
    while high - low > 1:
        middle = (low + high) // 2
        floor = _unordered(middle)
        if _mass(logits, vocabulary, temperature, best, floor, COUNT, BLOCK) >= needed:
            low = middle
        else:
            high = middle
    return _unordered(low)


@triton.jit
def _sample_kernel(logits, controls, keys, out, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    temperature = tl.load(controls + 4 * row)
    top_k = tl.load(controls + 4 * row + 1)
    top_p = tl.load(controls + 4 * row + 2)
    reach = tl.load(controls + 4 * row + 3)
    key0 = tl.load(keys + 2 * row).to(tl.uint32)
    key1 = tl.load(keys + 2 * row + 1).to(tl.uint32)
    noisy = temperature > 0
    divisor = tl.where(noisy, temperature, 1.0)
    floor = float("-inf")
    if noisy & ((top_k > 0.0) | (top_p < 1.0) | (reach < float("inf"))):
        best = float("-inf")
        for start in range(0, vocabulary, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x = tl.load(logits + token, mask=token < vocabulary, other=float("-inf")) / divisor
            best = tl.maximum(best, tl.max(x, axis=0))
        floor = best - reach
        # Below best - 104 every probability is zero in float32.
        lowest = tl.maximum(floor, best - 104.0)
        if top_k > 0.0:
            lowest = _highest_floor(logits, vocabulary, divisor, best, lowest, top_k, True, BLOCK)
            floor = lowest
        if top_p < 1.0:
            needed = top_p * _mass(logits, vocabulary, divisor, best, lowest, False, BLOCK)
            floor = _highest_floor(logits, vocabulary, divisor, best, lowest, needed, False, BLOCK)
    best_score = float("-inf")
    best_token = 0
    for start in range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(logits + token, mask=token < vocabulary, other=float("-inf")) / divisor
        hashed = _mix(_mix(token.to(tl.uint32) ^ key0) ^ key1)
        u = ((hashed >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
        noise = tl.where(noisy, -tl.log(-tl.log(u)), 0.0)
        score = tl.where(x >= floor, x + noise, float("-inf"))
        value, index = tl.max(score, axis=0, return_indices=True)
        if value > best_score:
            best_score = value
            best_token = start + index
    tl.store(out + row, tl.cast(best_token, tl.int64))


def sample_triton(logits: Tensor, controls: Tensor, keys: Tensor) -> Tensor:
    """The same by one program a row."""
    rows, vocabulary = logits.shape
    assert logits.dtype == torch.float32, f"logits are {logits.dtype}, float32 needed"
    assert logits.is_contiguous(), f"logits must be contiguous, got strides {logits.stride()}"
    for name, value, width, dtype in (
        ("controls", controls, 4, torch.float32),
        ("keys", keys, 2, torch.int64),
    ):
        shape = tuple(value.shape)
        assert shape == (rows, width), f"{name} are {shape}, ({rows}, {width}) needed"
        assert value.dtype == dtype, f"{name} are {value.dtype}, {dtype} needed"
        assert value.is_contiguous(), f"{name} must be contiguous, got strides {value.stride()}"
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _sample_kernel[(rows,)](logits, controls, keys, out, vocabulary, BLOCK=4096)
    return out
