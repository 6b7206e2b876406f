"""`tandem up`, `tandem down`, `tandem status`: the local cluster on the command line."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from tandem.cluster.down import down
from tandem.cluster.spec import ClusterSpec, NodeTimings
from tandem.cluster.status import ClusterStatus, cluster_names, read_status
from tandem.cluster.up import REFUSALS, up

console = Console(highlight=False, soft_wrap=True)

Name = Annotated[str, typer.Option("--name", help="Which cluster.")]
DEFAULTS = ClusterSpec()
TIMINGS = NodeTimings()


def register(app: typer.Typer) -> None:
    """Adds the commands to the `tandem` program."""
    app.command("up")(up_command)
    app.command("down")(down_command)
    app.command("status")(status_command)
    app.command("kubeconfig")(kubeconfig_command)


def up_command(
    name: Name = DEFAULTS.name,
    nodes: Annotated[int, typer.Option(help="Node agents to start.")] = DEFAULTS.nodes,
    gpus_per_node: Annotated[
        int, typer.Option(help="Pretended GPUs a node, where the machine has no real ones.")
    ] = DEFAULTS.gpus_per_node,
    operator: Annotated[
        bool, typer.Option(help="Install CRDs and manifests, and wait for the operator.")
    ] = DEFAULTS.operator,
    node_grace_seconds: Annotated[
        float, typer.Option(help="Silence after which a node counts as unreachable.")
    ] = TIMINGS.grace_s,
    toleration_seconds: Annotated[
        int, typer.Option(help="How long pods tolerate an unreachable node by default.")
    ] = TIMINGS.toleration_s,
) -> None:
    """Start a real Kubernetes control plane and nodes on this machine; returns when Ready."""
    begun_s = time.monotonic()

    def note(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - begun_s:6.1f} s[/dim]  {line}", markup=True)

    try:
        timings = NodeTimings(grace_s=node_grace_seconds, toleration_s=toleration_seconds)
        spec = ClusterSpec(name, nodes, gpus_per_node, operator, timings=timings)
        running = up(spec, note)
    except REFUSALS as error:
        _fail(str(error))
    console.print(f"export KUBECONFIG={running.kubeconfig}")


def down_command(
    name: Name = DEFAULTS.name,
    keep_logs: Annotated[
        Path | None, typer.Option(help="A new folder that receives all logs.")
    ] = None,
) -> None:
    """End a cluster: every process of it, and everything that it kept."""
    begun_s = time.monotonic()
    ended = down(name, keep_logs)
    if ended is None:
        console.print(f"there is no cluster {name}")
        return
    console.print(
        f"cluster {name} is down: ended {ended.processes} processes and {ended.containers} "
        f"containers in {time.monotonic() - begun_s:.1f} s"
    )


def status_command(
    name: Annotated[
        str | None, typer.Option("--name", help="Which cluster; all by default.")
    ] = None,
) -> None:
    """Show the processes of the clusters; exit status 1 when one is not well."""
    names = [name] if name else cluster_names()
    if not names:
        console.print("there is no cluster: `tandem up` starts one")
        raise typer.Exit(1)
    found = [read_status(name) for name in names]
    for status in found:
        if status is not None:
            _print(status)
    if not all(status is not None and status.healthy for status in found):
        raise typer.Exit(1)


def kubeconfig_command(name: Name = DEFAULTS.name) -> None:
    """Print the path of a cluster's kubeconfig."""
    status = read_status(name)
    if status is None:
        _fail(f"there is no cluster {name}: `tandem up --name {name}` starts one")
    sys.stdout.write(f"{status.folder.kubeconfig}\n")


def _print(status: ClusterStatus) -> None:
    name, url = status.cluster.spec.name, status.cluster.network.api_url
    table = Table("PROCESS", "PID", "STATE", "MEMORY", "AGE", box=None, title_justify="left")
    for line in status.processes:
        memory = f"{line.memory_bytes / 2**20:.0f} MiB" if line.memory_bytes else ""
        table.add_row(line.name, str(line.pid), line.state, memory, f"{line.age_s:.0f} s")
    total = sum(line.memory_bytes for line in status.processes)
    supervised = "" if status.supervised else ", [red]its supervisor is gone[/red]"
    console.print(f"cluster [bold]{name}[/bold] at {url}{supervised}")
    if status.failure:
        console.print(f"[red]{status.failure}[/red]")
    console.print(table)
    console.print(f"memory in all: {total / 2**20:.0f} MiB; logs in {status.folder.logs}")


def _fail(sentence: str) -> NoReturn:
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(sentence)
    raise typer.Exit(1)
