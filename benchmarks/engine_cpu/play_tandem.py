"""This engine offline. Argument: a JSON object of `EngineConfig` fields."""

from __future__ import annotations

import json
import sys
import time

from tandem_runtime.config import EngineConfig
from tandem_runtime.engine.build import build_engine
from tandem_runtime.engine.sequence import Request
from tandem_runtime.protocol import Sampling

from benchmarks.engine_cpu.players import STEP_TOKENS, THREADS
from benchmarks.engine_cpu.prompts import answer
from benchmarks.fleet import MODEL_URI


def main() -> None:
    """See the module."""
    options = json.loads(sys.argv[1])
    engine = build_engine(
        EngineConfig(
            MODEL_URI,
            dtype="bfloat16",
            threads=THREADS,
            prefix_caching=False,
            max_batch_tokens=STEP_TOKENS,
            **options,
        )
    )

    def play(prompts: list[list[int]], output_tokens: int) -> float:
        sampling = Sampling(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        begun_s = time.perf_counter()
        for index, ids in enumerate(prompts):
            engine.add(Request(str(index), ids, sampling))
        while engine.has_work:
            engine.step()
        return time.perf_counter() - begun_s

    answer(play)
    engine.close()


if __name__ == "__main__":
    main()
