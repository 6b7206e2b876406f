"""Official release binaries, where the network allows: verified, cached, never required.

A connection that is not there within three seconds counts as no network. A file whose checksum is
not the published one is refused and nothing is kept of it.
"""

from __future__ import annotations

import hashlib
import io
import platform
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tandem.cluster.pins import Pins

CONNECT_TIMEOUT_S: Final = 3.0
STALL_TIMEOUT_S: Final = 30.0
KUBERNETES_URL: Final = "https://dl.k8s.io/release"
ETCD_URL: Final = "https://github.com/etcd-io/etcd/releases/download"


class DownloadError(RuntimeError):
    """Not to be had from there; the message says why."""


@dataclass(frozen=True, slots=True)
class Release:
    """The official releases of the pinned versions, cached under `cache`."""

    pins: Pins
    cache: Path
    kubernetes_url: str = KUBERNETES_URL
    etcd_url: str = ETCD_URL

    def path(self, component: str) -> Path:
        """Where a downloaded component is kept."""
        return self.cache / f"release-{self.pins.wanted(component)}" / component

    def cached(self, component: str) -> Path | None:
        """The component, if it was downloaded before."""
        path = self.path(component)
        return path if path.exists() else None

    def download(self, component: str, note: Callable[[str], None]) -> Path:
        """Fetches and verifies one component.

        Raises:
            DownloadError: no network, no such file, or a wrong checksum.
        """
        data = self._etcd(note) if component == "etcd" else self._kubernetes(component, note)
        path = self.path(component)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.write_bytes(data)
        draft.chmod(0o755)
        draft.replace(path)
        return path

    def _kubernetes(self, component: str, note: Callable[[str], None]) -> bytes:
        url = (
            f"{self.kubernetes_url}/v{self.pins.wanted(component)}/bin/linux/{_arch()}/{component}"
        )
        wanted = _fetch(url + ".sha256").decode().split()[0]
        note(f"downloading {url}")
        return _verified(url, _fetch(url, STALL_TIMEOUT_S), wanted)

    def _etcd(self, note: Callable[[str], None]) -> bytes:
        name = f"etcd-v{self.pins.etcd}-linux-{_arch()}"
        folder = f"{self.etcd_url}/v{self.pins.etcd}"
        sums = _fetch(f"{folder}/SHA256SUMS").decode().splitlines()
        archive = f"{name}.tar.gz"
        wanted = next((line.split()[0] for line in sums if line.split()[-1:] == [archive]), "")
        url = f"{folder}/{archive}"
        note(f"downloading {url}")
        data = _verified(url, _fetch(url, STALL_TIMEOUT_S), wanted)
        with tarfile.open(fileobj=io.BytesIO(data)) as files:
            member = files.extractfile(f"{name}/etcd")
            if member is None:
                raise DownloadError(f"{url} holds no etcd")
            return member.read()


def _verified(url: str, data: bytes, wanted: str) -> bytes:
    actual = hashlib.sha256(data).hexdigest()
    if actual != wanted:
        raise DownloadError(
            f"{url} has checksum {actual}, published is {wanted or 'none'}: refused"
        )
    return data


def _fetch(url: str, timeout_s: float = CONNECT_TIMEOUT_S) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            data: bytes = answer.read()
            return data
    except (urllib.error.URLError, OSError) as error:
        raise DownloadError(f"{url}: {getattr(error, 'reason', error)}") from None


def _arch() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
