"""A partial pod template laid over ours: maps deep, lists by name or mountPath, the rest replaced.

One list is added to: the arguments of the container that serves, of which the last one counts,
unless the template replaces its command too.

What Tandem depends on (its labels, its environment variables, the grace period) cannot be set by a
template; `refusal` says so before anything is rendered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tandem_runtime.contract import CONTAINER, ENV_MODEL_CACHE

# Two mounts may share a volume and so a name: where they are comes first.
_KEYS = ("mountPath", "name")
_OWN_PREFIXES = ("tandem.dev/",)
_OWN_LABELS = ("app.kubernetes.io/managed-by", "app.kubernetes.io/component")
_ALLOWED_ANNOTATIONS = ("tandem.dev/restartedAt",)
_OWN_ENVIRONMENT = "TANDEM_"
_ALLOWED_ENVIRONMENT = (ENV_MODEL_CACHE,)
"""A user may keep fetched weights on a volume that outlives the pod."""
_OWN_FLAGS = (
    "--role", "--model-name", "--model-uri", "--served-name", "--device", "--tensor-parallel",
    "--host", "--port", "--grpc-port", "--handoff-port", "--handoff-secret-file",
)  # fmt: skip
"""What the operator, gateways and other pods rely on."""
_NAMED = ("containers", "initContainers", "volumes")


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
        items[item[key]] = _merge_items(below, item) if below is not None else item
    return list(items.values())


def _merge_items(below: Mapping[str, Any], item: Mapping[str, Any]) -> dict[str, Any]:
    merged = merge(below, item)
    if item.get("name") == CONTAINER and _adds_arguments(item):
        merged["args"] = [*below.get("args", ()), *item["args"]]
    return merged


def _adds_arguments(container: Mapping[str, Any]) -> bool:
    return isinstance(container.get("args"), list) and "command" not in container


def _has(item: object, key: str) -> bool:
    return isinstance(item, Mapping) and isinstance(item.get(key), str)


def refusal(template: Mapping[str, Any], where: str) -> str | None:
    """A sentence for a template that cannot be merged or sets what is ours, else None.

    `where` names its field.
    """
    return _misshapen(template, where) or _takes_ours(template, where)


def _misshapen(template: Mapping[str, Any], where: str) -> str | None:
    """A sentence for a part that would replace ours instead of being laid over it.

    The schema lets any object through, and the API server sees only the merged pod.
    """
    objects = _objects(template, where, {"metadata": ("labels", "annotations"), "spec": ()})
    if objects:
        return objects
    spec = template.get("spec", {})
    lists = _lists(spec, f"{where}.spec", {k: "name" for k in _NAMED})
    if lists:
        return lists
    for container in spec.get("containers", ()):
        path = f"{where}.spec.containers[{container['name']}]"
        keyed = {"env": "name", "volumeMounts": "mountPath"}
        # An unnamed port replaces ours, and the probes go to the port that is named http.
        keyed |= {"ports": "name"} if container["name"] == CONTAINER else {}
        arguments = container.get("args", [])
        if not isinstance(arguments, list) or not all(isinstance(a, str) for a in arguments):
            return f'{path}.args must be a list of strings, such as ["--max-running", "32"]'
        found = _objects(container, path, {"resources": ("limits",)})
        found = found or _lists(container, path, keyed)
        if found:
            return found
    return None


def _objects(
    within: Mapping[str, Any], where: str, parts: Mapping[str, Sequence[str]]
) -> str | None:
    """A sentence for a field, or a field of it, that is there and no object."""
    for key, inner in parts.items():
        if key not in within:
            continue
        if not isinstance(within[key], Mapping):
            return f"{where}.{key} must be an object: write its fields below it, or remove it"
        found = _objects(within[key], f"{where}.{key}", dict.fromkeys(inner, ()))
        if found:
            return found
    return None


def _lists(within: Mapping[str, Any], where: str, keys: Mapping[str, str]) -> str | None:
    """A sentence for a list that is there and has items without their key."""
    for field, key in keys.items():
        items = within.get(field, [])
        if not isinstance(items, list) or not all(_has(item, key) for item in items):
            ours = f" (the one that serves is {CONTAINER})" if field == "containers" else ""
            return (
                f"{where}.{field} must be a list of objects that each have a {key}{ours}: "
                f"lists are merged by it; write the missing {key}"
            )
    return None


def _takes_ours(template: Mapping[str, Any], where: str) -> str | None:
    metadata, spec = template.get("metadata", {}), template.get("spec", {})
    for key in metadata.get("labels", ()):
        if key in _OWN_LABELS or key.startswith(_OWN_PREFIXES):
            return f"{where}.metadata.labels sets {key}, which belongs to Tandem: remove it"
    for key in metadata.get("annotations", ()):
        if key.startswith(_OWN_PREFIXES) and key not in _ALLOWED_ANNOTATIONS:
            return f"{where}.metadata.annotations sets {key}, which belongs to Tandem: remove it"
    if "terminationGracePeriodSeconds" in spec:
        return (
            f"{where}.spec.terminationGracePeriodSeconds follows from the fleet's "
            "disruption.drainTimeoutSeconds: remove it and set that"
        )
    for container in spec.get("containers", ()):
        if container["name"] == CONTAINER and _adds_arguments(container):
            flags = [str(word).split("=", 1)[0] for word in container["args"]]
            ours = next((flag for flag in flags if flag in _OWN_FLAGS), None)
            if ours is not None:
                return f"{where} gives the argument {ours}, which belongs to Tandem: remove it"
        for entry in container.get("env", ()) if container["name"] == CONTAINER else ():
            name = entry["name"]
            if name.startswith(_OWN_ENVIRONMENT) and name not in _ALLOWED_ENVIRONMENT:
                return (
                    f"{where} sets the environment variable {name}, which belongs to Tandem: "
                    "remove it"
                )
    return None
