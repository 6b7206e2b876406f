"""A container's environment, and the `$(VAR)` references in it, its command and its arguments."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

_REFERENCE: Final = re.compile(r"\$\$|\$\(([^()$]*)\)")
_KINDS: Final = {
    "configMapRef": "configmap",
    "configMapKeyRef": "configmap",
    "secretRef": "secret",
    "secretKeyRef": "secret",
}


class MissingSourceError(Exception):
    """A variable whose source is missing; the message says which object and key."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the variables of one container come from beside literal values."""

    config_maps: Mapping[str, Mapping[str, str] | None]
    """ConfigMaps of the pod's namespace by name; None for one that does not exist."""
    secrets: Mapping[str, Mapping[str, str] | None]
    """Decoded Secrets by name; None for one that does not exist."""
    field: Callable[[str], str]
    """`fields.field` of the pod."""
    resource: Callable[[Mapping[str, Any]], str]
    """`fields.resource` of the container."""


@dataclass(frozen=True, slots=True)
class References:
    """The names of the objects that a container's environment needs."""

    config_maps: frozenset[str]
    secrets: frozenset[str]


def references(container: Mapping[str, Any]) -> References:
    """What has to be fetched before `build`."""
    named: dict[str, set[str]] = {"configmap": set(), "secret": set()}
    sources = [entry.get("valueFrom") or {} for entry in container.get("env") or []]
    for source in [*(container.get("envFrom") or []), *sources]:
        for kind, noun in _KINDS.items():
            if kind in source:
                named[noun].add(source[kind]["name"])
    return References(frozenset(named["configmap"]), frozenset(named["secret"]))


def expand(text: str, env: Mapping[str, str]) -> str:
    """Replaces `$(NAME)`; `$$` is a dollar sign, an unknown name stays as it is written."""

    def replacement(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return env.get(match[1], match[0])

    return _REFERENCE.sub(replacement, text)


def build(
    container: Mapping[str, Any], given: Mapping[str, str], sources: Sources
) -> dict[str, str]:
    """The variables of a container: `given`, then envFrom, then env; later ones win.

    References see what stands before them, and `given`.

    Raises:
        MissingSourceError: a ConfigMap, Secret or key that is not optional is missing.
    """
    env = dict(given)
    for entry in container.get("envFrom") or []:
        env.update(_from_object(entry, sources))
    for entry in container.get("env") or []:
        value = _value(entry, env, sources)
        if value is not None:
            env[entry["name"]] = value
    return env


def argv(
    container: Mapping[str, Any], entrypoint: Iterable[str], env: Mapping[str, str]
) -> list[str]:
    """The command line: `command` replaces the image's entry point, `args` follow it."""
    command = container.get("command") or list(entrypoint)
    return [expand(word, env) for word in [*command, *(container.get("args") or [])]]


def _from_object(entry: Mapping[str, Any], sources: Sources) -> dict[str, str]:
    prefix = entry.get("prefix") or ""
    for kind, objects in (("configMapRef", sources.config_maps), ("secretRef", sources.secrets)):
        if reference := entry.get(kind):
            data = objects.get(reference["name"])
            if data is None and not reference.get("optional"):
                raise MissingSourceError(f'{_KINDS[kind]} "{reference["name"]}" not found')
            return {prefix + key: value for key, value in (data or {}).items()}
    return {}


def _value(entry: Mapping[str, Any], env: Mapping[str, str], sources: Sources) -> str | None:
    source = entry.get("valueFrom")
    if not source:
        return expand(entry.get("value") or "", env)
    if reference := source.get("fieldRef"):
        return sources.field(reference["fieldPath"])
    if reference := source.get("resourceFieldRef"):
        return sources.resource(reference)
    for kind, objects in (
        ("configMapKeyRef", sources.config_maps),
        ("secretKeyRef", sources.secrets),
    ):
        if reference := source.get(kind):
            return _key(kind, reference, objects.get(reference["name"]))
    raise MissingSourceError(f"variable {entry['name']}: unsupported valueFrom {sorted(source)}")


def _key(kind: str, reference: Mapping[str, Any], data: Mapping[str, str] | None) -> str | None:
    if data is not None and reference["key"] in data:
        return data[reference["key"]]
    if reference.get("optional"):
        return None
    name = f'{_KINDS[kind]} "{reference["name"]}"'
    if data is None:
        raise MissingSourceError(f"{name} not found")
    raise MissingSourceError(f"couldn't find key {reference['key']} in {name}")
