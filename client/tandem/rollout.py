"""`tandem rollout status|history|undo|restart`: what `kubectl rollout` does for Deployments.

kubectl refuses custom kinds. Nothing here changes a spec: undo and restart are annotations on the
fleet (docs/design/revisions.md), so that a GitOps tool sees no drift.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.table import Table

from tandem.kubectl import (
    CommandFailed,
    Fleet,
    Namespace,
    attempt,
    console,
    fleet_name,
    get_json,
    kubectl,
)

app = typer.Typer(no_args_is_help=True, help="Follow and steer the rollouts of a fleet.")

ROLLBACK = "tandem.dev/rollback"
RESTARTED_AT = "tandem.dev/restartedAt"
POLL_S = 0.5


@dataclass(frozen=True)
class Revision:
    """One revision of a fleet."""

    name: str
    number: int
    created: str
    image: str
    model: str


@dataclass(frozen=True)
class Progress:
    """How a rollout stands."""

    done: bool
    stuck: bool
    sentence: str


# -- pure ------------------------------------------------------------------------------------------


def revisions(items: Sequence[dict[str, Any]]) -> list[Revision]:
    """A fleet's recorded revisions, newest first, from its pools' ControllerRevisions."""
    found: dict[str, Revision] = {}
    for item in items:
        labels, template = item["metadata"]["labels"], item["data"]["template"]
        name = labels["tandem.dev/revision"]
        containers = template["spec"]["containers"]
        image = next((c["image"] for c in containers if c["name"] == "runtime"), "")
        known = found.get(name)
        if known is None or item["revision"] > known.number:
            model = template["metadata"]["labels"].get("tandem.dev/model", "")
            created = item["metadata"]["creationTimestamp"]
            found[name] = Revision(name, item["revision"], created, image, model)
    return sorted(found.values(), key=lambda r: r.number, reverse=True)


def undo_target(fleet: dict[str, Any], known: Sequence[Revision], wanted: str | None) -> str:
    """The revision to go back to. Raises CommandFailed with what could be chosen instead."""
    status = fleet.get("status") or {}
    now = status.get("revision") or {}
    spec = now.get("spec")
    if status.get("observedGeneration") != (fleet.get("metadata") or {}).get("generation"):
        raise CommandFailed(
            "the operator has not seen the newest change yet, so there is nothing to undo: "
            "try again in a moment"
        )
    if spec is None:
        raise CommandFailed("the fleet has no revision yet: there is nothing to undo")
    names = [revision.name for revision in known]
    if wanted is not None:
        if wanted not in names:
            raise CommandFailed(f"revision {wanted} is not recorded; there are: {', '.join(names)}")
        return wanted
    if now.get("target") != spec:
        raise CommandFailed(
            f"revision {spec} is undone already ({now.get('target')} is served); name another "
            "with --to-revision"
        )
    serving = now.get("serving")
    if serving and serving != spec:
        return str(serving)
    older = [name for name in names if name != spec]
    if not older:
        raise CommandFailed(f"revision {spec} is the only one: there is nothing to go back to")
    return older[0]


def refuse_restart(fleet: dict[str, Any]) -> None:
    """Raises CommandFailed where a restart would roll out again what was undone."""
    now = (fleet.get("status") or {}).get("revision") or {}
    spec, target = now.get("spec"), now.get("target")
    if spec and target != spec and ROLLBACK in (fleet["metadata"].get("annotations") or {}):
        raise CommandFailed(
            f"revision {spec} is undone and {target} is served: a restart would roll {spec} out "
            "again; correct the spec instead, or take the undo back first: kubectl annotate "
            f"inferencefleet {fleet['metadata']['name']} {ROLLBACK}-"
        )


def _is_seen(fleet: dict[str, Any]) -> bool:
    """Whether the status is about the fleet as it is now.

    Undo and restart are annotations, which no generation counts.
    """
    status, meta = fleet.get("status") or {}, fleet["metadata"]
    if status.get("observedGeneration") != meta["generation"]:
        return False
    now, annotations = status.get("revision") or {}, meta.get("annotations") or {}
    if now and annotations.get(RESTARTED_AT) != now.get("restartedAt"):
        return False
    try:
        undo = json.loads(annotations.get(ROLLBACK, "{}"))
        undone, to = undo.get("from"), undo.get("to")
    except (ValueError, AttributeError):
        return True  # The operator cannot read it either.
    said = {c["type"]: c["status"] for c in status.get("conditions", ())}
    gone = said.get("RolledBack") == "False"
    return undone is None or undone != now.get("spec") or to == now.get("target") or gone


def progress(fleet: dict[str, Any]) -> Progress:
    """How the newest revision's rollout stands, from the fleet's conditions."""
    status = fleet.get("status") or {}
    if not _is_seen(fleet):
        return Progress(False, False, "waiting for the operator to see the change")
    conditions = {c["type"]: c for c in status.get("conditions", ())}
    ready, stalled = conditions.get("Ready"), conditions.get("Stalled")
    if stalled:
        return Progress(False, True, stalled["message"])
    if ready and ready["status"] == "True":
        return Progress(True, False, ready["message"])
    return Progress(False, False, ready["message"] if ready else "starting")


# -- commands --------------------------------------------------------------------------------------


@app.command("status")
def status_command(
    fleet: Fleet,
    namespace: Namespace = None,
    watch: Annotated[bool, typer.Option(help="Wait until the rollout ends.")] = True,
    timeout: Annotated[float, typer.Option(help="Seconds to wait; 0: for ever.")] = 0.0,
) -> None:
    """Show the rollout, and wait for its end; exit status 1 when it is stuck or not done."""
    deadline_s = time.monotonic() + timeout if timeout else float("inf")
    said = None
    while True:
        now = progress(attempt(lambda: _fleet(fleet, namespace)))
        if now.sentence != said:
            console.print(now.sentence)
            said = now.sentence
        if now.done:
            return
        if now.stuck or not watch or time.monotonic() > deadline_s:
            raise typer.Exit(1)
        time.sleep(POLL_S)


@app.command("history")
def history_command(fleet: Fleet, namespace: Namespace = None) -> None:
    """List the revisions that the fleet can go back to."""
    body = attempt(lambda: _fleet(fleet, namespace))
    now = (body.get("status") or {}).get("revision") or {}
    table = Table("NUMBER", "REVISION", "MODEL", "IMAGE", "RECORDED", "NOW", box=None)
    for revision in attempt(lambda: _revisions(fleet, namespace)):
        marks = [mark for mark in ("spec", "target", "serving") if now.get(mark) == revision.name]
        cells = (revision.name, revision.model, revision.image, revision.created, ", ".join(marks))
        table.add_row(str(revision.number), *cells)
    console.print(table)


@app.command("undo")
def undo_command(
    fleet: Fleet,
    namespace: Namespace = None,
    to_revision: Annotated[str | None, typer.Option(help="Else the one before.")] = None,
) -> None:
    """Serve an older revision until the fleet's spec is changed."""

    def undo() -> tuple[str, str]:
        body = _fleet(fleet, namespace)
        to = undo_target(body, _revisions(fleet, namespace), to_revision)
        origin = str(body["status"]["revision"]["spec"])
        note = json.dumps({"from": origin, "to": to})
        _annotate(fleet, namespace, ROLLBACK, note)
        return origin, to

    origin, to = attempt(undo)
    console.print(
        f"revision {to} instead of {origin}, until the spec changes or the annotation "
        f"{ROLLBACK} is removed"
    )


@app.command("restart")
def restart_command(fleet: Fleet, namespace: Namespace = None) -> None:
    """Replace every pod of the fleet by a new one, like any other rollout."""

    def restart() -> None:
        refuse_restart(_fleet(fleet, namespace))
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        _annotate(fleet, namespace, RESTARTED_AT, now)

    attempt(restart)
    console.print(f"{fleet_name(fleet)} restarts")


# -- kubectl ---------------------------------------------------------------------------------------


def _fleet(fleet: str, namespace: str | None) -> dict[str, Any]:
    name = fleet_name(fleet)
    body: dict[str, Any] = get_json(namespace, f"inferencefleet/{name}")
    return body


def _revisions(fleet: str, namespace: str | None) -> list[Revision]:
    selector = f"app.kubernetes.io/managed-by=tandem,tandem.dev/fleet={fleet_name(fleet)}"
    answer = get_json(namespace, "controllerrevisions", "--selector", selector)
    return revisions(answer["items"])


def _annotate(fleet: str, namespace: str | None, key: str, value: str) -> None:
    name = fleet_name(fleet)
    kubectl(namespace, "annotate", "--overwrite", f"inferencefleet/{name}", f"{key}={value}")
