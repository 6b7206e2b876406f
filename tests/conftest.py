"""Fixtures for tests on the real control plane (tests/control, tests/e2e).

The first test that asks for `cluster` starts one for the whole run: etcd, API server, controller
manager, scheduler, four node agents; no operator. `operator` installs crds/ and manifests/ into it
and waits until the operator is available; `crds` only the CRDs. The cluster goes down with pytest,
however pytest ends; after a failed run its logs are kept where the last line says.

The binaries of the control plane, and of Prometheus for the tests that ask for one, are got before
the first test: on a new machine they are built, which takes longer than any test may.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tandem.agent.api import Api
from tandem.cluster.binaries import find_all
from tandem.cluster.down import down
from tandem.cluster.process import identify
from tandem.cluster.running import KubectlError, Running
from tandem.cluster.spec import ClusterSpec
from tandem.cluster.up import install, up

from benchmarks.prometheus import server as prometheus

ROOT = Path(__file__).resolve().parents[1]


def note(line: str) -> None:
    """Progress of slow set-up; pytest shows it with a failure, or with -s."""
    sys.stderr.write(f"[cluster] {line}\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    """No test's time-out runs yet."""
    needed = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None or session.config.option.collectonly:
        return
    if "start_cluster" in needed:
        find_all(lambda line: terminal.write_line(f"[cluster] {line}"))
    if "prometheus_binary" in needed:
        prometheus.find(lambda line: terminal.write_line(f"[prometheus] {line}"))


@pytest.fixture(scope="session")
def prometheus_binary() -> Path:
    """A real Prometheus."""
    return prometheus.find(note)


@pytest.fixture(scope="session")
def start_cluster(request: pytest.FixtureRequest) -> Callable[[ClusterSpec], Running]:
    """Starts a cluster that goes down at the end of the run."""
    owner = identify(os.getpid())

    def start(spec: ClusterSpec) -> Running:
        def end() -> None:
            failed = request.session.testsfailed > 0
            logs = Path(tempfile.mkdtemp(prefix="tandem-logs-")) / spec.name if failed else None
            down(spec.name, logs)
            if logs is not None:
                note(f"logs of cluster {spec.name} are kept in {logs}")

        request.addfinalizer(end)
        return up(spec, note, owner)

    return start


@pytest.fixture(scope="session")
def cluster(start_cluster: Callable[[ClusterSpec], Running]) -> Running:
    """The cluster of this test run."""
    return start_cluster(ClusterSpec(name=f"test-{secrets.token_hex(3)}", operator=False))


@pytest.fixture(scope="session")
def crds(cluster: Running) -> None:
    """The project's CRDs are established in the cluster."""
    cluster.kubectl("apply", "--server-side", "-k", str(ROOT / "crds"))
    cluster.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")


@pytest.fixture(scope="session")
def operator(cluster: Running) -> None:
    """The operator runs in the cluster, as the Deployment of manifests/overlays/local."""
    install(cluster, note)


@pytest.fixture
def kubectl(cluster: Running) -> Callable[..., str]:
    """`kubectl(*arguments, input=None) -> output`, as cluster-admin; raises KubectlError."""
    return cluster.kubectl


@pytest.fixture
def namespace(cluster: Running) -> Iterator[str]:
    """A fresh namespace in which pods can be created; deleted afterwards."""
    name = f"t-{secrets.token_hex(4)}"
    cluster.kubectl("create", "namespace", name)
    deadline_s = time.monotonic() + 30
    while True:
        try:
            cluster.kubectl(
                "get", "serviceaccount/default", "configmap/kube-root-ca.crt", "-n", name
            )
            break
        except KubectlError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")


@pytest.fixture
def apply(cluster: Running, namespace: str) -> Callable[..., None]:
    """`apply(*objects)` applies objects (dicts) in the test's namespace."""

    def apply_objects(*objects: dict[str, Any]) -> None:
        bundle = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        cluster.kubectl("apply", "-n", namespace, "-f", "-", input=json.dumps(bundle))

    return apply_objects


@pytest.fixture
def get(cluster: Running, namespace: str) -> Callable[..., dict[str, Any]]:
    """`get("pod", "p")` reads an object of the test's namespace."""

    def get_object(kind: str, name: str) -> dict[str, Any]:
        text = cluster.kubectl("get", kind, name, "-n", namespace, "-o", "json")
        found: dict[str, Any] = json.loads(text)
        return found

    return get_object


@pytest.fixture(scope="session")
def eventually() -> Callable[..., Any]:
    """`eventually(test, timeout_s=30)` returns the first true result of `test()`.

    A KubectlError (not there yet) counts as false.
    """

    def wait(test: Callable[[], Any], timeout_s: float = 30.0) -> Any:
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                if result := test():
                    return result
                last: object = result
            except KubectlError as error:
                last = error
            if time.monotonic() > deadline_s:
                raise AssertionError(f"did not happen within {timeout_s:g} s; last: {last!r}")
            time.sleep(0.1)

    return wait


@pytest.fixture
async def api(cluster: Running) -> AsyncIterator[Api]:
    """A client of the API server, as cluster-admin."""
    async with Api.connect(cluster.admin, user_agent="tandem-tests") as client:
        yield client


@pytest.fixture
def audit_log(cluster: Running) -> Callable[[], list[dict[str, Any]]]:
    """`audit_log()` gives the requests that the API server finished since the test began."""
    seen = sum(1 for _ in cluster.audit_events())

    def since() -> list[dict[str, Any]]:
        return list(cluster.audit_events())[seen:]

    return since
