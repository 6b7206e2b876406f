"""Against folders that look like a cgroup hierarchy; the kernel's own is in tests/control."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tandem.agent.cgroups import CpuCgroups


def test_v2(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu")
    cgroups = CpuCgroups.create("c", "node-1", tmp_path)
    assert cgroups is not None
    for folder in (tmp_path, tmp_path / "tandem", tmp_path / "tandem" / "c"):
        assert (folder / "cgroup.subtree_control").read_text() == "+cpu"
    path = cgroups.limit("uid", "main", 1500)
    assert path is not None
    assert (Path(path) / "cpu.max").read_text() == "150000 100000"


def test_v1(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    cgroups = CpuCgroups.create("c", "node-1", tmp_path)
    assert cgroups is not None
    path = cgroups.limit("uid", "main", 250)
    assert path is not None
    assert (Path(path) / "cpu.cfs_quota_us").read_text() == "25000"
    assert (Path(path) / "cpu.cfs_period_us").read_text() == "100000"


def test_without_a_hierarchy_it_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert CpuCgroups.create("c", "node-1", tmp_path / "none") is None
    assert "CPU limits are not enforced" in caplog.text
