from __future__ import annotations

from pathlib import Path

import pytest
from tandem.cluster.pins import Pins, Version

PINS = Pins(Version(1, 36, 3), Version(3, 6, 8))


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("Kubernetes v1.36.3", Version(1, 36, 3)),
        ("etcd Version: 3.6.8\nGit SHA: x\nGo Version: go1.26.8", Version(3, 6, 8)),
        ("Client Version: v1.32.4-dispatcher\nKustomize Version: v5.5.0", Version(1, 32, 4)),
        ("nothing", None),
    ],
)
def test_find(text: str, version: Version | None) -> None:
    assert Version.find(text) == version


@pytest.mark.parametrize(
    ("component", "version", "accepted"),
    [
        ("kube-apiserver", Version(1, 36, 0), True),
        ("kube-apiserver", Version(1, 35, 3), False),
        ("kube-apiserver", Version(2, 36, 3), False),
        ("etcd", Version(3, 6, 12), True),
        ("etcd", Version(3, 5, 8), False),
        ("kubectl", Version(1, 37, 1), True),
        ("kubectl", Version(1, 35, 0), True),
        ("kubectl", Version(1, 34, 9), False),
        ("kubectl", Version(1, 38, 0), False),
    ],
)
def test_accepts(component: str, version: Version, accepted: bool) -> None:
    assert PINS.accepts(component, version) is accepted


def test_what_is_wanted_in_words() -> None:
    assert PINS.describe("etcd") == "3.6"
    assert PINS.describe("kube-scheduler") == "1.36"
    assert PINS.describe("kubectl") == "1.35 to 1.37"


def test_read(tmp_path: Path) -> None:
    (tmp_path / "go.mod").write_text(
        "require (\n\tgo.etcd.io/etcd/server/v3 v3.6.8\n\tk8s.io/kubernetes v1.36.3\n)\n"
    )
    assert Pins.read(tmp_path) == PINS
    (tmp_path / "go.mod").write_text("require k8s.io/api v0.36.3\n")
    with pytest.raises(ValueError, match=r"requires no k8s\.io/kubernetes"):
        Pins.read(tmp_path)
