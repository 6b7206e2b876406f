"""Time to first token of questions to a document of 4,096 tokens: cold, and from each cache tier.

    .venv/bin/python -m benchmarks.context_cache [--quick] [--without-vllm]

SmolLM2-135M in bfloat16 on two threads, deterministic, one pod at a time, asked over HTTP. A pod
has one tier beside an accelerator cache that holds one document; two documents take turns, so that
each question's document has left the accelerator. For the tier of peers a second pod holds both,
and a gateway says so. Then every pod is killed by SIGKILL, and a new one answers from what is left.
vLLM answers the same prompts offline, from its own prefix cache.
Then 200 contexts of four tenants on one engine with memory for 50 (tenants.py).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.context_cache import tenants
from benchmarks.context_cache.client import Answer, ask, median_s, tier_counts, wait_stored
from benchmarks.context_cache.documents import DOCUMENT_TOKENS, Library
from benchmarks.context_cache.peers import neighbours
from benchmarks.context_cache.valkey import valkey_server
from benchmarks.engine_cpu.players import Player, vllm
from benchmarks.engine_cpu.pod import pod
from benchmarks.fleet import note
from benchmarks.report import Target, finish

PAGES: Final = DOCUMENT_TOKENS // 256
POOL: Final = f"--kv-cache-bytes={98 << 20}"
"""Holds a document, a question and its answer, and little more of the document before."""
SHARES: Final = {"accelerator": 0.04, "memory": 0.06, "disk": 0.10, "remote": 0.15, "peer": 0.15}
"""Of the cold time to first token, at most."""
VLLM_SCRIPT: Final = Path(__file__).with_name("play_vllm.py")


@dataclass
class Measured:
    """All answers, by where the document's KV came from."""

    answers: dict[str, list[Answer]] = field(default_factory=dict)
    restarted: dict[str, Answer] = field(default_factory=dict)
    """The first answer after every pod was killed."""
    vllm_s: dict[str, list[float]] = field(default_factory=dict)
    differing: list[str] = field(default_factory=list)
    """Answers that were not the cold one's."""


