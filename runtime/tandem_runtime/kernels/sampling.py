"""Choosing the next token: greedy, or temperature and top-p with counter-based Gumbel noise.

    greedy (temperature 0):  argmax_i x_i
    else:                    argmax_{i in nucleus} x_i / temperature + g(seed, position, i)

which samples from softmax(x / temperature) restricted to the nucleus (the Gumbel-max trick). The
noise is a function of (seed, position, token id) alone: no generator state, so a stream continues
with the same tokens on any pod. Ties go to the lowest id.

Nucleus of top-p: tokens at least as likely as the least likely one that is needed to reach top_p,
taken from the most likely down; all tokens of equal probability are in or out together, so it does
not depend on the order in which they are summed.

Noise: (seed, position) is hashed to two 32-bit keys on the host (`noise_keys`, splitmix64); for
each token id two rounds of the `lowbias32` mixer (Wellons, "Prospecting for hash functions") give
h, and g = -log(-log(u)) with u = ((h >> 9) + 1/2) / 2^23: 24 bits, as float32 has, so that u < 1.

logits: [n, vocabulary] float32; temperature, top_p: [n] float32; keys: [n, 2] int64;
tokens out: [n] int64.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

_MASK64: Final = (1 << 64) - 1
_SPREAD: Final = 20.0
"""The noise lies in (-2.9, 16.7): whatever is this far below the best cannot be chosen."""
_NUCLEUS_GUESS: Final = 256


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
def _lowbias32(x: Tensor) -> Tensor:
    """One round on unsigned 32-bit values held in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def gumbel_noise(token_ids: Tensor, key0: Tensor, key1: Tensor) -> Tensor:
    """g of int64 token ids under keys of the same (or a broadcastable) shape; float32."""
    hashed = _lowbias32(_lowbias32(token_ids ^ key0) ^ key1)
    u = ((hashed >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))


def sample_reference(logits: Tensor, temperature: Tensor, top_p: Tensor, keys: Tensor) -> Tensor:
    """The chosen token of each row."""
    chosen = logits.argmax(-1)
    noisy = (temperature > 0).nonzero().flatten()
    if len(noisy) == 0:
        return chosen
    scaled = logits[noisy] / temperature[noisy, None]
    floor = scaled.amax(-1, keepdim=True) - _SPREAD
    narrow = (top_p[noisy] < 1).nonzero().flatten()
    if len(narrow):
        floor[narrow] = torch.maximum(
            floor[narrow], _nucleus_floor(scaled[narrow], top_p[noisy][narrow, None])
        )
    row, token = (scaled >= floor).nonzero(as_tuple=True)
    scores = torch.full_like(scaled, float("-inf"))
    key0, key1 = keys[noisy].unbind(1)
    scores[row, token] = scaled[row, token] + gumbel_noise(token, key0[row], key1[row])
    chosen[noisy] = scores.argmax(-1)
    return chosen


def _nucleus_floor(scaled: Tensor, top_p: Tensor) -> Tensor:
    """[n, 1] the smallest scaled logit that belongs to each row's nucleus."""
    total = scaled.logsumexp(-1, keepdim=True)
    best = scaled.topk(min(_NUCLEUS_GUESS, scaled.shape[-1])).values
    mass = (best - total).exp().cumsum(-1)
    if bool((mass[:, -1:] < top_p).any()):
        best = scaled.sort(dim=-1, descending=True).values
        mass = (best - total).exp().cumsum(-1)
    last = (mass < top_p).sum(-1, keepdim=True).clamp_(max=best.shape[-1] - 1)
    return best.gather(-1, last)


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
def _mass(logits, vocabulary, temperature, best, floor, BLOCK: tl.constexpr):
    """Sum of exp(x / temperature - best) over x / temperature >= floor."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(logits + token, mask=token < vocabulary, other=float("-inf")) / temperature
        total += tl.where(x >= floor, tl.exp(x - best), 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _nucleus(logits, vocabulary, temperature, best, top_p, BLOCK: tl.constexpr):
    """The nucleus' smallest scaled logit, by bisection over the floats below `best`."""
    # Below best - 104 every probability is zero in float32.
    low = _ordered(best - 104.0)
    high = _ordered(best) + 1
    needed = top_p * _mass(logits, vocabulary, temperature, best, best - 104.0, BLOCK)
    while high - low > 1:
        middle = (low + high) // 2
        if _mass(logits, vocabulary, temperature, best, _unordered(middle), BLOCK) >= needed:
            low = middle
        else:
            high = middle
    return _unordered(low)


@triton.jit
def _sample_kernel(logits, temperatures, top_ps, keys, out, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    temperature = tl.load(temperatures + row)
    top_p = tl.load(top_ps + row)
    key0 = tl.load(keys + 2 * row).to(tl.uint32)
    key1 = tl.load(keys + 2 * row + 1).to(tl.uint32)
    noisy = temperature > 0
    divisor = tl.where(noisy, temperature, 1.0)
    floor = float("-inf")
    if noisy & (top_p < 1.0):
        best = float("-inf")
        for start in range(0, vocabulary, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x = tl.load(logits + token, mask=token < vocabulary, other=float("-inf")) / divisor
            best = tl.maximum(best, tl.max(x, axis=0))
        floor = _nucleus(logits, vocabulary, divisor, best, top_p, BLOCK)
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


def sample_triton(logits: Tensor, temperature: Tensor, top_p: Tensor, keys: Tensor) -> Tensor:
    """The same by one program a row."""
    rows, vocabulary = logits.shape
    assert logits.dtype == torch.float32, f"logits are {logits.dtype}, float32 needed"
    assert logits.is_contiguous(), f"logits must be contiguous, got strides {logits.stride()}"
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        assert value.shape == (rows,), f"{name} is {tuple(value.shape)}, logits have {rows} rows"
        assert value.dtype == torch.float32, f"{name} is {value.dtype}, float32 needed"
    assert keys.shape == (rows, 2), f"keys are {tuple(keys.shape)}, ({rows}, 2) needed"
    assert keys.dtype == torch.int64, f"keys are {keys.dtype}, int64 needed"
    assert keys.is_contiguous(), f"keys must be contiguous, got strides {keys.stride()}"
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _sample_kernel[(rows,)](logits, temperature, top_p, keys, out, vocabulary, BLOCK=4096)
    return out
