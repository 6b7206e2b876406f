"""The CPU's kernels on processors with fewer instructions than this one may have.

Numba compiles for what NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name, in a process of its own. Without
AMX the vectors multiply; without AVX-512 bfloat16 is widened.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from tandem_runtime.kernels.attention_plan import Step
from tandem_runtime.kernels.compiled import features
from tandem_runtime.kernels.cpu_attention import pack, paged_attention_cpu, plan_cpu
from tandem_runtime.kernels.int4_cpu import int4_linear_cpu, pack_int4
from tandem_runtime.kernels.int4_linear import int4_linear_reference
from tandem_runtime.kernels.linear import linear_cpu, pack_linear
from tandem_runtime.model.quantize import quantize

MODEST = "+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt"


def check_kernels() -> None:
    """Each product against torch's in float32, and rows against rows alone."""
    random = torch.Generator().manual_seed(0)
    weight = (torch.randn(200, 96, generator=random) / 10).bfloat16()
    x = torch.randn(35, 96, generator=random).bfloat16()
    packed, int4 = pack_linear(weight), quantize(weight, "int4")
    assert int4.zeros is not None
    laid = pack_int4(int4.values, int4.scales, int4.zeros)
    q = torch.randn(35, 6, 64, generator=random).bfloat16()
    kv = torch.randn(2, 2, 2, 64, 64, generator=random).bfloat16()
    plan = plan_cpu(Step([35], [100], [[0, 1]], 64))
    keys, values = (plane.transpose(1, 2).reshape(128, 2, 64)[:100].float() for plane in kv)
    scores = torch.einsum("qhd,thd->hqt", q.float(), keys.repeat_interleave(3, 1)) / 8
    hidden = torch.arange(100) > 65 + torch.arange(35)[:, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    attended = torch.einsum("hqt,thd->qhd", weights, values.repeat_interleave(3, 1))
    limits = {"rtol": 2e-2, "atol": 2e-2}
    y = linear_cpu(x, packed, 200)
    torch.testing.assert_close(y.float(), x.float() @ weight.float().T, **limits)
    reference = int4_linear_reference(x, int4.values, int4.scales, int4.zeros, None)
    z = int4_linear_cpu(x, *laid, 200, None)
    torch.testing.assert_close(z, reference, **limits)
    o = paged_attention_cpu(q, pack(kv), plan, 0.125)
    torch.testing.assert_close(o.float(), attended, **limits)
    for row in (0, 20, 34):
        one = x[row : row + 1]
        assert torch.equal(linear_cpu(one, packed, 200), y[row : row + 1])
        assert torch.equal(int4_linear_cpu(one, *laid, 200, None), z[row : row + 1])


def test_this_processor() -> None:
    check_kernels()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86's instructions")
@pytest.mark.parametrize("without", ["amx", "avx512"])
def test_a_processor_with_fewer_instructions(without: str) -> None:
    own = {name for name in features() if not name.startswith("amx")}
    chosen = ",".join(f"+{name}" for name in sorted(own)) if without == "amx" else MODEST
    environment = {**os.environ, "NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": chosen}
    subprocess.run([sys.executable, __file__], env=environment, check=True)


if __name__ == "__main__":
    check_kernels()
