from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.agent.payload import DATA_LINK, File, MissingKeyError, Payload, project, write

DATA = {"a": b"1", "b": b"2"}


def test_all_keys_or_the_listed_ones() -> None:
    every = project(DATA, None, 0o640, optional=False, what="configmap")
    assert every == {"a": File(b"1", 0o640), "b": File(b"2", 0o640)}
    items = [{"key": "a", "path": "deep/x", "mode": 0o400}]
    assert project(DATA, items, 0o644, optional=False, what="c") == {"deep/x": File(b"1", 0o400)}


def test_a_missing_key_counts_unless_optional() -> None:
    items = [{"key": "z", "path": "z"}]
    with pytest.raises(MissingKeyError, match='secret "s" references non-existent key: z'):
        project(DATA, items, 0o644, optional=False, what='secret "s"')
    assert project(DATA, items, 0o644, optional=True, what="") == {}


def read(folder: Path) -> dict[str, bytes]:
    """What a program sees through the visible names."""
    names = [path for path in folder.iterdir() if not path.name.startswith("..")]
    files = [f for name in names for f in ([name] if name.is_file() else name.rglob("*"))]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.is_file()}


def test_one_link_switches_everything(tmp_path: Path) -> None:
    assert write(tmp_path, {"a": File(b"old"), "d/b": File(b"old")})
    before = (tmp_path / DATA_LINK).resolve()
    assert write(tmp_path, {"a": File(b"new"), "c": File(b"new", 0o600)})
    assert read(tmp_path) == {"a": b"new", "c": b"new"}
    assert (tmp_path / DATA_LINK).resolve() != before
    assert not before.exists()
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o600


def test_equal_contents_are_not_written_again(tmp_path: Path) -> None:
    payload = {"a": File(b"1"), "d/b": File(b"2", 0o400)}
    assert write(tmp_path, payload)
    before = (tmp_path / DATA_LINK).resolve()
    assert not write(tmp_path, payload)
    assert (tmp_path / DATA_LINK).resolve() == before


names = st.from_regex(r"[a-z]{1,3}", fullmatch=True)
paths = st.one_of(names, st.tuples(names, names).map("/".join))


def consistent(payload: dict[str, bytes]) -> bool:
    """No name is a file and a folder at once."""
    return not any(a.startswith(b + "/") for a in payload for b in payload)


@given(st.lists(st.dictionaries(paths, st.binary(max_size=8)).filter(consistent), max_size=4))
def test_what_was_written_last_is_there(
    tmp_path_factory: pytest.TempPathFactory, versions: list[dict[str, bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("volume")
    for version in versions:
        payload: Payload = {name: File(data) for name, data in version.items()}
        write(folder, payload)
        assert read(folder) == version
