"""A client that asks a pod over HTTP, streaming, and what the pod counts."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import aiohttp

from benchmarks.engine_cpu.pod import NAME

OUTPUT_TOKENS: Final = 16
_STORED_S: Final = 120.0


@dataclass(frozen=True)
class Answer:
    """To one prompt."""

    ttft_s: float
    """From the request to the first text, where the client is."""
    text: str
    cached_tokens: int


def ask(url: str, prompt: Sequence[int], salt: str = "") -> Answer:
    """One greedy answer of a few tokens."""
    return asyncio.run(_ask(url, prompt, salt))


async def _ask(url: str, prompt: Sequence[int], salt: str) -> Answer:
    body = {
        "model": NAME,
        "prompt": list(prompt),
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"cache_salt": salt} if salt else {}),
    }
    text, first_s, cached = "", 0.0, 0
    async with aiohttp.ClientSession() as session:
        begun_s = time.perf_counter()
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.content:
                data = line.strip().removeprefix(b"data: ")
                if not data.startswith(b"{"):
                    continue
                event = json.loads(data)
                for choice in event["choices"]:
                    first_s = first_s or time.perf_counter()
                    text += choice["text"]
                details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
                cached = details.get("cached_tokens", cached)
    return Answer(first_s - begun_s, text, cached)


def tier_counts(url: str) -> dict[tuple[str, str], float]:
    """`tandem_tier_*` of a pod: (tier, metric and what) -> value, summed over the other labels."""
    found: dict[tuple[str, str], float] = {}
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    for line in lines:
        if not line.startswith("tandem_tier_") or 'tier="' not in line:
            continue
        name, _, value = line.rpartition(" ")
        metric, _, labels = name.rstrip("}").partition("{")
        known = dict(label.split("=", 1) for label in labels.split(","))
        what = f"{metric.removeprefix('tandem_tier_')} {known.get('what', '').strip(chr(34))}"
        key = (known["tier"].strip('"'), what.strip())
        found[key] = found.get(key, 0.0) + float(value)
    return found


def wait_stored(url: str, tier: str, pages: int) -> None:
    """Until a tier has been given so many."""
    deadline_s = time.monotonic() + _STORED_S
    while tier_counts(url).get((tier, "pages_total stored"), 0) < pages:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"the {tier} tier keeps too little: {tier_counts(url)}")
        time.sleep(0.1)


def median_s(answers: Sequence[Answer]) -> float:
    return median(answer.ttft_s for answer in answers)
