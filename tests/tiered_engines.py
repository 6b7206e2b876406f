"""Engines with cache tiers whose threads run beside, and prompts for them."""

from __future__ import annotations

import threading
from typing import Any

from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request, SampledToken
from tandem_runtime.protocol import Sampling


def ask(name: str, prompt: list[int], **changes: Any) -> Request:
    sampling = Sampling(max_tokens=5, temperature=0.8, seed=3, logprobs=1, ignore_eos=True)
    return Request(name, prompt, sampling, **changes)


def run(engine: Engine, request: Request) -> list[SampledToken]:
    """To its end, with the tiers' threads beside."""
    woken, tokens = threading.Event(), []
    if engine.tiers is not None:
        engine.tiers.wake = woken.set
    assert engine.add(request) is None
    while len(tokens) < request.sampling.max_tokens:
        if not engine.has_work:
            assert woken.wait(60), "the tiers hold the prompt"
            woken.clear()
        tokens += [s.token for s in engine.step().streams if s.token is not None]
    engine.check_integrity()
    return tokens
