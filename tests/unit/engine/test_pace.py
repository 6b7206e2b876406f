"""Engines whose steps take a stated accelerator's time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tandem_runtime.checkpoint.tiny import write_tiny
from tandem_runtime.config import EngineConfig
from tandem_runtime.engine.batch import Batch
from tandem_runtime.engine.build import build_engine
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.pace import PacedRunner, step_s
from tandem_runtime.engine.sequence import Request, SampledToken
from tandem_runtime.protocol import Sampling
from tandem_runtime.roofline.stated import stated_replica

H100 = stated_replica("h100", gpus=1)
DECODES = (1, 1), (900, 1100)
"""Query tokens and context tokens of two streams."""


def batch(query_tokens: tuple[int, ...], context_tokens: tuple[int, ...]) -> Batch:
    return Batch([], [], [], list(query_tokens), list(context_tokens), [], [])


class Clock:
    """Time that passes when somebody computes or sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.oversleep_s = 0.0
        """By which the next sleep takes longer: the process is stopped meanwhile."""

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + self.oversleep_s
        self.oversleep_s = 0.0


class Computes:
    """A runner that takes so long."""

    overlaps = False

    def __init__(self, clock: Clock, launch_s: float, collect_s: float) -> None:
        self.clock, self.launch_s, self.collect_s = clock, launch_s, collect_s

    def launch(self, batch: Batch) -> str:
        self.clock.now_s += self.launch_s
        return "launched"

    def collect(self, launched: object) -> list[None]:
        assert launched == "launched"
        self.clock.now_s += self.collect_s
        return [None]


@pytest.fixture
def taken_s() -> Callable[..., float]:
    """`taken_s(batch, launch_s, collect_s, oversleep_s)`, of one step at an H100's pace."""

    def step(
        work: Batch, launch_s: float = 0.0, collect_s: float = 0.0, oversleep_s: float = 0.0
    ) -> float:
        clock = Clock()
        clock.oversleep_s = oversleep_s
        own: object = Computes(clock, launch_s, collect_s)
        runner = PacedRunner(own, H100, clock, clock.sleep)  # type: ignore[arg-type]
        assert runner.collect(runner.launch(work)) == [None]
        return clock.now_s

    return step


def test_a_step_takes_what_the_stated_model_would() -> None:
    assert step_s(H100, batch(*DECODES)) == H100.decode_s(2, 2000)
    assert step_s(H100, batch((512,), (512,))) == H100.prompt_s(512, 0, 512)
    assert step_s(H100, batch((100,), (700,))) == H100.prompt_s(100, 600, 512)
    # By hand: an H100 at 0.8 of 3.35 TB/s reads the weights of 8B parameters in bf16, 1 ms more.
    assert step_s(H100, batch((1,), (1,))) == pytest.approx(0.0066, abs=2e-4)


def test_what_is_computed_together_costs_its_sum() -> None:
    mixed = batch((1, 512), (900, 512))
    assert step_s(H100, mixed) == pytest.approx(
        H100.step_s(
            prompt_tokens=512,
            prompt_pairs=512 * 512 / 2,
            prompt_context_tokens=512,
            decodes=1,
            decode_context_tokens=900,
        )
    )


def test_the_rest_of_a_step_is_slept(taken_s: Callable[..., float]) -> None:
    work = batch(*DECODES)
    stated_s = step_s(H100, work)
    assert taken_s(work) == pytest.approx(stated_s)
    assert taken_s(work, launch_s=0.002, collect_s=0.001) == pytest.approx(stated_s)
    assert taken_s(work, launch_s=0.5) == 0.5


def test_time_in_which_the_process_is_stopped_is_lost(taken_s: Callable[..., float]) -> None:
    work = batch(*DECODES)
    stated_s = step_s(H100, work)
    assert taken_s(work, oversleep_s=0.001) == pytest.approx(stated_s)
    assert taken_s(work, oversleep_s=0.1) == pytest.approx(stated_s + 0.1, abs=0.005)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tiny") / "made"
    write_tiny(found)
    return found


def answer(engine: Engine) -> list[SampledToken]:
    engine.add(Request("s", list(range(40)), Sampling(max_tokens=12, temperature=0.0)))
    tokens: list[SampledToken] = []
    while engine.has_work:
        tokens += [s.token for s in engine.step().streams if s.token is not None]
    return tokens


def test_a_paced_engine_gives_the_same_tokens_and_holds_what_the_stated_one_does(
    folder: Path,
) -> None:
    uri = f"file://{folder}"
    paced = build_engine(EngineConfig(uri, pace="l40s"))
    tokens = answer(paced)
    assert tokens == answer(build_engine(EngineConfig(uri)))
    assert len(tokens) == 12
    stated = stated_replica("l40s", gpus=1).kv_capacity_tokens
    assert stated - 64 < paced.kv_capacity_tokens <= stated
    asked = build_engine(EngineConfig(uri, pace="l40s", kv_cache_tokens=6400))
    assert asked.kv_capacity_tokens == 6400


def test_two_ranks_are_two_accelerators(folder: Path) -> None:
    both = EngineConfig(f"file://{folder}", pace="a100", tensor_parallel=2)
    assert both.stated == stated_replica("a100", gpus=2)
