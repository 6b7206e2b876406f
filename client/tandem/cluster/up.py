"""`tandem up`: from nothing to a cluster whose nodes are Ready and whose operator runs.

Idempotent: what runs already is used, what is missing is made, and the call returns when the
cluster is ready. A cluster whose supervisor died is remains, not state: it is cleared away first.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tandem.cluster.binaries import MissingBinaryError, find_all
from tandem.cluster.down import end_cluster
from tandem.cluster.files import ClusterFiles
from tandem.cluster.lock import lock
from tandem.cluster.paths import ClusterDir
from tandem.cluster.preflight import MachineError, check_machine
from tandem.cluster.process import ProcessId, is_running
from tandem.cluster.running import KubectlError, Running
from tandem.cluster.slot import NoSlotError, claim_slot
from tandem.cluster.spec import Cluster, ClusterSpec, SpecError
from tandem.cluster.supervisor import Report

READY_TIMEOUT_S: Final = 180.0
POLL_S: Final = 0.1
LOG_TAIL_LINES: Final = 15
BOOTSTRAP: Final = Path(__file__).with_name("bootstrap.yaml")
SOURCE: Final = Path(__file__).resolve().parents[3]
FIELD_MANAGER: Final = "tandem-up"


class UpError(RuntimeError):
    """The cluster cannot be brought up; the message says why and what to do."""


REFUSALS: Final = (
    SpecError,
    MachineError,
    MissingBinaryError,
    NoSlotError,
    UpError,
    KubectlError,
)
"""What bringing a cluster up can say no with; each message is a sentence for the user."""


def up(spec: ClusterSpec, note: Callable[[str], None], owner: ProcessId | None = None) -> Running:
    """Brings the cluster up; returns when it is ready.

    A new cluster goes down by itself when `owner` ends, however it ends.

    Raises:
        one of REFUSALS: with the reason, and the end of the log of what failed.
    """
    with lock(spec.name):
        running = _resume(spec, note) or _launch(spec, note, owner)
        _wait_control_plane(running)
        note("control plane answers")
        running.kubectl(
            "apply", "--server-side", f"--field-manager={FIELD_MANAGER}", f"-f={BOOTSTRAP}"
        )
        _wait_nodes(running)
        note(f"{spec.nodes} nodes are Ready")
        _wait_default_objects(running)
        if spec.operator:
            install(running, note)
        return running


def _resume(spec: ClusterSpec, note: Callable[[str], None]) -> Running | None:
    """The cluster of that name if it runs, with what died of it started again."""
    folder = ClusterDir.named(spec.name)
    report = Report.read(folder.processes)
    if report is None or report.failure or not is_running(report.supervisor):
        return None
    running = Running(_same(folder, spec), folder, find_all(lambda _: None)["kubectl"])
    note(f"cluster {spec.name} runs already, at {running.cluster.network.api_url}")
    if revived := running.revive():
        note(f"started again: {', '.join(revived)}")
    return running


def _same(folder: ClusterDir, spec: ClusterSpec) -> Cluster:
    """The running cluster, if it is what is asked for."""
    cluster = Cluster.from_json(folder.cluster.read_text())
    for name in ("nodes", "gpus_per_node", "timings", "loopback"):
        has, wanted = getattr(cluster.spec, name), getattr(spec, name)
        if has != wanted:
            raise UpError(
                f"cluster {spec.name} runs with {name} {has}, not {wanted}: "
                f"`tandem down --name {spec.name}` first"
            )
    return cluster


def _launch(spec: ClusterSpec, note: Callable[[str], None], owner: ProcessId | None) -> Running:
    """Writes the cluster's files and starts its supervisor, detached."""
    folder = ClusterDir.named(spec.name)
    if folder.root.exists():
        note(f"clearing away the remains of cluster {spec.name}")
        end_cluster(spec.name)
    check_machine()
    binaries = find_all(note)
    claim = claim_slot(loopback=spec.loopback)
    with claim.handle:
        cluster = Cluster(spec, claim.network)
        folder.root.mkdir(parents=True)
        ClusterFiles(folder, cluster, binaries).write(owner)
        with (folder.logs / "supervisor.log").open("ab") as log:
            subprocess.Popen(
                [sys.executable, "-m", "tandem.cluster.supervisor", str(folder.root)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[claim.handle.fileno()],
            ).returncode = 0  # Detached: it is followed by its report, not waited for.
    note(f"cluster {spec.name} starts, at {cluster.network.api_url}")
    return Running(cluster, folder, binaries["kubectl"])


def _wait(running: Running, what: str, test: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while not test():
        report = Report.read(running.folder.processes)
        if report is not None and (report.failure or report.dead()):
            raise UpError(_obituary(running.folder, report))
        if time.monotonic() > deadline_s:
            raise UpError(
                f"{what} did not happen within {READY_TIMEOUT_S:.0f} s: see {running.folder.logs}"
            )
        time.sleep(POLL_S)


def _obituary(folder: ClusterDir, report: Report) -> str:
    """What died, and the end of what it said."""
    lines = [report.failure] if report.failure else []
    for child in report.dead():
        assert child.ending is not None
        lines.append(f"{child.name} ended with status {child.ending.status}; the end of its log:")
        log = folder.logs / f"{child.name}.log"
        lines += log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join(lines)


def _wait_control_plane(running: Running) -> None:
    """The first stage is up when the supervisor has gone on to the next."""

    def ready() -> bool:
        report = Report.read(running.folder.processes)
        return report is not None and any(c.name == "kube-scheduler" for c in report.children)

    _wait(running, "an answer of the API server", ready)


def _wait_nodes(running: Running) -> None:
    """Nodes are Ready, and their agents answer: after a restart the old lease still counts."""
    names = set(running.cluster.spec.node_names())
    network = running.cluster.network
    agents = [network.node_ip(index) for index in range(1, len(names) + 1)]

    def ready() -> bool:
        nodes = json.loads(running.kubectl("get", "--raw", "/api/v1/nodes"))["items"]
        well = {node["metadata"]["name"] for node in nodes if _is_ready(node)}
        return names <= well and all(_answers(ip, network.agent_port) for ip in agents)

    _wait(running, "readiness of all nodes", ready)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _is_ready(node: dict[str, Any]) -> bool:
    taints = {taint["key"] for taint in node["spec"].get("taints") or []}
    conditions = node.get("status", {}).get("conditions") or []
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    return ready and "node.kubernetes.io/not-ready" not in taints


def _wait_default_objects(running: Running) -> None:
    """Without these two no pod can be created."""
    paths = ("serviceaccounts/default", "configmaps/kube-root-ca.crt")

    def present() -> bool:
        try:
            for path in paths:
                running.kubectl("get", "--raw", f"/api/v1/namespaces/default/{path}")
        except KubectlError:
            return False
        return True

    _wait(running, "the default ServiceAccount", present)


def install(running: Running, note: Callable[[str], None]) -> None:
    """Applies the project's CRDs and manifests, and waits for the operator.

    Raises:
        UpError: this is no source tree.
        KubectlError: the API server refused something, or the operator did not become available.
    """
    overlay = SOURCE / "manifests" / "overlays" / "local"
    if not overlay.is_dir():
        raise UpError(
            f"{overlay} does not exist: run `tandem up` from a source tree, or --no-operator"
        )
    apply = ("apply", "--server-side", "--force-conflicts", f"--field-manager={FIELD_MANAGER}")
    running.kubectl(*apply, "-k", str(SOURCE / "crds"))
    _wait_kinds(running)
    running.kubectl(*apply, "-k", str(overlay))
    note("CRDs and manifests are applied")
    running.kubectl(
        "rollout",
        "status",
        "--namespace=tandem-system",
        "deployment/tandem-operator",
        f"--timeout={READY_TIMEOUT_S:.0f}s",
        timeout_s=READY_TIMEOUT_S + 10,
    )
    note("the operator is available")


def _wait_kinds(running: Running) -> None:
    """Custom kinds are established and can be listed: before that their watchers get errors."""
    running.kubectl("wait", "crd", "--all", "--for=condition=Established", "--timeout=30s")
    names = running.kubectl("get", "crd", "-o", "jsonpath={.items[*].metadata.name}").split()
    running.kubectl("get", ",".join(names), "--all-namespaces")
