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

VOCABULARIES = [1, 7, 1000, 5001]


def rows(
    count: int, vocabulary: int, random: torch.Generator, spread: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, controls in many combinations, keys."""
    logits = torch.randn(count, vocabulary, generator=random) * spread
    controls = [
        control(
            temperature=[0.7, 0.0, 1.0, 2.5][i % 4],
            top_k=[0, 40, 1, 0, 3][i % 5],
            top_p=[1.0, 0.9, 0.3][i % 3],
            min_p=[0.0, 0.1, 0.0, 0.0, 0.7, 0.0, 0.0, 0.02][i % 8],
        )
        for i in range(count)
    ]
    keys = torch.tensor([noise_keys(seed * 977, 5 * seed) for seed in range(count)])
    return logits, torch.tensor(controls), keys


def control(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[float]:
    """One row of controls."""
    return [temperature, top_k, top_p, -math.log(min_p) if min_p else math.inf]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_kernel_chooses_what_the_reference_chooses(
    vocabulary: int, device: torch.device, random: torch.Generator
) -> None:
    arguments = rows(20, vocabulary, random)
    chosen = sample_triton(*(argument.to(device) for argument in arguments)).cpu()
    assert torch.equal(chosen, sample_reference(*arguments))


def test_greedy_takes_the_lowest_id_of_equal_ones(device: torch.device) -> None:
    logits = torch.zeros(2, 5000)
    logits[0, [4500, 77]] = 1.0
    controls = torch.tensor([control(temperature=0.0)] * 2)
    keys = torch.tensor([noise_keys(1, 1), noise_keys(2, 2)])
    assert sample_reference(logits, controls, keys).tolist() == [77, 0]
    on_device = [value.to(device) for value in (logits, controls, keys)]
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


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        # At temperature 0.8 the probabilities are 0.57, 0.16, 0.16, 0.09, 0.01, 0.
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.6}, [0, 1, 2]),  # the second and the third are equal: both or none
        ({"top_k": 1}, [0]),
        ({"top_k": 2}, [0, 1, 2]),
        ({"top_k": 4}, [0, 1, 2, 3]),
        ({"top_k": 100}, [0, 1, 2, 3, 4, 5]),
        ({"min_p": 0.28}, [0, 1, 2]),
        ({"min_p": 0.3}, [0]),
        ({"top_k": 3, "min_p": 0.3}, [0]),
        # Of what top-k leaves, the likeliest has 0.64 and not 0.57.
        ({"top_k": 3, "top_p": 0.63}, [0]),
        ({"top_k": 4, "top_p": 0.999, "min_p": 0.2}, [0, 1, 2]),
    ],
)
def test_frequencies_follow_the_probabilities_of_what_is_kept(
    filters: dict[str, float], kept: list[int], device: torch.device
) -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 0.5, -1.0, -9.0])
    temperature, draws = 0.8, 4000
    keys = torch.tensor([noise_keys(position, position) for position in range(draws)])
    controls = torch.tensor([control(temperature, **filters)] * draws)  # type: ignore[arg-type]
    arguments = logits.expand(draws, -1).contiguous(), controls, keys
    chosen = sample_reference(*arguments)
    few = [argument[:4].to(device) for argument in arguments]
    assert torch.equal(sample_triton(*few).cpu(), chosen[:4])
    probabilities = torch.zeros(6)
    probabilities[kept] = (logits[kept] / temperature).softmax(-1)
    frequencies = chosen.bincount(minlength=6) / draws
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
    arguments = logits, torch.tensor([control(top_p=0.99)] * 64), keys
    chosen = sample_reference(*arguments)
    # Tokens of equal probability are in or out together, so all 1000 are in, and no other.
    assert chosen.max() < 1000
    assert len(chosen.unique()) > 40
    assert torch.equal(sample_triton(*(a.to(device) for a in arguments)).cpu(), chosen)


def test_a_tiny_top_p_is_greedy(device: torch.device, random: torch.Generator) -> None:
    logits, _, keys = rows(8, 1000, random)
    arguments = logits, torch.tensor([control(2.0, top_p=1e-9)] * 8), keys
    assert torch.equal(sample_reference(*arguments), logits.argmax(-1))
    on_device = (argument.to(device) for argument in arguments)
    assert torch.equal(sample_triton(*on_device).cpu(), logits.argmax(-1))


def test_wrong_input_is_a_sentence(device: torch.device, random: torch.Generator) -> None:
    logits, controls, keys = (value.to(device) for value in rows(4, 10, random))
    for bad, sentence in [
        ((logits.half(), controls, keys), r"logits are torch\.float16, float32 needed"),
        ((logits[:, ::2], controls, keys), "logits must be contiguous"),
        ((logits, controls[:3], keys), r"controls are \(3, 4\), \(4, 4\) needed"),
        ((logits, controls.double(), keys), r"controls are torch\.float64, torch\.float32 needed"),
        ((logits, controls, keys[:, :1]), r"keys are \(4, 1\), \(4, 2\) needed"),
        ((logits, controls, keys.int()), r"keys are torch\.int32, torch\.int64 needed"),
    ]:
        with pytest.raises(AssertionError, match=sentence):
            sample_triton(*bad)
