"""`python -m benchmarks.gpu`: checks every kernel, then times it, on one NVIDIA GPU.

The ceilings of the GPU are measured first and stand beside every figure. Most important first;
each section prints as it ends, and when the time is up the rest is left out and said so.
`--dry-run` does the same work once, with small shapes, in Triton's interpreter on the CPU: it
checks the command, not the GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

BUDGET_S = 460.0
CHECKS_S = 150.0
"""Of the budget, for the kernels' tests."""


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small, once")
    dry = parser.parse_args().dry_run
    if dry:
        # Triton decides when it is imported whether it interprets.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not dry and not torch.cuda.is_available():
        sys.stderr.write("torch finds no CUDA device; --dry-run checks the command without one\n")
        return 1
    begun_s = time.perf_counter()
    checked = check_kernels(dry)
    with torch.inference_mode():
        return measure(dry, checked, BUDGET_S - (time.perf_counter() - begun_s))


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


def measure(dry: bool, checked: bool, budget_s: float) -> int:
    """Sections in order, as many as the time allows; 1 if a kernel is wrong."""
    import torch

    from benchmarks.gpu.attention import decode_targets, prefill_targets
    from benchmarks.gpu.ceilings import measure_ceilings
    from benchmarks.gpu.rows import row_targets
    from benchmarks.gpu.steps import RandomModel, idle_target, step_targets
    from benchmarks.gpu.timing import Clock, OutOfTimeError
    from benchmarks.report import Target, finish

    # The interpreter multiplies bfloat16 wrongly; a dry run is about the code, not the dtype.
    dtype = torch.float32 if dry else torch.bfloat16
    clock = Clock(torch.device("cpu" if dry else "cuda"), budget_s, dry)
    limits = measure_ceilings(clock, dtype)
    print(
        f"read {limits.read_bytes_per_s / 1e9:.0f} GB/s, copy {limits.copy_bytes_per_s / 1e9:.0f} "
        f"GB/s, matmul {limits.matmul_flop_per_s / 1e12:.1f} TFLOP/s",
        flush=True,
    )
    targets = [Target("kernels equal their references", float(checked), 1.0, "at least")]

    def model_steps() -> Iterable[Target]:
        model = RandomModel(clock, dtype)
        yield from step_targets(clock, limits, model)
        yield idle_target(clock, model)

    sections: dict[str, Callable[[], Iterable[Target]]] = {
        "decode attention": lambda: decode_targets(clock, limits, dtype),
        "steps": model_steps,
        "prefill attention": lambda: prefill_targets(clock, dtype),
        "rows": lambda: row_targets(clock, limits, dtype),
    }
    for name, section in sections.items():
        try:
            for target in section():
                if dry:
                    target = replace(target, bound=None)
                targets.append(target)
                print(f"{target.name:64} {target.value:8.3f}  bound {target.bound}", flush=True)
        except OutOfTimeError as error:
            print(f"# {name}: {error}, the rest is left out", flush=True)
    results = {
        "read_gb_per_s": limits.read_bytes_per_s / 1e9,
        "copy_gb_per_s": limits.copy_bytes_per_s / 1e9,
        "matmul_tflop_per_s": limits.matmul_flop_per_s / 1e12,
        "dry_run": dry,
    }
    finish("gpu", targets, results, ("torch", "triton"), save=not dry)
    return 0 if checked else 1


if __name__ == "__main__":
    sys.exit(main())
