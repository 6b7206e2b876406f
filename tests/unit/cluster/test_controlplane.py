"""The Go module: a replace that was forgotten in an upgrade is wrong without any error."""

from __future__ import annotations

import re

from tandem.cluster.pins import MODULE, Pins

GO_MOD = (MODULE / "go.mod").read_text()
REPLACE = re.compile(r"^\t(k8s\.io/\S+) => (\S+) v0\.(\d+)\.(\d+)$", re.MULTILINE)


def test_every_staging_module_has_the_version_of_kubernetes() -> None:
    pin = Pins.read().kubernetes
    replaces = REPLACE.findall(GO_MOD)
    assert len(replaces) >= 30
    for name, target, minor, patch in replaces:
        assert name == target, "published modules only, never a fork"
        assert (int(minor), int(patch)) == (pin.minor, pin.patch), name


def test_every_requirement_without_a_version_is_replaced() -> None:
    replaced = {name for name, *_ in REPLACE.findall(GO_MOD)}
    unversioned = re.findall(r"^\t(k8s\.io/\S+) v0\.0\.0(?: //.*)?$", GO_MOD, re.MULTILINE)
    assert set(unversioned) <= replaced


def test_every_module_is_in_the_checksums() -> None:
    """Without go.sum the build would ask a checksum database that may not be reachable."""
    sums = (MODULE / "go.sum").read_text()
    pin = Pins.read()
    assert f"k8s.io/kubernetes v{pin.kubernetes} h1:" in sums
    assert f"go.etcd.io/etcd/server/v3 v{pin.etcd} h1:" in sums
