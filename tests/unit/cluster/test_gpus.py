from __future__ import annotations

from tandem.agent.config import Gpu
from tandem.cluster.gpus import PRETENDED_PRODUCT, spread

REAL = [Gpu(index, "H100", index) for index in range(3)]


def test_real_gpus_are_dealt_out() -> None:
    given = spread(REAL, nodes=2, per_node=8)
    assert [[gpu.index for gpu in gpus] for gpus in given] == [[0, 2], [1]]
    assert [[gpu.index for gpu in gpus] for gpus in spread(REAL[:1], 3, 8)] == [[0], [], []]


def test_pretended_gpus_are_the_same_everywhere() -> None:
    given = spread([], nodes=2, per_node=4)
    assert [len(gpus) for gpus in given] == [4, 4]
    assert all(gpu.minor is None and gpu.product == PRETENDED_PRODUCT for gpu in given[0])
    assert spread([], nodes=1, per_node=0) == [()]
