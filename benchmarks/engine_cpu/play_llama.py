"""llama.cpp with batched decoding through its low-level API. Arguments: the GGUF file, and
`--without-amx` where its tiles end in an illegal instruction."""

from __future__ import annotations

import sys
import time
from typing import Any

THREADS, CONTEXT_TOKENS, BATCH_TOKENS, STREAMS = 2, 32 * 384, 512, 32


def main() -> None:
    """See the module."""
    import llama_cpp as api  # type: ignore[import-not-found]
    import numpy as np
    from prompts import answer  # type: ignore[import-not-found]

    how = api.llama_model_default_params()
    how.use_extra_bufts = "--without-amx" not in sys.argv
    model = api.llama_model_load_from_file(sys.argv[1].encode(), how)
    params = api.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified = CONTEXT_TOKENS, STREAMS, True
    params.n_batch = params.n_ubatch = BATCH_TOKENS
    params.n_threads = params.n_threads_batch = THREADS
    context = api.llama_init_from_model(model, params)
    words = api.llama_n_vocab(api.llama_model_get_vocab(model))
    batch = api.llama_batch_init(BATCH_TOKENS, 0, 1)

    def run(rows: list[tuple[int, int, int, bool]]) -> None:
        """Of (token id, position, stream, whether its logits are wanted)."""
        batch.n_tokens = len(rows)
        for i, (token_id, position, stream, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token_id, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, stream
        if api.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def best(row: int) -> int:
        logits: Any = api.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(logits, (words,)).argmax())

    def play(prompts: list[list[int]], output_tokens: int) -> float:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        begun_s = time.perf_counter()
        newest = []
        for stream, ids in enumerate(prompts):
            for start in range(0, len(ids), BATCH_TOKENS):
                part = ids[start : start + BATCH_TOKENS]
                last = len(ids) - 1 - start
                run([(token, start + i, stream, i == last) for i, token in enumerate(part)])
            newest.append(best(len(part) - 1))
        for step in range(output_tokens - 1):
            at = len(prompts[0]) + step
            run([(token, at, stream, True) for stream, token in enumerate(newest)])
            newest = [best(row) for row in range(len(newest))]
        return time.perf_counter() - begun_s

    answer(play)


if __name__ == "__main__":
    main()
