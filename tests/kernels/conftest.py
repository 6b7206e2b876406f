"""Kernels against their references, in Triton's interpreter or compiled.

Whether `triton.jit` interprets is fixed when a kernel's module is first imported, so these tests
need a process of their own:

- `TRITON_INTERPRET=1 pytest tests/kernels` (`make kernels`): interpreted, on the CPU;
- `pytest tests/kernels -m gpu`: compiled, on a GPU;
- any other run collects what starts processes of its own (test_own_process.py: the first of these,
  test_gpu_benchmark.py) and test_compile.py, which compiles without running.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from triton.runtime.interpreter import TensorHandle

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ELSEWHERE = ("test_own_process.py", "test_compile.py", "test_gpu_benchmark.py")


def compiled(config: pytest.Config) -> bool:
    """Whether this run asks for compiled kernels."""
    return config.getoption("-m") == "gpu" and not INTERPRETED


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not collection_path.name.startswith("test_"):
        return None
    here = INTERPRETED or compiled(config)
    return True if (collection_path.name in ELSEWHERE) == here else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if compiled(config):
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the kernels run; the references always run on the CPU."""
    if not compiled(request.config):
        return torch.device("cpu")
    assert torch.cuda.is_available(), "-m gpu needs an NVIDIA GPU, and torch finds none"
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _bfloat16_products() -> Iterator[None]:
    """Triton 3.7's interpreter keeps bfloat16 as uint16 and multiplies matrices of those bits."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    original = builder.create_dot

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != interpreter.tl.bfloat16:
            return handle
        data = (handle.data.astype("uint32") << 16).view("float32")
        return interpreter.TensorHandle(data, interpreter.tl.float32)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return original(self, widened(a), widened(b), *rest)

    builder.create_dot = create_dot
    yield
    builder.create_dot = original


@pytest.fixture(autouse=True, scope="session")
def _fp8_conversions() -> Iterator[None]:
    """The interpreter drops the carry where rounding to fp8 reaches the next power of two."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    builder, tl = interpreter.InterpreterBuilder, interpreter.tl
    original = builder.create_fp_to_fp
    bits = {tl.float8e4nv: torch.uint8, tl.bfloat16: torch.uint16}
    types = {
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.bfloat16: torch.bfloat16,
        tl.float16: torch.float16,
        tl.float32: torch.float32,
    }

    def create_fp_to_fp(self: Any, src: TensorHandle, dst_type: Any, rounding: Any) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.float8e4nv not in (source, target):
            return original(self, src, dst_type, rounding)
        data = torch.from_numpy(src.data.copy()).view(types[source]).to(types[target])
        return interpreter.TensorHandle(data.view(bits.get(target, types[target])).numpy(), target)

    builder.create_fp_to_fp = create_fp_to_fp
    yield
    builder.create_fp_to_fp = original
