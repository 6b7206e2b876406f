"""Choosing tokens: kernel against reference, and the reference against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from tandem_runtime.kernels.sampling import (
    gumbel_noise,
    noise_keys,
    sample_reference,
    sample_triton,
)

VOCABULARIES = [1, 7, 1000, 4096, 5001]


def rows(
    count: int, vocabulary: int, random: torch.Generator, spread: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, temperatures (every fourth 0), top_p (every third 1), keys."""
    logits = torch.randn(count, vocabulary, generator=random) * spread
    temperature = torch.tensor([[0.0, 0.7, 1.0, 2.5][i % 4] for i in range(count)])
    top_p = torch.tensor([[1.0, 0.9, 0.3][i % 3] for i in range(count)])
    keys = torch.tensor([noise_keys(seed * 977, 5 * seed) for seed in range(count)])
    return logits, temperature, top_p, keys


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_kernel_chooses_what_the_reference_chooses(
    vocabulary: int, device: torch.device, random: torch.Generator
) -> None:
    arguments = rows(24, vocabulary, random)
    chosen = sample_triton(*(argument.to(device) for argument in arguments)).cpu()
    assert torch.equal(chosen, sample_reference(*arguments))


def test_greedy_takes_the_lowest_id_of_equal_ones(device: torch.device) -> None:
    logits = torch.zeros(2, 5000)
    logits[0, [4500, 77]] = 1.0
    zeros, ones = torch.zeros(2), torch.ones(2)
    keys = torch.tensor([noise_keys(1, 1), noise_keys(2, 2)])
    assert sample_reference(logits, zeros, ones, keys).tolist() == [77, 0]
    on_device = [value.to(device) for value in (logits, zeros, ones, keys)]
    assert sample_triton(*on_device).tolist() == [77, 0]


def test_noise_is_a_known_function_of_seed_position_and_token() -> None:
    key0, key1 = noise_keys(2**63 + 5, 1000)
    assert (key0, key1) == (3192920606, 2530834341)
    token_ids = torch.tensor([0, 1, 49151])
    noise = gumbel_noise(token_ids, torch.tensor(key0), torch.tensor(key1))
    assert noise.tolist() == pytest.approx([expected_noise(t, key0, key1) for t in (0, 1, 49151)])


def expected_noise(token_id: int, key0: int, key1: int) -> float:
    """The same in Python integers."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    h = mix(mix(token_id ^ key0) ^ key1)
    return -math.log(-math.log(((h >> 9) + 0.5) * 2.0**-23))


def test_noise_has_the_gumbel_distribution_and_stays_finite() -> None:
    key0, key1 = noise_keys(7, 7)
    noise = gumbel_noise(torch.arange(1 << 20), torch.tensor(key0), torch.tensor(key1))
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.02)
    assert noise.min() > -2.9
    assert noise.max() < 16.7


def test_the_largest_hash_gives_finite_noise() -> None:
    # All 23 bits set: u must not round up to 1.
    u = torch.tensor([(1 << 23) - 1]).float().add(0.5).mul(2.0**-23)
    assert u.item() < 1.0


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_frequencies_follow_the_probabilities(top_p: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -9.0])
    temperature, draws = 0.8, 20000
    keys = torch.tensor([noise_keys(position, position) for position in range(draws)])
    chosen = sample_reference(
        logits.expand(draws, -1),
        torch.full((draws,), temperature),
        torch.full((draws,), top_p),
        keys,
    )
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        probabilities[1:] = 0.0 if probabilities[0] >= top_p else probabilities[1:]
        probabilities[2:] = 0.0
        probabilities /= probabilities.sum()
    frequencies = chosen.bincount(minlength=5) / draws
    assert (frequencies - probabilities).abs().max() < 4 * math.sqrt(0.25 / draws)


def test_a_row_does_not_depend_on_its_neighbours(random: torch.Generator) -> None:
    arguments = rows(12, 2000, random)
    together = sample_reference(*arguments)
    for row in range(12):
        alone = sample_reference(*(argument[row : row + 1] for argument in arguments))
        assert alone == together[row]


def test_a_flat_nucleus_wider_than_the_first_guess_is_found(device: torch.device) -> None:
    logits = torch.zeros(64, 3000)
    logits[:, 1000:] = -8.0
    keys = torch.tensor([noise_keys(seed, 0) for seed in range(64)])
    arguments = logits, torch.ones(64), torch.full((64,), 0.99), keys
    chosen = sample_reference(*arguments)
    # Tokens of equal probability are in or out together, so all 1000 are in, and no other.
    assert chosen.max() < 1000
    assert len(chosen.unique()) > 40
    assert torch.equal(sample_triton(*(a.to(device) for a in arguments)).cpu(), chosen)


def test_a_tiny_top_p_is_greedy(device: torch.device, random: torch.Generator) -> None:
    logits, _, _, keys = rows(8, 1000, random)
    arguments = logits, torch.full((8,), 2.0), torch.full((8,), 1e-9), keys
    assert torch.equal(sample_reference(*arguments), logits.argmax(-1))
    on_device = (argument.to(device) for argument in arguments)
    assert torch.equal(sample_triton(*on_device).cpu(), logits.argmax(-1))


def test_wrong_input_is_a_sentence(device: torch.device, random: torch.Generator) -> None:
    logits, temperature, top_p, keys = (value.to(device) for value in rows(4, 10, random))
    for bad, sentence in [
        ((logits.half(), temperature, top_p, keys), r"logits are torch\.float16, float32 needed"),
        ((logits[:, ::2], temperature, top_p, keys), "logits must be contiguous"),
        ((logits, temperature[:3], top_p, keys), r"temperature is \(3,\), logits have 4 rows"),
        ((logits, temperature, top_p.double(), keys), r"top_p is torch\.float64, float32 needed"),
        ((logits, temperature, top_p, keys[:, :1]), r"keys are \(4, 1\), \(4, 2\) needed"),
        ((logits, temperature, top_p, keys.int()), r"keys are torch\.int32, int64 needed"),
    ]:
        with pytest.raises(AssertionError, match=sentence):
            sample_triton(*bad)
