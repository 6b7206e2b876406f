"""Tensor parallelism inside a step: what the ranks of a pod add up and put together.

One rank alone pays nothing: it communicates nothing and copies nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from tandem_runtime.model.quantize import Quantized
from tandem_runtime.model.sharding import Cut, Sharding
from tandem_runtime.model.weights import Weights


class RankLost(Exception):
    """A rank is gone, so the others cannot go on; the message says which and why."""


@dataclass(frozen=True)
class Ranks:
    """The processes that compute one model together; more than one are a torch process group."""

    size: int = 1
    rank: int = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, equal to the bit on each; `x` itself may be overwritten.

        On the CPU a row's sum does not depend on the other rows of the step: partial sums are added
        in the order of the ranks, in float32, where a ring adds each chunk of memory in another
        order (docs/design/engine.md). NCCL reduces in x's own dtype, under CUDA graphs too.
        """
        if self.size == 1:
            return x
        if x.is_cuda:
            dist.all_reduce(x)
            return x
        return self._gather(x).sum(0, dtype=torch.float32).to(x.dtype)

    def logits(self, x: Tensor, vocab_size: int) -> Tensor:
        """[n, vocab_size] from each rank's [n, share of the padded vocabulary]."""
        if self.size == 1:
            return x
        whole = self._gather(x).transpose(0, 1).reshape(len(x), self.size * x.shape[1])
        return whole[:, :vocab_size].contiguous()

    def embed(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """Rows of the whole vocabulary's table, of which each rank holds its share.

        token_ids: [rows] int64; table: [share of the padded vocabulary, hidden].
        """
        if self.size == 1:
            return table[token_ids]
        index = token_ids - self.rank * len(table)
        foreign = (index < 0) | (index >= len(table))
        rows = table[index.masked_fill(foreign, 0)]
        return self.all_reduce(rows.masked_fill_(foreign[:, None], 0))

    def share(self, x: Tensor) -> None:
        """Rank 0's `x` in everybody's."""
        if self.size > 1:
            dist.broadcast(x, 0)

    def least(self, value: int) -> int:
        """The smallest of all ranks' values."""
        if self.size == 1:
            return value
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return int(self._gather(torch.tensor([value], device=device)).min())

    def _gather(self, x: Tensor) -> Tensor:
        """[ranks, *x.shape]"""
        parts = x.new_empty((self.size, *x.shape))
        try:
            dist.all_gather(list(parts), x.contiguous())
        except RuntimeError as error:
            raise RankLost(f"the ranks cannot reach each other: {error}") from error
        return parts


ALONE: Final = Ranks()


class ShardedWeights:
    """A rank's share of each tensor. Implements `Weights`."""

    def __init__(self, whole: Weights, sharding: Sharding, rank: int) -> None:
        self._whole = whole
        self.dtype = whole.dtype
        self._sharding = sharding
        self._rank = rank

    def load(self, name: str) -> Tensor:
        """The rank's part of the tensor, in memory of its own."""
        cut = self._sharding.cut(name, self._rank)
        tensor = self._whole.load(name)
        return tensor if cut is None else _part(tensor, cut)

    def quantized(self, name: str) -> Quantized | None:
        """The same of a weight that is stored quantised; its scales follow its rows and groups."""
        whole, cut = self._whole.quantized(name), self._sharding.cut(name, self._rank)
        if whole is None or cut is None:
            return whole
        values, scales = _part(whole.values, cut), whole.scales
        if cut.axis == 0:
            scales = _part(scales, cut)
        elif scales.shape[1] > 1:
            columns = whole.values.shape[1] // scales.shape[1]
            scales = _part(scales, Cut(1, cut.start // columns, cut.length // columns))
        return whole._replace(values=values, scales=scales)

    def rope_factors(self) -> Tensor | None:
        return self._whole.rope_factors()


def _part(tensor: Tensor, cut: Cut) -> Tensor:
    shape = list(tensor.shape)
    start = min(cut.start, shape[cut.axis])
    length = min(cut.length, shape[cut.axis] - start)
    shape[cut.axis] = cut.length
    part = tensor.new_zeros(shape)
    part.narrow(cut.axis, 0, length).copy_(tensor.narrow(cut.axis, start, length))
    return part
