"""The accelerators that the nodes advertise: the machine's own by NVML, else pretended ones."""

from __future__ import annotations

from typing import Final

import pynvml

from tandem.agent.config import Gpu

PRETENDED_PRODUCT: Final = "Tandem-Pretended-GPU"


def real_gpus() -> list[Gpu]:
    """The NVIDIA GPUs of this machine; none where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
        return [
            Gpu(
                index,
                str(pynvml.nvmlDeviceGetName(handle)).replace(" ", "-"),
                int(pynvml.nvmlDeviceGetMinorNumber(handle)),
            )
            for index, handle in enumerate(handles)
        ]
    finally:
        pynvml.nvmlShutdown()


def spread(real: list[Gpu], nodes: int, per_node: int) -> list[tuple[Gpu, ...]]:
    """The GPUs of each node: real ones dealt out in turn, so that no two nodes offer the same;
    without any, `per_node` pretended ones each."""
    if real:
        return [tuple(real[node::nodes]) for node in range(nodes)]
    pretended = tuple(Gpu(index, PRETENDED_PRODUCT) for index in range(per_node))
    return [pretended] * nodes
