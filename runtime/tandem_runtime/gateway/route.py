"""Which pods serve a stream. Pure: pods and their load in, a pair or a sentence out.

Prefill and decode pods pair within one revision. A revision takes part once it has a decode pod
and, in a fleet with a prefill pool, a prefill pod that admit; when no revision has both, decode
pods compute prompts themselves (docs/design/request-path.md).

Each pod has a cost in tokens: what is outstanding on it, and what this prompt adds beyond the
prefix that it probably holds. What another pod would give it costs some percent of computing it.
The cheapest wins: a held prefix draws a stream as long as the pod's queue is not longer than what
the prefix saves. On a pod that is slower by some percent every token costs so much more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from zlib import crc32

from tandem_runtime.contract import Role
from tandem_runtime.gateway.pods import PodView


@dataclass(frozen=True)
class Demand:
    """What a stream asks for."""

    stream_id: str
    prompt_tokens: int
    held_tokens: Mapping[str, int] = field(default_factory=dict)
    """By pod uid: tokens of the prompt's beginning that the pod says, or is guessed, to hold."""
    told_tokens: Mapping[str, int] = field(default_factory=dict)
    """The same, as far as pods say it themselves: what they can give to others."""
    peer_percent: Mapping[str, int] = field(default_factory=dict)
    """By pod uid: what a token that another pod gives costs; nothing for those that take none."""
    avoid: Set[str] = frozenset()
    """Uids of pods that failed this stream."""


@dataclass(frozen=True)
class Pair:
    decode: PodView
    prefill: PodView | None
    """None: the decode pod computes the prompt itself."""


@dataclass(frozen=True)
class NoRoute:
    reason: str
    """A sentence."""


def choose(
    pods: Sequence[PodView], demand: Demand, outstanding_tokens: Mapping[str, int]
) -> Pair | NoRoute:
    """`pods`: those of one fleet whose models are equal. `outstanding_tokens`: by uid."""

    lent: dict[str, int] = {}
    for pod in pods:
        if pod.ready:
            told = demand.told_tokens.get(pod.uid, 0)
            lent[pod.revision] = max(lent.get(pod.revision, 0), told)

    def cost(pod: PodView) -> tuple[int, int]:
        held = demand.held_tokens.get(pod.uid, 0)
        new = demand.prompt_tokens - held
        # What a decode pod is handed comes from its prefill pod, whoever else has it.
        if pod.role is not Role.DECODE and pod.uid in demand.peer_percent:
            given = max(lent.get(pod.revision, 0) - held, 0)
            new -= given * (100 - demand.peer_percent[pod.uid]) // 100
        # Among equals, streams spread: each pod has its own order of preference.
        spread = crc32(f"{demand.stream_id}/{pod.uid}".encode())
        tokens = outstanding_tokens.get(pod.uid, 0) + new
        return tokens * (100 + pod.slower_percent) // 100, spread

    admitting = [pod for pod in pods if pod.admits and pod.uid not in demand.avoid]
    decoders = [pod for pod in admitting if pod.decodes]
    if not decoders:
        return NoRoute(_why_none(pods, demand))
    prefills = [pod for pod in admitting if pod.role is Role.PREFILL]
    pairable = {pod.revision for pod in prefills}
    paired = [pod for pod in decoders if pod.role is Role.BOTH or pod.revision in pairable]
    decode = min(paired or decoders, key=cost)
    partners = [
        pod for pod in prefills if pod.revision == decode.revision and decode.role is not Role.BOTH
    ]
    return Pair(decode, min(partners, key=cost) if partners else None)


def most_held(
    pods: Sequence[PodView], pages: Mapping[str, int], outstanding_tokens: Mapping[str, int]
) -> PodView | None:
    """The pod with most leading pages of a prompt, the least busy one of equals; None if nobody has
    any. One that is leaving can still give them."""
    holding = [pod for pod in pods if pod.ready and pages.get(pod.uid, 0) > 0]
    if not holding:
        return None
    return max(holding, key=lambda pod: (pages[pod.uid], -outstanding_tokens.get(pod.uid, 0)))


def _why_none(pods: Sequence[PodView], demand: Demand) -> str:
    decoders = [pod for pod in pods if pod.decodes]
    if not decoders:
        return "it has no pod that decodes"
    ready = sum(pod.ready for pod in decoders)
    leaving = sum(pod.leaving for pod in decoders)
    failed = sum(pod.uid in demand.avoid for pod in decoders)
    counts = [f"{ready} of {len(decoders)} decode pods are ready"]
    if leaving:
        counts.append(f"{leaving} are leaving")
    if failed:
        counts.append(f"{failed} failed this request")
    return ", ".join(counts)
