"""A partial pod template laid over ours: maps deep, lists by name or mountPath, the rest replaced.

What Tandem depends on (its labels, its environment variables, the grace period) cannot be set by a
template; `refusal` says so before anything is rendered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tandem_runtime.contract import CONTAINER

# Two mounts may share a volume and so a name: where they are comes first.
_KEYS = ("mountPath", "name")
_OWN_PREFIXES = ("tandem.dev/",)
_OWN_LABELS = ("app.kubernetes.io/managed-by", "app.kubernetes.io/component")
_ALLOWED_ANNOTATIONS = ("tandem.dev/restartedAt",)
_OWN_ENVIRONMENT = "TANDEM_"


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`override` laid over `base`; neither is changed."""
    merged = dict(base)
    for key, value in override.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(below, value)
        elif isinstance(below, Sequence) and isinstance(value, Sequence):
            merged[key] = _merge_lists(below, value)
        else:
            merged[key] = value
    return merged


def _merge_lists(base: Any, override: Any) -> Any:
    """Items with the same name (or mountPath) are merged in place, new ones appended.

    A list whose items have neither is replaced, as is a string.
    """
    if isinstance(base, str) or isinstance(override, str):
        return override
    key = next((k for k in _KEYS if all(_has(item, k) for item in [*base, *override])), None)
    if key is None:
        return override
    items = {item[key]: item for item in base}
    for item in override:
        below = items.get(item[key])
        items[item[key]] = merge(below, item) if below is not None else item
    return list(items.values())


def _has(item: object, key: str) -> bool:
    return isinstance(item, Mapping) and key in item


def refusal(template: Mapping[str, Any], where: str) -> str | None:
    """A sentence for a template that sets what is ours, else None. `where` names its field."""
    metadata, spec = template.get("metadata") or {}, template.get("spec") or {}
    for key in metadata.get("labels") or {}:
        if key in _OWN_LABELS or key.startswith(_OWN_PREFIXES):
            return f"{where}.metadata.labels sets {key}, which belongs to Tandem: remove it"
    for key in metadata.get("annotations") or {}:
        if key.startswith(_OWN_PREFIXES) and key not in _ALLOWED_ANNOTATIONS:
            return f"{where}.metadata.annotations sets {key}, which belongs to Tandem: remove it"
    if "terminationGracePeriodSeconds" in spec:
        return (
            f"{where}.spec.terminationGracePeriodSeconds follows from the fleet's "
            "disruption.drainTimeoutSeconds: remove it and set that"
        )
    for container in spec.get("containers") or ():
        if not isinstance(container, Mapping) or container.get("name") != CONTAINER:
            continue
        for entry in container.get("env") or ():
            name = str(entry.get("name", "")) if isinstance(entry, Mapping) else ""
            if name.startswith(_OWN_ENVIRONMENT):
                return f"{where} sets the environment variable {name}, which belongs to Tandem"
    return None
