"""The operator as a process of the test's own, under its real ServiceAccount's token.

A Deployment's container that is killed ten times waits minutes in back-off; a process does not.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from tandem.cluster.running import Running


@contextmanager
def no_deployment(cluster: Running) -> Iterator[None]:
    """The cluster's own operator is away."""
    where = ("--namespace=tandem-system", "deployment/tandem-operator")
    cluster.kubectl("scale", *where, "--replicas=0")
    selector = "--selector=app.kubernetes.io/component=operator"
    cluster.kubectl("wait", where[0], "--for=delete", "pod", selector, "--timeout=60s")
    try:
        yield
    finally:
        cluster.kubectl("scale", *where, "--replicas=1")
        cluster.kubectl("rollout", "status", *where, "--timeout=90s")


def kubeconfig(cluster: Running, folder: Path) -> Path:
    """A kubeconfig with a token of the operator's ServiceAccount."""
    token = cluster.kubectl(
        "create", "token", "tandem-operator", "--namespace=tandem-system", "--duration=1h"
    ).strip()
    admin = yaml.safe_load(cluster.kubeconfig.read_text())
    user = {"name": admin["users"][0]["name"], "user": {"token": token}}
    path = folder / "operator.kubeconfig"
    path.write_text(yaml.safe_dump(admin | {"users": [user]}))
    return path


class OperatorProcess:
    """One operator process after another, all with one identity."""

    def __init__(
        self,
        config: Path,
        log: Path,
        identity: str,
        *,
        node_repair: bool = False,
        **settings: str,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._log = log
        self._environment = {name: os.environ[name] for name in ("PATH", "HOME")} | {
            "KUBECONFIG": str(config),
            "TANDEM_POD_NAME": identity,
            "TANDEM_POD_UID": "test",
            "TANDEM_POD_IP": "127.0.0.1",
            "TANDEM_HTTP_PORT": str(port),
            "TANDEM_GATEWAY_REPLICAS": "1",
            "TANDEM_NODE_REPAIR": str(node_repair).lower(),
            "TANDEM_GATEWAY_SERVICE_TYPE": "LoadBalancer",
            **settings,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tandem_operator"],
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    def wait_leading(self, timeout_s: float = 60.0) -> None:
        """Until this process says that it leads."""
        deadline_s = time.monotonic() + timeout_s
        seen = self._said_leading()
        while self._said_leading() <= seen:
            assert self.alive, f"the operator ended: {self._log.read_text()[-2000:]}"
            assert time.monotonic() < deadline_s, "it does not lead"
            time.sleep(0.02)

    def _said_leading(self) -> int:
        return self._log.read_text().count('"leading as')

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait_end(self, timeout_s: float = 30.0) -> int:
        """Its exit status."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.alive:
            self.send(signal.SIGKILL)
            self.wait_end()
