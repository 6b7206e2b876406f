"""vLLM offline with its prefix cache, in its own environment. Argument: the folder with its
weights. A line of JSON: the prompt's ids, and whether to forget all others before."""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> None:
    """See the module."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm: Any = LLM(
        sys.argv[1],
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=True,
        max_model_len=8192,
        max_num_seqs=4,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    for line in sys.stdin:
        message = json.loads(line)
        if message["forget"]:
            llm.reset_prefix_cache()
        begun_s = time.perf_counter()
        llm.generate([{"prompt_token_ids": message["ids"]}], sampling, use_tqdm=False)
        print(f"took_s {time.perf_counter() - begun_s:.6f}", flush=True)


if __name__ == "__main__":
    main()
