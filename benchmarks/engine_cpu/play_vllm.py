"""vLLM offline, in its own environment. Argument: the folder with its weights."""

from __future__ import annotations

import sys
import time
from typing import Any


def main() -> None:
    """See the module."""
    from prompts import answer  # type: ignore[import-not-found]
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm: Any = LLM(
        sys.argv[1],
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=2048,
        max_num_seqs=32,
    )

    def play(prompts: list[list[int]], output_tokens: int) -> float:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False
        )
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        begun_s = time.perf_counter()
        outputs = llm.generate(asked, sampling, use_tqdm=False)
        took_s = time.perf_counter() - begun_s
        assert all(len(out.outputs[0].token_ids) == output_tokens for out in outputs)
        return took_s

    answer(play)


if __name__ == "__main__":
    main()