class Bench:
    """Runs the parts one after the other.

    Args:
        cold: questions that are answered cold.
        questions: those for each tier; the two documents take turns.
        accelerator_questions: to the first document alone.
    """

    def __init__(self, cold: int, questions: int, accelerator_questions: int) -> None:
        library = Library()
        self.documents = [library.document(seed) for seed in (1, 2)]
        self.questions = [library.question(n) for n in range(accelerator_questions)]
        self.turns = [(n % 2, n // 2) for n in range(questions)]
        """(document, question): the documents take turns."""
        self.cold_turns = self.turns[:cold]
        self.found = Measured()
        self._cold: dict[tuple[int, int], str] = {}

    def prompt(self, document: int, question: int) -> list[int]:
        return self.documents[document] + self.questions[question]

    def cold(self) -> None:
        """A pod without tiers; each prompt under a salt of its own, so that nothing is known."""
        with pod() as serving:
            ask(serving.url, self.prompt(0, 0)[:300], "warm")
            answers: list[Answer] = []
            for document, question in self.cold_turns:
                salt = f"{document} {question}" if answers else ""
                answers.append(ask(serving.url, self.prompt(document, question), salt))
                self._cold[document, question] = answers[-1].text
                assert answers[-1].cached_tokens == 0
            self.found.answers["cold"] = answers
            note(f"cold: {median_s(answers):.2f} s")
            self._ask("accelerator", serving.url, [(0, n) for n in range(len(self.questions))])

    def tier(self, name: str, *flags: str, source: tuple[str, ...] = (), survives: bool) -> None:
        """A pod with one tier, which is filled from the tier that `source` names."""
        with pod(POOL, *flags, *source) as serving:
            for document in (0, 1):
                ask(serving.url, self.prompt(document, 0))
                wait_stored(serving.url, name, (document + 1) * PAGES)
            before = tier_counts(serving.url)
            self._ask(name, serving.url, self.turns)
            self._check_hits(name, serving.url, before)
            serving.kill()
        if survives:
            with pod(POOL, *flags) as serving:
                answer = ask(serving.url, self.prompt(0, 0))
                self.found.restarted[name] = answer
                self._compare(f"{name} after SIGKILL", (0, 0), answer)
                note(f"{name} after SIGKILL: {answer.cached_tokens} tokens cached")

    def peer(self, *source: str) -> None:
        """A pod with no other tier, beside one that holds both documents on its accelerator."""

        def fill(url: str) -> None:
            for document in (0, 1):
                ask(url, self.prompt(document, 0))

        with neighbours((POOL,), source, fill, 2 * PAGES) as pods:
            self._ask("peer", pods.url, self.turns)
            self._check_hits("peer", pods.asking.url, {})

    def _check_hits(self, name: str, url: str, before: dict[tuple[str, str], float]) -> None:
        key = (name, "hit_tokens_total")
        hits = tier_counts(url)[key] - before.get(key, 0)
        # Of the document before the last one the accelerator still holds a few blocks.
        assert hits >= 0.9 * len(self.turns) * DOCUMENT_TOKENS, (hits, before)

    def _ask(self, name: str, url: str, turns: Sequence[tuple[int, int]]) -> None:
        answers = []
        for turn in turns:
            answers.append(ask(url, self.prompt(*turn)))
            assert answers[-1].cached_tokens >= DOCUMENT_TOKENS, f"{name}: {answers[-1]}"
            self._compare(name, turn, answers[-1])
        self.found.answers[name] = answers
        note(f"{name}: {median_s(answers):.3f} s")

    def _compare(self, name: str, turn: tuple[int, int], answer: Answer) -> None:
        if self._cold.setdefault(turn, answer.text) != answer.text:
            self.found.differing.append(f"{name}, document and question {turn}")

    def vllm(self, player: Player) -> None:
        """The same prompts, cold and warm."""

        def took_s(turn: tuple[int, int], *, forget: bool) -> float:
            return player.ask({"ids": self.prompt(*turn), "forget": forget})

        took_s((0, 0), forget=True)  # warm
        self.found.vllm_s["cold"] = [took_s(turn, forget=True) for turn in self.cold_turns]
        took_s((0, 0), forget=True)
        warm = range(len(self.questions))
        self.found.vllm_s["accelerator"] = [took_s((0, n), forget=False) for n in warm]
        note(f"vLLM: {median(self.found.vllm_s['cold']):.2f} s cold")


def run(bench: Bench, *, with_vllm: bool) -> None:
    """All parts; vLLM last, so that it runs beside nothing."""
    bench.cold()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        uri = stack.enter_context(valkey_server())
        remote = f"--remote-tier-uri={uri}"
        bench.tier("remote", remote, survives=True)
        bench.peer(remote)
        bench.tier("memory", "--memory-tier-size=1Gi", source=(remote,), survives=False)
        disk = (f"--disk-tier-dir={folder}", "--disk-tier-size=2Gi")
        bench.tier("disk", *disk, source=(remote,), survives=True)
    if with_vllm:
        player = vllm(VLLM_SCRIPT)
        try:
            bench.vllm(player)
        finally:
            player.end()


def shares(found: Measured) -> dict[str, float]:
    """Median time to first token of each tier, as a share of cold."""
    cold_s = median_s(found.answers["cold"])
    return {name: median_s(found.answers[name]) / cold_s for name in SHARES}


def targets_of(found: Measured, contexts: dict[str, Any]) -> list[Target]:
    targets = [
        Target(f"{name} / cold", round(share, 4), SHARES[name])
        for name, share in shares(found).items()
    ]
    cached = [answer.cached_tokens for answer in found.restarted.values()]
    targets += [
        Target("answers that differ from cold", len(found.differing), 0),
        Target("tokens cached after SIGKILL", min(cached), DOCUMENT_TOKENS, "at least"),
        Target("times that a tenant was below its floor", contexts["below_floor"], 0),
    ]
    return targets


def show(found: Measured) -> None:
    """The table for people."""
    table = Table(title="time to first token, ms (median, range) and share of cold")
    for column in ("KV from", "tandem", "of cold", "vLLM", "of cold"):
        table.add_column(column, justify="left" if column == "KV from" else "right")
    cold_s = median_s(found.answers["cold"])
    for name, answers in found.answers.items():
        ours = [answer.ttft_s for answer in answers]
        theirs = found.vllm_s.get(name, [])
        share = f"{median(ours) / cold_s:.1%}"
        peers = f"{median(theirs) / median(found.vllm_s['cold']):.1%}" if theirs else ""
        table.add_row(name, _range_ms(ours), share, _range_ms(theirs), peers)
    Console(file=sys.stderr).print(table)


def _range_ms(found_s: Sequence[float]) -> str:
    if not found_s:
        return ""
    found = [1e3 * s for s in found_s]
    return f"{median(found):.0f} ({min(found):.0f}..{max(found):.0f})"


def results_of(found: Measured, contexts: dict[str, Any]) -> dict[str, Any]:
    return {
        "ttft_ms": {
            name: [round(1e3 * answer.ttft_s, 1) for answer in answers]
            for name, answers in found.answers.items()
        },
        "shares_of_cold": {name: round(share, 4) for name, share in shares(found).items()},
        "vllm_ttft_ms": {
            name: [round(1e3 * s, 1) for s in times] for name, times in found.vllm_s.items()
        },
        "after_sigkill": {
            name: {"ttft_ms": round(1e3 * a.ttft_s, 1), "cached_tokens": a.cached_tokens}
            for name, a in found.restarted.items()
        },
        "differing": found.differing,
        "load_average": os.getloadavg(),
        "contexts": contexts,
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few questions; no result file")
    parser.add_argument("--without-vllm", action="store_true", help="no result file")
    options = parser.parse_args()
    bench = Bench(*((1, 4, 4) if options.quick else (6, 20, 50)))
    run(bench, with_vllm=not options.without_vllm)
    show(bench.found)
    contexts = tenants.measure(requests=60 if options.quick else 400)
    note(json.dumps(contexts))
    save = not (options.quick or options.without_vllm)
    finish(
        "context_cache",
        targets_of(bench.found, contexts),
        results_of(bench.found, contexts),
        ("torch", "numba", "valkey"),
        save=save,
    )


if __name__ == "__main__":
    main()
