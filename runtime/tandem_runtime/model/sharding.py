"""How a model is cut for tensor parallelism: arithmetic on shapes alone. No torch.

A rank computes a smaller model of the same architecture: its share of the heads, of the width of
the feed-forward layers and of the vocabulary, and the whole hidden state. Each tensor's share
follows from its shape in the whole model and in the rank's: it is cut along the one axis that
differs. So projections out of the hidden state are cut by rows (column parallel), those into it by
columns (row parallel), embedding and head by vocabulary. After Megatron-LM (arXiv:1909.08053).

Where ranks outnumber kv heads, neighbouring ranks hold a copy of one. A vocabulary that does not
divide is padded: the rows past its end are zero and their logits are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from tandem_runtime.checkpoint.config import ModelConfig
from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.quantization import misfit

MAX_RANKS: Final = 64
"""Of one pod."""
_ROW_PARALLEL_BIASES: Final = ("o_proj.bias", "down_proj.bias")
"""Added to a sum over ranks, so that only one rank may add them."""


@dataclass(frozen=True)
class Cut:
    """Which part of a tensor a rank holds: [start, start + length) of `axis`.

    What lies past the tensor's end is zero.
    """

    axis: int
    start: int
    length: int


def sizes_that_fit(config: ModelConfig, weights: str = "none") -> list[int]:
    """Numbers of ranks that can share the model with its linears quantised, ascending."""
    return [size for size in range(1, MAX_RANKS + 1) if _fits(config, size, weights)]


def _fits(config: ModelConfig, size: int, weights: str) -> bool:
    kv_heads = config.kv_heads
    shares_kv = kv_heads % size == 0 or size % kv_heads == 0
    even = config.heads % size == 0 and shares_kv and config.intermediate % size == 0
    return even and misfit(share_of(config, size), weights) is None


def check_fits(config: ModelConfig, size: int, weights: str = "none") -> None:
    """Raises `ModelError` with the sizes that would work."""
    sizes = sizes_that_fit(config, weights)
    if size in sizes:
        return
    reason = misfit(config, weights)
    if reason is not None:
        raise ModelError("BadConfig", f"{reason}: use weights none")
    quantized = "" if weights == "none" else f", with {weights} weights"
    raise ModelError(
        "BadConfig",
        f"{size} ranks cannot share {config.heads} heads, {config.kv_heads} kv heads and a "
        f"feed-forward width of {config.intermediate} evenly (tensor parallel){quantized}; this "
        f"model works with {', '.join(map(str, sizes))}",
    )


def share_of(config: ModelConfig, size: int) -> ModelConfig:
    """The model that each of `size` ranks computes; its vocabulary includes padding."""
    return replace(
        config,
        heads=config.heads // size,
        kv_heads=max(config.kv_heads // size, 1),
        intermediate=config.intermediate // size,
        vocab_size=-(-config.vocab_size // size),
    )


@dataclass(frozen=True)
class Sharding:
    """A model shared by `size` ranks. Raises `ModelError` where they cannot share it."""

    config: ModelConfig
    """Of the whole model."""
    size: int

    def __post_init__(self) -> None:
        check_fits(self.config, self.size)

    @cached_property
    def local(self) -> ModelConfig:
        """The model that each rank computes; its vocabulary includes padding."""
        return share_of(self.config, self.size)

    @cached_property
    def _shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """Of every tensor: in the whole model with padding, and in a rank's."""
        padded = replace(self.config, vocab_size=self.local.vocab_size * self.size)
        return [padded.tensor_shapes(), self.local.tensor_shapes()]

    def cut(self, name: str, rank: int) -> Cut | None:
        """What `rank` holds of a tensor; None: all of it."""
        whole, part = (shapes[name] for shapes in self._shapes)
        if name.endswith(_ROW_PARALLEL_BIASES) and rank > 0:
            return Cut(0, whole[0], whole[0])
        for axis, (all_of_it, length) in enumerate(zip(whole, part, strict=True)):
            if all_of_it != length:
                copies = length * self.size // all_of_it
                return Cut(axis, rank // copies * length, length)
        return None

    def kv_heads_of(self, rank: int) -> range:
        """The whole model's kv heads whose cache `rank` holds."""
        copies = max(self.size // self.config.kv_heads, 1)
        count = self.local.kv_heads
        return range(rank // copies * count, rank // copies * count + count)

    def kv_owners(self) -> list[int]:
        """Ranks whose caches together hold each kv head once, in order."""
        return list(range(0, self.size, max(self.size // self.config.kv_heads, 1)))
