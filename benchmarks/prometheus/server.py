"""A real Prometheus server, for tests and benchmarks: found on PATH, else built once.

The Go module beside this file pins the version; the build leaves out service discovery (but for
files) and the web pages. What is scraped is written as target files, with the labels that
manifests/components/podmonitor gives in a cluster: namespace and pod.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tandem.cluster.binaries import VERSION_TIMEOUT_S
from tandem.cluster.gobuild import Program
from tandem.cluster.pins import Version

MODULE = Path(__file__).parent
PACKAGE = "github.com/prometheus/prometheus/cmd/prometheus"
START_S = 60.0
SCRAPE_S = 1
Note = Callable[[str], None]


def pinned() -> Version:
    """Prometheus 3.16.0 is the Go module v0.316.0."""
    text = (MODULE / "go.mod").read_text()
    match = re.search(r"github\.com/prometheus/prometheus v0\.(\d)(\d\d)\.(\d+)", text)
    assert match is not None, f"{MODULE / 'go.mod'} requires no Prometheus"
    return Version(*map(int, match.groups()))


def program() -> Program:
    return Program(
        name="prometheus",
        module=MODULE,
        sources=("go.mod", "go.sum"),
        package=PACKAGE,
        tags="remove_all_sd",
        linker_flags=f"-s -w -X github.com/prometheus/common/version.Version={pinned()}",
        announcement="building Prometheus from source, once for this machine",
        instead=f"or put prometheus {pinned().major}.x on the PATH",
    )


def find(note: Note) -> Path:
    """The binary. Raises BuildError with what would help."""
    found = shutil.which("prometheus")
    if found is not None:
        said = subprocess.run(
            [found, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S
        )
        version = Version.find(said.stdout + said.stderr)
        if version is not None and version.major == pinned().major:
            return Path(found)
        note(f"passed over {found}: version {version}, wanted {pinned().major}.x")
    return program().build(note) / "prometheus"


@dataclass(frozen=True)
class Target:
    """What is scraped, every second."""

    address: str
    """HOST:PORT."""
    namespace: str
    pod: str


class PrometheusServer:
    """One server on loopback; it keeps its port and its data when it is started again."""

    def __init__(self, binary: Path, folder: Path, jobs: Iterable[str] = ("pods",)) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port: int = free.getsockname()[1]
        self._binary = binary
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{self._port}"
        for job in jobs:
            self.scrape([], job)
        scrapes = [
            {
                "job_name": job,
                "file_sd_configs": [{"files": [str(self._targets(job))], "refresh_interval": "1s"}],
            }
            for job in jobs
        ]
        interval = {"scrape_interval": f"{SCRAPE_S}s", "scrape_timeout": f"{SCRAPE_S}s"}
        config = {"global": interval, "scrape_configs": scrapes}
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))

    def _targets(self, job: str) -> Path:
        return self._folder / f"{job}.json"

    def scrape(self, targets: Iterable[Target], job: str = "pods") -> None:
        """From now on these, and no others."""
        entries = [
            {"targets": [t.address], "labels": {"namespace": t.namespace, "pod": t.pod}}
            for t in targets
        ]
        draft = self._folder / f"{job}.draft"
        draft.write_text(json.dumps(entries))
        draft.replace(self._targets(job))

    def start(self) -> None:
        """Returns when it answers."""
        arguments = [
            str(self._binary),
            f"--config.file={self._folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self._port}",
            "--log.level=warn",
        ]
        log = self._folder / "prometheus.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                arguments,
                stdout=output,
                stderr=output,
                env=os.environ | {"GOMAXPROCS": "1", "GOMEMLIMIT": "200MiB"},
            )
        deadline_s = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/-/ready", timeout=1).close()
        except OSError:
            return False
        return True

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._process.wait()
        self._process = None

    def query(self, text: str) -> list[dict[str, Any]]:
        """The series of an instant vector, for what tests wait for."""
        url = f"{self.url}/api/v1/query?query={urllib.parse.quote(text)}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return found
