"""Shapes of the attention kernels' tiles: measured ones where there are some, else a sane default.

`python -m benchmarks.gpu` measures candidates and writes `tuned.json`:
{device name: {"prefill|decode, group, head dim, dtype": [tokens, warps, stages, programs]}}.
A shape decides the order of summation: it is the same for every step of a process.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Final, Literal, NamedTuple

import torch

TUNED_PATH: Final = Path(__file__).with_name("tuned.json")
Kind = Literal["prefill", "decode"]


class Tile(NamedTuple):
    """What one program works on at a time."""

    tokens: int
    """Of context."""
    warps: int
    stages: int
    """Of the pipeline that loads keys and values ahead."""
    programs: int = 1
    """Decode: programs for each multiprocessor, as many as it runs at once."""


def attention_tile(
    kind: Kind, group: int, dim: int, dtype: torch.dtype, device: torch.device
) -> Tile:
    """For one model on one device."""
    measured = tuned().get(_device_name(device), {}).get(tile_key(kind, group, dim, dtype))
    return measured or default_tile(kind, dim, dtype)


def default_tile(kind: Kind, dim: int, dtype: torch.dtype) -> Tile:
    """For what was never measured: no register spills on an H100, several programs' shared memory
    on a multiprocessor."""
    wide = dtype == torch.float32 or dim > 128
    tokens, stages = (32, 2) if wide else (64, 3)
    return Tile(tokens, 4, stages, 3) if kind == "decode" else Tile(tokens, 8, stages)


def tile_key(kind: Kind, group: int, dim: int, dtype: torch.dtype) -> str:
    """The table's entry."""
    return f"{kind}, {group}, {dim}, {str(dtype).removeprefix('torch.')}"


@cache
def tuned() -> dict[str, dict[str, Tile]]:
    """The table by device."""
    table = json.loads(TUNED_PATH.read_text())
    return {name: {k: Tile(*v) for k, v in tiles.items()} for name, tiles in table.items()}


def programs(device: torch.device, tile: Tile) -> int:
    """The decode kernel's grid: of a fixed size, so that a CUDA graph can hold it."""
    if device.type == "cpu":
        return tile.programs
    return torch.cuda.get_device_properties(device).multi_processor_count * tile.programs


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
