"""What players are asked, standard library alone: peers' environments run it too."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable


def prompts(requests: int, prompt_tokens: int, seed: int) -> list[list[int]]:
    """Random token ids: no two alike, so that no cache helps."""
    chance = random.Random(seed)
    return [[chance.randrange(1000, 40_000) for _ in range(prompt_tokens)] for _ in range(requests)]


def answer(play: Callable[[list[list[int]], int], float], lines: Iterable[str] = sys.stdin) -> None:
    """Play every shape that comes in: `play` gets prompts and output tokens and returns seconds."""
    for line in lines:
        shape = json.loads(line)
        asked = prompts(shape["requests"], shape["prompt_tokens"], shape["seed"])
        print(f"took_s {play(asked, shape['output_tokens']):.6f}", flush=True)
