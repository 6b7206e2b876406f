"""Rope tables: cos and sin of every position, with Llama 3.1's stretching of low frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tandem_runtime.checkpoint.config import Llama3Rope, ModelConfig


def rope_tables(
    config: ModelConfig, context_tokens: int, factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """cos and sin, [context_tokens, head_dim] float32 each, as kernels/rope.py takes them.

    Args:
        config: theta, head dim and scaling.
        context_tokens: rows.
        factors: [head_dim / 2] divisors of the frequencies, where the checkpoint has them.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    if config.rope_scaling is not None:
        frequencies = _stretch(frequencies, config.rope_scaling)
    if factors is not None:
        frequencies = frequencies / factors.float()
    angles = torch.outer(torch.arange(context_tokens).float(), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def _stretch(frequencies: Tensor, rope: Llama3Rope) -> Tensor:
    """Low frequencies divided by `factor`, high ones kept, a smooth passage between.

    After Meta's `apply_scaling` of Llama 3.1.
    """
    wavelengths = 2 * math.pi / frequencies
    longest = rope.original_context_tokens / rope.low_freq_factor
    shortest = rope.original_context_tokens / rope.high_freq_factor
    smooth = (rope.original_context_tokens / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    stretched = torch.where(wavelengths > longest, frequencies / rope.factor, frequencies)
    medium = (wavelengths <= longest) & (wavelengths >= shortest)
    return torch.where(medium, between, stretched)
