"""Downloads, from a server of our own on loopback."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tandem.cluster import download
from tandem.cluster.download import DownloadError, Release
from tandem.cluster.pins import Pins, Version

PINS = Pins(Version(1, 36, 3), Version(3, 6, 8))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the URL under which it is served."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def release(site: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    monkeypatch.setattr(download, "_arch", lambda: "amd64")
    return Release(PINS, tmp_path / "cache", kubernetes_url=site[1], etcd_url=site[1])


def offer_kubernetes(folder: Path, data: bytes, checksum: str | None = None) -> None:
    target = folder / "v1.36.3" / "bin" / "linux" / "amd64"
    target.mkdir(parents=True)
    (target / "kube-scheduler").write_bytes(data)
    checksum = checksum or hashlib.sha256(data).hexdigest()
    (target / "kube-scheduler.sha256").write_text(checksum)


def offer_etcd(folder: Path, data: bytes) -> None:
    target = folder / "v3.6.8"
    target.mkdir()
    archive = target / "etcd-v3.6.8-linux-amd64.tar.gz"
    with tarfile.open(archive, "w:gz") as files:
        entry = tarfile.TarInfo("etcd-v3.6.8-linux-amd64/etcd")
        entry.size = len(data)
        files.addfile(entry, io.BytesIO(data))
    checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
    (target / "SHA256SUMS").write_text(f"0000  other.tar.gz\n{checksum}  {archive.name}\n")


def test_a_verified_file_is_kept(release: Release, site: tuple[Path, str]) -> None:
    offer_kubernetes(site[0], b"scheduler")
    assert release.cached("kube-scheduler") is None
    path = release.download("kube-scheduler", lambda _: None)
    assert path.read_bytes() == b"scheduler"
    assert path.stat().st_mode & 0o777 == 0o755
    assert release.cached("kube-scheduler") == path


def test_etcd_comes_in_an_archive(release: Release, site: tuple[Path, str]) -> None:
    offer_etcd(site[0], b"etcd itself")
    assert release.download("etcd", lambda _: None).read_bytes() == b"etcd itself"


def test_a_wrong_checksum_is_refused(release: Release, site: tuple[Path, str]) -> None:
    offer_kubernetes(site[0], b"evil", checksum="ab" * 32)
    with pytest.raises(DownloadError, match=r"published is abab.*: refused"):
        release.download("kube-scheduler", lambda _: None)
    assert release.cached("kube-scheduler") is None


def test_what_is_not_there_says_so(release: Release) -> None:
    with pytest.raises(DownloadError, match="kube-apiserver"):
        release.download("kube-apiserver", lambda _: None)


def test_no_network_is_found_out_quickly(tmp_path: Path) -> None:
    release = Release(PINS, tmp_path, kubernetes_url="http://127.0.0.1:1")
    with pytest.raises(DownloadError, match="refused"):
        release.download("kube-scheduler", lambda _: None)
