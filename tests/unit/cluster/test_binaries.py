from __future__ import annotations

from pathlib import Path

from tandem.cluster.binaries import candidates, pick, version_of
from tandem.cluster.pins import Pins, Version

PINS = Pins(Version(1, 36, 3), Version(3, 6, 8))


def program(folder: Path, name: str, says: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def test_the_order_of_places(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("assets", "one", "two", "python")]
    paths = [program(folder, "etcd", "") for folder in folders]
    (tmp_path / "one" / "kubectl").write_text("not executable")
    environ = {
        "KUBEBUILDER_ASSETS": str(folders[0]),
        "PATH": f"{folders[1]}::/no/such/folder:{folders[2]}:{folders[1]}",
    }
    assert list(candidates("etcd", environ, folders[3])) == paths
    assert list(candidates("etcd", {}, folders[3])) == [paths[3]]
    assert list(candidates("kubectl", environ, folders[3])) == []
    (tmp_path / "same").symlink_to(folders[1])
    twice = {"PATH": f"{folders[1]}:{tmp_path / 'same'}"}
    assert list(candidates("etcd", twice, tmp_path)) == [paths[1]]


def test_a_file_of_another_version_is_passed_over_by_name(tmp_path: Path) -> None:
    old = program(tmp_path / "old", "kube-apiserver", "Kubernetes v1.30.0")
    odd = program(tmp_path / "odd", "kube-apiserver", "hello")
    good = program(tmp_path / "good", "kube-apiserver", "Kubernetes v1.36.1")
    path, rejected = pick("kube-apiserver", iter([old, odd, good]), PINS)
    assert path == good
    assert [(refusal.path, refusal.reason) for refusal in rejected] == [
        (old, "version 1.30.0, wanted 1.36"),
        (odd, "unknown version, wanted 1.36"),
    ]
    path, rejected = pick("kube-apiserver", iter([old]), PINS)
    assert (path, len(rejected)) == (None, 1)


def test_version_of(tmp_path: Path) -> None:
    assert version_of("etcd", program(tmp_path, "etcd", "etcd Version: 3.6.8")) == Version(3, 6, 8)
    assert version_of("etcd", tmp_path / "none") is None
    broken = tmp_path / "broken"
    broken.write_text("no program")
    broken.chmod(0o755)
    assert version_of("etcd", broken) is None
