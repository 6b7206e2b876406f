"""`tandem explain fleet/NAME`: why a fleet's pools have the sizes that they have.

Everything shown is in the statuses of the fleet and its Pools: the operator need not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer

from tandem.kubectl import Fleet, Namespace, attempt, console, fleet_name, get_json


@dataclass(frozen=True)
class Explained:
    """One pool."""

    pool: str
    head: str
    """Its size, and who decides it."""
    decisions: tuple[str, ...]
    """One line each, newest first."""


def explained(fleet: dict[str, Any], pools: Sequence[dict[str, Any]]) -> list[Explained]:
    """Every pool of the fleet, from the objects."""
    return [_explained(fleet, pool) for pool in sorted(pools, key=lambda p: p["metadata"]["name"])]


def _explained(fleet: dict[str, Any], pool: dict[str, Any]) -> Explained:
    name, status = pool["metadata"]["name"], pool.get("status") or {}
    field = "prefill" if pool["spec"]["role"] == "prefill" else "decode"
    template = fleet["spec"].get(field) or {}
    scaling = status.get("scaling") or {}
    head = (
        f"{pool['spec']['replicas']} replicas, {status.get('readyReplicas', 0)} ready; "
        f"{_owner(field, template)}"
    )
    if now := scaling.get("schedule"):
        head += f", and between {now['minReplicas']} and {now['maxReplicas']} by its schedule "
        head += now["name"]
    if until := scaling.get("standsBackUntil"):
        head += f"; stands back until {until}, since somebody else wrote the size"
    lines = tuple(_line(field, entry) for entry in reversed(scaling.get("decisions", ())))
    return Explained(name, head, lines)


def _owner(field: str, template: dict[str, Any]) -> str:
    if "replicas" in template:
        return f"fixed by spec.{field}.replicas"
    if "scaling" not in template:
        return "set by whoever writes the Pool's size"
    bounds = template["scaling"]
    policy = (bounds.get("policyRef") or {}).get("name")
    by = f"ScalingPolicy {policy}" if policy else "the defaults of a ScalingPolicy"
    return f"autoscaled between {bounds.get('minReplicas', 1)} and {bounds['maxReplicas']} by {by}"


def _line(field: str, entry: dict[str, Any]) -> str:
    unit = "tokens/s" if field == "prefill" else "streams"
    load = f"{entry['demand']} {unit}, {entry['needPercent'] / 100:g} times the "
    load += f"{entry['capacity']} of a replica"
    parts = [
        load if entry["capacity"] else "what a replica can do is not learned yet",
        f"growth {entry['growthPercent'] / 100:g} in the {entry['startupSeconds']} s of a start",
        f"{entry['ready']} ready and {entry['starting']} starting",
    ]
    if (latency := entry.get("latencyMilliseconds")) is not None:
        parts.append(f"{latency} ms of {entry['targetMilliseconds']} ms")
    if limit := entry.get("limitedBy"):
        parts.append(f"limited by {limit}")
    if schedule := entry.get("schedule"):
        parts.append(f"in schedule {schedule}")
    shadow = " (not carried out)" if entry.get("shadow") else ""
    sizes = f"{entry['replicasBefore']} -> {entry['replicas']}{shadow}"
    return f"{entry['time']}  {sizes}  {entry['reason']}: {'; '.join(parts)}"


def explain(fleet: Fleet, namespace: Namespace = None) -> None:
    """Why a fleet's pools have the sizes that they have: the last decisions and their inputs."""
    name = fleet_name(fleet)
    body = attempt(lambda: get_json(namespace, f"inferencefleet/{name}"))
    selector = f"tandem.dev/fleet={name}"
    pools = attempt(lambda: get_json(namespace, "pools", "--selector", selector))
    conditions = (body.get("status") or {}).get("conditions", ())
    for condition in conditions:
        if condition["type"] == "ScalingActive":
            said = f"{condition['status']}, {condition['reason']}: {condition['message']}"
            console.print(f"ScalingActive is {said}")
    for pool in explained(body, pools["items"]):
        console.print(f"\n[bold]{pool.pool}[/bold]: {pool.head}")
        for line in pool.decisions:
            console.print(f"  {line}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("explain")(explain)
