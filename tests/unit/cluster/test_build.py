from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from tandem.cluster import gobuild
from tandem.cluster.build import control_plane, linker_flags
from tandem.cluster.gobuild import BuildError
from tandem.cluster.pins import MODULE, Version


def test_the_binaries_will_tell_their_version() -> None:
    flags = linker_flags(Version(1, 36, 3))
    for package in ("component-base", "client-go/pkg"):
        assert f"-X k8s.io/{package}/version.gitVersion=v1.36.3" in flags
        assert f"-X k8s.io/{package}/version.gitMinor=36" in flags


def test_the_cache_key_depends_on_everything_that_goes_in(tmp_path: Path) -> None:
    module = tmp_path / "module"
    shutil.copytree(MODULE, module)
    key = control_plane(module).cache_key("go1.26.8")
    assert key == control_plane().cache_key("go1.26.8")
    assert control_plane(module).cache_key("go1.26.9") != key
    for name in ("go.mod", "go.sum", "main.go"):
        original = (module / name).read_bytes()
        (module / name).write_bytes(original + b"\n// x")
        assert control_plane(module).cache_key("go1.26.8") != key, name
        (module / name).write_bytes(original)


def test_without_go_the_sentence_says_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError) as failure:
        control_plane().build(lambda _: None)
    sentence = str(failure.value)
    assert "install Go 1.26" in sentence
    assert "KUBEBUILDER_ASSETS" in sentence
    assert control_plane().cached() is None


GO = """#!/bin/sh
case "$1" in
  env) echo go${GO_IS:-1.26.8};;
  list) printf 'a\\nb\\nc\\n';;
  build)
    echo "$1" >> "$CALLS"
    echo a >&2; echo b >&2; sleep 0.3
    test -z "$FAIL" || { echo 'undefined: x' >&2; exit 1; }
    while [ "$1" != -o ]; do shift; done
    echo binary > "$2";;
esac
"""


@pytest.fixture
def toolchain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `go` that takes a moment and writes a file."""
    go = tmp_path / "bin" / "go"
    go.parent.mkdir()
    go.write_text(GO)
    go.chmod(0o755)
    monkeypatch.setenv("PATH", f"{go.parent}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(gobuild, "NOTE_PERIOD_S", 0.0)
    return tmp_path


def test_a_build_is_kept_and_used_again(toolchain: Path) -> None:
    notes: list[str] = []
    folder = control_plane().build(notes.append)
    assert (folder / "kube-scheduler").resolve() == (folder / "controlplane").resolve()
    assert any(note.startswith("compiled 2 packages of at most 3") for note in notes)
    assert control_plane().cached() == folder
    assert control_plane().build(notes.append) == folder
    assert (toolchain / "calls").read_text().count("build") == 1


def test_two_at_once_build_once(toolchain: Path) -> None:
    folders: list[Path] = []
    notes: list[str] = []
    program = control_plane()
    threads = [
        threading.Thread(target=lambda: folders.append(program.build(notes.append)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert (toolchain / "calls").read_text().count("build") == 1
    assert "another process builds controlplane: waiting for it ..." in notes


def test_a_failed_build_leaves_nothing(toolchain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "yes")
    with pytest.raises(BuildError, match="undefined: x"):
        control_plane().build(lambda _: None)
    assert control_plane().cached() is None
    left = [path.name for path in (toolchain / "cache").rglob("*") if path.is_dir()]
    assert not [name for name in left if name.startswith("build-")]


def test_an_old_go_is_refused(toolchain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GO_IS", "1.20.3")
    with pytest.raises(BuildError, match=r"is go1\.20\.3, but Go 1\.26\.0 or newer is wanted"):
        control_plane().build(lambda _: None)
