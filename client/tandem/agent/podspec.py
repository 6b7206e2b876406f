"""Reading a pod's spec: its containers in starting order, and what they are to each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from tandem.agent.lifecycle import Kind, Policy

Spec: TypeAlias = Mapping[str, Any]

DEFAULT_GRACE_S = 30


def containers(pod: Spec) -> list[tuple[Kind, Policy, dict[str, Any]]]:
    """Every container with its part and its restart policy; init containers come first."""
    spec = pod["spec"]
    policy = Policy(spec.get("restartPolicy") or "Always")
    found = []
    for container in spec.get("initContainers") or []:
        if container.get("restartPolicy") == "Always":
            found.append((Kind.SIDECAR, Policy.ALWAYS, container))
        else:
            found.append((Kind.INIT, policy, container))
    return [*found, *((Kind.MAIN, policy, container) for container in spec["containers"])]


def grace_s(pod: Spec) -> float:
    """How long the pod's containers may take to end."""
    given = pod["spec"].get("terminationGracePeriodSeconds")
    return float(DEFAULT_GRACE_S if given is None else given)


def full_name(pod: Spec) -> str:
    """NAME_NAMESPACE(UID), as a kubelet's messages call a pod."""
    metadata = pod["metadata"]
    return f"{metadata['name']}_{metadata['namespace']}({metadata['uid']})"


def is_over(pod: Spec) -> bool:
    """Whether the pod has reached its last phase."""
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
