"""What Hugging Face transformers makes of the same model, a process for each way.

`python -m benchmarks.gpu.peers static|batch PROMPTS PROMPT_TOKENS NEW_TOKENS [--dry-run]` prints
output tokens a second. A process of its own ends when its time is over, whatever compiles there.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from time import perf_counter
from typing import Any, Final

import torch

from benchmarks.gpu.model import LLAMA_8B, TINY, RandomModel, free_memory
from benchmarks.gpu.timing import Clock
from benchmarks.report import Target

WAYS: Final = {"static": "static cache, torch.compile", "batch": "generate_batch"}
SHAPE: Final = (32, 256, 128)
"""Streams, tokens of each prompt, new tokens."""
DRY_SHAPE: Final = (2, 8, 3)


def own_tokens_per_s(model: RandomModel) -> float:
    """Of this engine on `SHAPE`, warm."""
    streams, prompt, new = DRY_SHAPE if model.clock.dry else SHAPE
    rate = 0.0
    for _ in range(1 if model.clock.dry else 2):
        engine = model.engine(model.runner, max_batch_tokens=32 if model.clock.dry else 2048)
        model.add(engine, streams, prompt, new)
        begun_s = perf_counter()
        while engine.has_work:
            engine.step()
        rate = streams * new / (perf_counter() - begun_s)
    return rate


def peer_targets(clock: Clock, own: float) -> Iterator[Target]:
    """Our rate over theirs, which need the GPU's memory."""
    free_memory()
    yield Target("output tokens/s of 32 x 256/128", own, None, "at least")
    if find_spec("transformers") is None:
        print("# peers: transformers is not installed, left out", flush=True)
        return
    for way, title in WAYS.items():
        clock.check()
        shape = DRY_SHAPE if clock.dry else SHAPE
        command = [sys.executable, "-m", "benchmarks.gpu.peers", way, *map(str, shape)]
        try:
            done = subprocess.run(
                [*command, *(["--dry-run"] if clock.dry else [])],
                capture_output=True,
                text=True,
                timeout=clock.left_s,
            )
        except subprocess.TimeoutExpired:
            print(f"# peers: transformers, {title}: not done in time", flush=True)
            continue
        if done.returncode:
            lines = done.stderr.strip().splitlines()[-1:]
            print(f"# peers: transformers, {title}: {' '.join(lines)}", flush=True)
            continue
        rate = float(done.stdout.splitlines()[-1])
        yield Target(f"transformers, {title}: output tokens/s", rate, None, "at least")
        yield Target(f"our tokens/s over transformers' ({title})", own / rate, None, "at least")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=list(WAYS))
    for name in ("streams", "prompt", "new"):
        parser.add_argument(name, type=int)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    model = _model(args.dry_run)
    draw = random.Random(0)
    ids = range(model.config.vocab_size)
    prompts = [draw.choices(ids, k=args.prompt) for _ in range(args.streams)]
    generate = _static if args.way == "static" else _batch
    rate = 0.0
    for _ in range(1 if args.dry_run else 2):  # the first compiles
        begun_s = perf_counter()
        tokens = generate(model, prompts, args.new, args.dry_run)
        rate = tokens / (perf_counter() - begun_s)
    print(rate)


def _model(dry: bool) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = TINY if dry else LLAMA_8B
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context_tokens,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device("cpu" if dry else "cuda"):
        dtype = torch.float32 if dry else torch.bfloat16
        make: Any = AutoModelForCausalLM
        return make.from_config(config, dtype=dtype).eval()


def _static(model: Any, prompts: list[list[int]], new: int, dry: bool) -> int:
    ids = torch.tensor(prompts, device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=True,
        top_k=0,
        pad_token_id=0,
        cache_implementation="static",
        disable_compile=dry,
    )
    return int(output.numel() - ids.numel())


def _batch(model: Any, prompts: list[list[int]], new: int, dry: bool) -> int:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    make: Any = GenerationConfig
    config = make(max_new_tokens=new, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=32)
    outputs = model.generate_batch(
        prompts,
        generation_config=config,
        continuous_batching_config=small if dry else None,
        progress_bar=False,
        warmup=not dry,
    )
    return sum(len(output.generated_tokens) for output in outputs.values())


if __name__ == "__main__":
    main()
