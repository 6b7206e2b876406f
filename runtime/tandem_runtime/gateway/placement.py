"""Which pods keep which contexts. Pure: contexts, pods and their copies in, what to send out.

Contexts belong where prompts are computed: on prefill pods, or where a revision has none, on those
that decode. Pods that have a context go on; new ones are found by rendezvous hashing, so that
gateways that decide at the same time decide alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b

from tandem_runtime.contract import Role
from tandem_runtime.gateway.pods import PodView
from tandem_runtime.protocol import Context, ContextCopy

Copies = Mapping[str, Mapping[str, ContextCopy]]
"""By uid of a pod and id of a context."""


def keepers(context: Context, pods: Sequence[PodView], copies: Copies) -> list[PodView]:
    """The pods that are to keep it: its number of copies for each revision of its fleet.

    `pods`: those that can be asked now.
    """
    members = [pod for pod in pods if pod.fleet == context.fleet and pod.admits]
    chosen = []
    for revision in sorted({pod.revision for pod in members}):
        able = [pod for pod in members if pod.revision == revision]
        prefill = [pod for pod in able if pod.role is Role.PREFILL]
        ranked = sorted(prefill or able, key=lambda pod: _rank(context, pod, copies))
        chosen += ranked[: context.copies]
    return chosen


def _rank(context: Context, pod: PodView, copies: Copies) -> tuple[int, bytes]:
    copy = copies.get(pod.uid, {}).get(context.id)
    order = {"ready": 0, "building": 1, "failed": 3}
    lot = blake2b(f"{context.id}/{pod.uid}".encode(), digest_size=8).digest()
    return 2 if copy is None else order[copy.state], lot


def repairs(
    contexts: Iterable[Context], pods: Sequence[PodView], copies: Copies
) -> list[tuple[PodView, Context]]:
    """What has to be sent where: contexts that are missing, and newer versions of others."""
    found = []
    for context in contexts:
        wanted = set() if context.deleted else {p.uid for p in keepers(context, pods, copies)}
        for pod in pods:
            copy = copies.get(pod.uid, {}).get(context.id)
            if copy is None:
                outdated = pod.uid in wanted
            else:
                have = (copy.created_unix_s, copy.version)
                outdated = have < (context.created_unix_s, context.version)
            if outdated:
                found.append((pod, context))
    return found
