"""The downward API: a pod's own fields and resources as text, for env and volumes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, TypeAlias

from tandem.agent.quantity import parse

Pod: TypeAlias = Mapping[str, Any]

_SUBSCRIPT: Final = re.compile(r"metadata\.(labels|annotations)\['([^']*)'\]")


class FieldError(Exception):
    """A field that does not exist or is not to be had; the message says which."""


@dataclass(frozen=True, slots=True)
class Host:
    """What of the node a pod may ask for."""

    node: str
    node_ip: str
    cpus: int
    memory_bytes: int


def field(pod: Pod, pod_ip: str, host: Host, path: str) -> str:
    """The text of `fieldRef.fieldPath`.

    Raises:
        FieldError: the path is not one of the downward API's.
    """
    metadata, spec = pod["metadata"], pod["spec"]
    subscript = _SUBSCRIPT.fullmatch(path)
    if subscript:
        return str((metadata.get(subscript[1]) or {}).get(subscript[2], ""))
    simple = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "spec.nodeName": host.node,
        "spec.serviceAccountName": spec.get("serviceAccountName", ""),
        "status.podIP": pod_ip,
        "status.podIPs": pod_ip,
        "status.hostIP": host.node_ip,
        "status.hostIPs": host.node_ip,
    }
    if path in simple:
        return str(simple[path])
    if path in ("metadata.labels", "metadata.annotations"):
        table = metadata.get(path.removeprefix("metadata.")) or {}
        return "\n".join(f"{key}={_quoted(table[key])}" for key in sorted(table))
    raise FieldError(f"unsupported fieldPath: {path}")


def resource(container: Mapping[str, Any], host: Host, reference: Mapping[str, Any]) -> str:
    """The text of a `resourceFieldRef`, in units of its divisor, rounded up.

    A limit that is not set reads as what the node has, as a kubelet gives it.

    Raises:
        FieldError: the resource is not one of the downward API's.
    """
    name = reference["resource"]
    group, _, kind = name.partition(".")
    if group not in ("limits", "requests") or not kind:
        raise FieldError(f"unsupported resource: {name}")
    resources = container.get("resources") or {}
    size = (resources.get(group) or {}).get(kind)
    if size is None and group == "requests":
        size = (resources.get("limits") or {}).get(kind)
    if size is None:
        allocatable = {"cpu": host.cpus, "memory": host.memory_bytes}
        size = allocatable.get(kind, 0) if group == "limits" else 0
    divisor = parse(reference.get("divisor") or "0") or Fraction(1)
    return str(math.ceil(parse(size) / divisor))


def _quoted(text: str) -> str:
    """Go's %q, as the kubelet writes labels and annotations into files."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(escapes.get(letter, letter) for letter in text) + '"'
