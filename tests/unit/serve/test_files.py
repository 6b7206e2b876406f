"""Files that a pod reads for a gateway: on claims that it mounts, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from tandem_runtime.frontend.errors import BadRequest
from tandem_runtime.serve.files import claim_text


def test_a_text_on_a_claim(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "book.txt").write_text("the book, naïve")
    assert claim_text("pvc://docs/book.txt", tmp_path) == "the book, naïve"


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("pvc://docs/../../secret", "names no file below"),
        ("pvc://docs/link", "names no file below"),
        ("file:///etc/passwd", "names no file below"),
        ("pvc://docs/nul\0", "characters that no name of a file here has"),
        ("pvc://docs/half \ud800", "characters that no name of a file here has"),
        ("pvc://other/book.txt", "The claim 'other' is not mounted here"),
        ("pvc://docs/missing.txt", "cannot be read: No such file"),
        ("pvc://docs/binary", "is no text in UTF-8"),
        ("pvc://docs/large", "is larger than"),
    ],
)
def test_anything_else_is_refused(
    tmp_path: Path, uri: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem_runtime.serve.files.MAX_CONTEXT_BYTES", 10)
    root = tmp_path / "pvc"
    (root / "docs").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (root / "docs" / "link").symlink_to(tmp_path / "secret")
    (root / "docs" / "binary").write_bytes(b"\xff\xfe")
    (root / "docs" / "large").write_text("x" * 11)
    with pytest.raises(BadRequest, match=sentence):
        claim_text(uri, root)
