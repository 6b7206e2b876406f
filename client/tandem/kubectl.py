"""What the commands that talk to a cluster share: kubectl, with the user's own kubeconfig."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console

from tandem.cluster.binaries import candidates

console = Console(highlight=False, soft_wrap=True)

Fleet = Annotated[str, typer.Argument(metavar="fleet/NAME", help="The InferenceFleet.")]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Its namespace; else the context's own.")
]
T = TypeVar("T")


class CommandFailed(RuntimeError):
    """The command cannot be done; the message is a sentence for the user."""


def fleet_name(argument: str) -> str:
    """NAME of `fleet/NAME`, `inferencefleet/NAME` or `NAME`. Raises CommandFailed."""
    kind, slash, name = argument.rpartition("/")
    if slash and kind not in ("fleet", "inferencefleet", "inferencefleets"):
        raise CommandFailed(f"{argument} is not a fleet: write fleet/NAME")
    return name


def attempt(action: Callable[[], T]) -> T:
    """The action's result, or its sentence and exit status 1."""
    try:
        return action()
    except CommandFailed as error:
        fail(str(error))


def fail(sentence: str) -> NoReturn:
    console.print(f"[red]{sentence}[/red]")
    raise typer.Exit(1)


def get_json(namespace: str | None, *arguments: str) -> Any:
    return json.loads(kubectl(namespace, "get", "--output=json", *arguments))


def kubectl(namespace: str | None, *arguments: str) -> str:
    """kubectl's output, with the user's own kubeconfig. Raises CommandFailed."""
    path = next(candidates("kubectl", os.environ, Path(sys.executable).parent), None)
    if path is None:
        raise CommandFailed("kubectl is not on PATH: install it")
    where = ["--namespace", namespace] if namespace else []
    answer = subprocess.run([path, *where, *arguments], capture_output=True, text=True)
    if answer.returncode != 0:
        raise CommandFailed(answer.stderr.strip())
    return answer.stdout
