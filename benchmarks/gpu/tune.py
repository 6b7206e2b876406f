"""Which tiles the attention kernels are fastest with on this device; written for everybody after.

`kernels/tuned.json` holds what was found; what is in it is not measured again unless asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Final

import torch
from tandem_runtime.kernels.tuning import TUNED_PATH, Kind, Tile, default_tile, tile_key, tuned
from triton.runtime.errors import OutOfResources, PTXASError

from benchmarks.gpu.attention import LLAMA_8B, SMALL_HEADS, Case, Heads, make_step
from benchmarks.gpu.timing import Clock
from benchmarks.report import Target

CANDIDATES: Final[dict[Kind, list[Tile]]] = {
    "decode": [
        Tile(tokens, 4, stages, programs)
        for tokens, stages, programs in product((64, 128), (2, 3, 4), (2, 3, 4))
    ],
    "prefill": [
        Tile(tokens, warps, stages) for tokens, warps, stages in product((64, 128), (8, 4), (2, 3))
    ],
}
"""Those of one shape that differ in programs alone are compiled once."""


def tune_targets(
    clock: Clock, dtype: torch.dtype, *, force: bool, path: Path = TUNED_PATH
) -> Iterator[Target]:
    """The default's time over the best one's, for each kind and head dim."""
    device = "cpu" if clock.dry else torch.cuda.get_device_name()
    table = tuned().setdefault(device, {})
    for heads, kind in product((LLAMA_8B, SMALL_HEADS), CANDIDATES):
        group = heads.heads // heads.kv_heads
        key = tile_key(kind, group, heads.dim, dtype)
        if key in table and not force:
            print(f"# tiles: {path.name} has {key} on {device}; --tune measures again", flush=True)
            continue
        default = default_tile(kind, heads.dim, dtype)
        candidates = CANDIDATES[kind][: 1 if clock.dry else None]
        case = _case(clock, heads, kind, dtype)
        times = _measure(case, list(dict.fromkeys([default, *candidates])), table, key)
        best = min(times, key=lambda tile: times[tile])
        table[key] = best
        if not clock.dry:
            path.write_text(json.dumps(tuned(), indent=2) + "\n")
        yield Target(
            f"tiles, {key}: default's time over {tuple(best)}'s",
            times[default] / times[best],
            None,
            "at least",
        )


def _case(clock: Clock, heads: Heads, kind: Kind, dtype: torch.dtype) -> Case:
    if clock.dry:
        step = make_step([1], [40]) if kind == "decode" else make_step([20], [40])
    elif kind == "decode":
        step = make_step([1] * 64, [4096] * 64)
    else:
        step = make_step([4096], [4096])
    return Case(clock, heads, step, dtype)


def _measure(
    case: Case, candidates: list[Tile], table: dict[str, Tile], key: str
) -> dict[Tile, float]:
    """Seconds of each candidate; those that do not fit the device are left out."""
    before = table.get(key)
    times: dict[Tile, float] = {}
    for tile in candidates:
        table[key] = tile
        try:
            times[tile] = case.seconds(repeats=5)
        except (OutOfResources, PTXASError):
            continue
        finally:
            if before is None:
                del table[key]
            else:
                table[key] = before
    return times
