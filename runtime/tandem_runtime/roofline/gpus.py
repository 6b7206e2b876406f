"""GPUs by their data sheets: dense FLOP/s, memory, links, and an assumed price.

Vendors print FLOP/s with sparsity and link bandwidth as the sum of both directions; here are dense
FLOP/s and one direction, which is what a step can use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tandem_runtime.roofline.errors import RooflineError

_TERA: Final = 1e12
_GIGA: Final = 1e9


@dataclass(frozen=True)
class Gpu:
    """One accelerator as its vendor describes it."""

    name: str
    bf16_flop_per_s: float
    fp8_flop_per_s: float | None
    """None: no fp8 units; fp8 weights are computed in bf16."""
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """To the other GPUs of its node, one direction."""
    collective_latency_s: float
    """Of a small all-reduce within the node: an assumption, for the links' kind."""
    host_bytes_per_s: float
    """To host memory, one direction."""
    usd_per_hour: float
    """Assumed: a round figure among specialised clouds' on-demand prices of May 2026."""
    source: str
    gpus_per_node: int = 8


def _gpu(
    name: str,
    bf16_tflop: float,
    fp8_tflop: float | None,
    memory_gb: float,
    memory_tb_per_s: float,
    link_gb_per_s: float,
    host_gb_per_s: float,
    usd_per_hour: float,
    source: str,
    collective_latency_us: float = 8.0,
) -> Gpu:
    return Gpu(
        name=name,
        bf16_flop_per_s=bf16_tflop * _TERA,
        fp8_flop_per_s=None if fp8_tflop is None else fp8_tflop * _TERA,
        memory_bytes=memory_gb * _GIGA,
        memory_bytes_per_s=memory_tb_per_s * _TERA,
        link_bytes_per_s=link_gb_per_s * _GIGA,
        collective_latency_s=collective_latency_us * 1e-6,
        host_bytes_per_s=host_gb_per_s * _GIGA,
        usd_per_hour=usd_per_hour,
        source=source,
    )


GPUS: Final = {
    gpu.name: gpu
    for gpu in (
        _gpu("A100", 312, None, 80, 2.039, 300, 32, 1.3,
             "NVIDIA A100 80GB SXM data sheet: NVLink 600 GB/s, PCIe Gen4"),
        _gpu("H100", 989.4, 1978.9, 80, 3.35, 450, 64, 3.0,
             "NVIDIA H100 SXM5 data sheet: NVLink 900 GB/s, PCIe Gen5"),
        _gpu("H200", 989.4, 1978.9, 141, 4.8, 450, 64, 4.0,
             "NVIDIA H200 SXM data sheet: NVLink 900 GB/s, PCIe Gen5"),
        _gpu("B200", 2250, 4500, 180, 8.0, 900, 64, 6.0,
             "NVIDIA DGX B200 data sheet, an eighth of it: 1,440 GB, 64 TB/s, NVLink 14.4 TB/s"),
        _gpu("L40S", 362, 733, 48, 0.864, 32, 32, 1.0,
             "NVIDIA L40S data sheet: no NVLink, PCIe Gen4", collective_latency_us=25.0),
        _gpu("MI300X", 1307.4, 2614.9, 192, 5.3, 448, 64, 2.0,
             "AMD Instinct MI300X data sheet: seven links of 128 GB/s, PCIe Gen5"),
    )
}  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """A GPU of the catalogue, whatever the case of its name. Raises RooflineError."""
    gpu = GPUS.get(name.upper())
    if gpu is None:
        raise RooflineError(f"GPU {name} is not in the catalogue: use one of {', '.join(GPUS)}")
    return gpu
