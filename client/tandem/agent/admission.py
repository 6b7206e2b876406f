"""Whether this node can run a pod that was bound to it: a kubelet's last check.

The scheduler knows all this, but a pod may name its node itself, and two binds may race.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from tandem.agent.quantity import parse

Pod: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a pod is refused, in the words of a kubelet."""

    reason: str
    message: str


def requests(pod: Pod) -> dict[str, int]:
    """What a pod asks for: milli-CPU, bytes of memory, whole other resources.

    Containers run side by side with sidecars; init containers before them: the larger counts.
    """
    spec = pod["spec"]
    running: dict[str, int] = {}
    peak: dict[str, int] = {}
    for container in spec.get("initContainers") or []:
        sizes = _container_requests(container)
        if container.get("restartPolicy") == "Always":
            running = _sum(running, sizes)
            peak = _larger(peak, running)
        else:
            peak = _larger(peak, _sum(running, sizes))
    for container in spec["containers"]:
        running = _sum(running, _container_requests(container))
    return _sum(_larger(peak, running), {"pods": 1})


def refuse(
    pod: Pod, others: Iterable[Pod], capacity: Mapping[str, str], labels: Mapping[str, str]
) -> Refusal | None:
    """The first reason not to run `pod` beside `others`; None when it fits."""
    if not _selected(pod, labels):
        return Refusal(
            "NodeAffinity",
            "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector",
        )
    wanted = requests(pod)
    used: dict[str, int] = {}
    for other in others:
        used = _sum(used, requests(other))
    for name, size in wanted.items():
        limit = _size(name, capacity.get(name, "0"))
        if size and used.get(name, 0) + size > limit:
            return Refusal(
                f"OutOf{name}",
                f"Node didn't have enough resource: {name}, requested: {size}, "
                f"used: {used.get(name, 0)}, capacity: {limit}",
            )
    return None


def _container_requests(container: Mapping[str, Any]) -> dict[str, int]:
    resources = container.get("resources") or {}
    sizes = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
    return {name: _size(name, size) for name, size in sizes.items()}


def _size(name: str, text: str) -> int:
    return math.ceil(parse(text) * (1000 if name == "cpu" else 1))


def _sum(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in {**a, **b}}


def _larger(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {name: max(a.get(name, 0), b.get(name, 0)) for name in {**a, **b}}


def _selected(pod: Pod, labels: Mapping[str, str]) -> bool:
    """Whether the node has what the pod's nodeSelector and required node affinity demand."""
    spec = pod["spec"]
    selector = spec.get("nodeSelector") or {}
    if any(labels.get(key) != value for key, value in selector.items()):
        return False
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if not required:
        return True
    terms = required["nodeSelectorTerms"]
    return any(
        all(_matches(rule, labels) for rule in term.get("matchExpressions") or [])
        and all(_matches(rule, labels) for rule in term.get("matchFields") or [])
        for term in terms
    )


def _matches(rule: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    value = labels.get(rule["key"])
    values: Sequence[str] = rule.get("values") or []
    match rule["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt":
            return value is not None and int(value) > int(values[0])
        case "Lt":
            return value is not None and int(value) < int(values[0])
    return False
