"""`python -m benchmarks.gpu`: checks every kernel, then times it, on one NVIDIA GPU.

The ceilings of the GPU are measured first and stand beside every figure. Most important first;
each section prints as it ends, and when the time is up the rest is left out and said so. The tiles
of attention are measured first on a device that `kernels/tuned.json` does not know.
`--dry-run` does the same work once, with small shapes, in Triton's interpreter on the CPU: it
checks the command, not the GPU.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from benchmarks.gpu.steps import Limits
    from benchmarks.gpu.timing import Clock
    from benchmarks.report import Target

BUDGET_S = 460.0
CHECKS_S = 120.0
"""Of the budget, for the kernels' tests."""
TUNING_S = 75.0
"""Of the budget, for tiles."""


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small, once")
    parser.add_argument("--tune", action="store_true", help="measure tiles although they are known")
    parser.add_argument(
        "--trace",
        type=Path,
        action="append",
        default=[],
        help="lengths of the offline requests: CSV or JSON lines, .gz or not; may be repeated",
    )
    args = parser.parse_args()
    if args.dry_run:
        # Triton decides when it is imported whether it interprets.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        sys.stderr.write("torch finds no CUDA device; --dry-run checks the command without one\n")
        return 1
    if missing := [str(path) for path in args.trace if not path.is_file()]:
        sys.stderr.write(f"there is no trace {', '.join(missing)}\n")
        return 1
    begun_s = time.perf_counter()
    checked = check_kernels(args.dry_run)
    with torch.inference_mode():
        return measure(args, checked, BUDGET_S - (time.perf_counter() - begun_s))


def check_kernels(dry: bool) -> bool:
    """Every kernel against its reference: tests/kernels, compiled (or interpreted)."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels"]
    try:
        done = subprocess.run(
            [*command, "-k", "rms_norm"] if dry else [*command, "-m", "gpu"], timeout=CHECKS_S
        )
    except subprocess.TimeoutExpired:
        print(f"# the checks did not end within {CHECKS_S:.0f} s", flush=True)
        return False
    return done.returncode == 0


def measure(args: argparse.Namespace, checked: bool, budget_s: float) -> int:
    """Sections in order, as many as the time allows; 1 if a kernel is wrong."""
    import torch

    from benchmarks.gpu.ceilings import Matmuls, measure_ceilings
    from benchmarks.gpu.roofline import Points, draw
    from benchmarks.gpu.steps import Limits
    from benchmarks.gpu.timing import Clock
    from benchmarks.report import RESULTS, Target, finish

    # The interpreter multiplies bfloat16 wrongly; a dry run is about the code, not the dtype.
    dry = args.dry_run
    dtype = torch.float32 if dry else torch.bfloat16
    clock = Clock(torch.device("cpu" if dry else "cuda"), budget_s, dry)
    ceilings = measure_ceilings(clock, dtype)
    print(
        f"read {ceilings.read_bytes_per_s / 1e9:.0f} GB/s, copy "
        f"{ceilings.copy_bytes_per_s / 1e9:.0f} GB/s, matmul "
        f"{ceilings.matmul_flop_per_s / 1e12:.1f} TFLOP/s",
        flush=True,
    )
    limits = Limits(ceilings, Matmuls(clock, dtype), Points())
    targets = [Target("kernels equal their references", float(checked), 1.0, "at least")]
    for name, section in sections(args, clock, limits, dtype).items():
        targets += run_section(name, section, dry)
    results = {
        "read_gb_per_s": ceilings.read_bytes_per_s / 1e9,
        "copy_gb_per_s": ceilings.copy_bytes_per_s / 1e9,
        "matmul_tflop_per_s": ceilings.matmul_flop_per_s / 1e12,
        "dry_run": dry,
    }
    try:
        RESULTS.mkdir(exist_ok=True)
        picture = io.BytesIO() if dry else RESULTS / "gpu_roofline.png"
        draw(limits.points.all, ceilings, picture)
    except ImportError:
        print("# roofline plot: matplotlib is not installed, left out", flush=True)
    finish("gpu", targets, results, ("torch", "triton", "transformers"), save=not dry)
    return 0 if checked else 1


def run_section(name: str, section: Callable[[], Iterable[Target]], dry: bool) -> list[Target]:
    """Print its figures as they come; what goes wrong in one ends that one alone."""
    from benchmarks.gpu.timing import OutOfTimeError

    targets = []
    try:
        for target in section():
            if dry:
                target = replace(target, bound=None)
            targets.append(target)
            print(f"{target.name:72} {target.value:10.3f}  bound {target.bound}", flush=True)
    except OutOfTimeError as error:
        print(f"# {name}: {error}, the rest is left out", flush=True)
    except Exception as error:
        if dry:
            raise
        # Hours of a GPU are dear: the other sections' figures are worth having.
        print(f"# {name}: failed, the rest is left out: {error!r}", flush=True)
    return targets


def sections(
    args: argparse.Namespace, clock: Clock, limits: Limits, dtype: torch.dtype
) -> dict[str, Callable[[], Iterable[Target]]]:
    """Most important first; each frees its memory when it ends."""
    from benchmarks.gpu import steps
    from benchmarks.gpu.attention import decode_targets, prefill_targets
    from benchmarks.gpu.model import RandomModel
    from benchmarks.gpu.offline import offline_targets
    from benchmarks.gpu.peers import own_tokens_per_s, peer_targets
    from benchmarks.gpu.rows import row_targets
    from benchmarks.gpu.tune import tune_targets

    own: list[float] = []

    def tiles() -> Iterable[Target]:
        return tune_targets(replace(clock, budget_s=TUNING_S), dtype, force=args.tune)

    def model_steps() -> Iterable[Target]:
        model = RandomModel(clock, dtype)
        own.append(own_tokens_per_s(model))
        yield from steps.decode_targets(limits, model)
        yield steps.prefill_target(limits, model)
        yield steps.idle_target(model)
        yield from offline_targets(limits, model, args.trace)

    def peers() -> Iterable[Target]:
        return peer_targets(clock, own[0]) if own else ()

    ceilings, points = limits.ceilings, limits.points
    return {
        "tiles": tiles,
        "decode attention": lambda: decode_targets(clock, ceilings, points, dtype),
        "steps": model_steps,
        "prefill attention": lambda: prefill_targets(clock, points, dtype),
        "fp8 weights": lambda: steps.fp8_targets(clock, limits, dtype),
        "rows": lambda: row_targets(clock, ceilings, points, dtype),
        "peers": peers,
    }


if __name__ == "__main__":
    sys.exit(main())
