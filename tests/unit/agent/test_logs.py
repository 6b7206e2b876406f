from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.agent import logs
from tandem.agent.logs import LogOptions, LogOptionsError, parse, select, tail_offset, tail_text
from tandem.agent.shim import logwriter
from tandem.agent.shim.logwriter import LINE_LIMIT_BYTES, LogWriter


def render(path: Path, options: LogOptions | None = None, offset: int = 0) -> bytes:
    return b"".join(select(path.read_bytes()[offset:].split(b"\n"), options or LogOptions()))


def written(path: Path, *pieces: bytes) -> Path:
    writer = LogWriter(str(path))
    for piece in pieces:
        writer.feed("stdout", piece)
    writer.close()
    return path


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    path = written(tmp_path / "log", b"one\ntw", b"o\n\nlast without newline")
    assert render(path) == b"one\ntwo\n\nlast without newline"


@given(st.lists(st.binary(max_size=50)))
def test_any_bytes_in_any_pieces_come_out(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]
) -> None:
    path = written(tmp_path_factory.mktemp("logs") / "log", *pieces)
    assert render(path) == b"".join(pieces)


def test_long_lines_are_cut_into_partial_records(tmp_path: Path) -> None:
    line = b"x" * (2 * LINE_LIMIT_BYTES + 10)
    path = written(tmp_path / "log", line + b"\nshort\n")
    tags = [record.partial for r in path.read_bytes().split(b"\n")[:-1] if (record := parse(r))]
    assert tags == [True, True, False, False]
    assert render(path) == line + b"\nshort\n"


def test_timestamps_and_since(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(
        b"2026-01-01T00:00:00.000000001Z stdout F old\n"
        b"2026-01-01T00:00:01.500000000Z stderr F new\n"
    )
    assert render(path, LogOptions(since="2026-01-01T00:00:01")) == b"new\n"
    stamped = b"2026-01-01T00:00:01.500000000Z new\n"
    assert render(path, LogOptions(timestamps=True)).endswith(stamped)


def test_damaged_records_are_passed_over() -> None:
    assert parse(b"") is None
    assert parse(b"2026 stdout") is None
    assert parse(b"2026 stdout X text") is None


def test_tail(tmp_path: Path) -> None:
    path = written(tmp_path / "log", *(f"line {n}\n".encode() for n in range(100)))
    assert render(path, offset=tail_offset(path, 2)) == b"line 98\nline 99\n"
    assert render(path, offset=tail_offset(path, 0)) == b""
    assert render(path, offset=tail_offset(path, 1000)).startswith(b"line 0\n")


def test_a_cut_line_is_one_line_of_a_tail(tmp_path: Path) -> None:
    long = b"x" * (3 * LINE_LIMIT_BYTES)
    path = written(tmp_path / "log", b"first\n", long + b"\n", b"last\n")
    assert render(path, offset=tail_offset(path, 2)) == long + b"\nlast\n"


@given(
    lines=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    wanted=st.integers(1, 35),
    block=st.integers(1, 200),
)
def test_tail_does_not_depend_on_the_block(
    tmp_path_factory: pytest.TempPathFactory, lines: list[int], wanted: int, block: int
) -> None:
    path = tmp_path_factory.mktemp("logs") / "log"
    text = [b"x" * size + str(n).encode() + b"\n" for n, size in enumerate(lines)]
    written(path, *text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "TAIL_BLOCK_BYTES", block)
        assert render(path, offset=tail_offset(path, wanted)) == b"".join(text[-wanted:])


def test_options_of_kubectl() -> None:
    query = {
        "follow": "true",
        "previous": "true",
        "timestamps": "true",
        "tailLines": "5",
        "limitBytes": "10",
        "sinceSeconds": "60",
    }
    options = LogOptions.from_query(query, now_s=1_700_000_060.0)
    assert options == LogOptions(True, True, True, 5, 10, "2023-11-14T22:13:20.000000000Z")
    since = LogOptions.from_query({"sinceTime": "2026-01-01T02:00:00+02:00"}, 0.0).since
    assert since == "2026-01-01T00:00:00.000000000Z"


@pytest.mark.parametrize("query", [{"tailLines": "x"}, {"sinceTime": "now"}, {"limitBytes": ""}])
def test_bad_options_are_refused_with_a_sentence(query: dict[str, str]) -> None:
    with pytest.raises(LogOptionsError, match=next(iter(query))):
        LogOptions.from_query(query, 0.0)


def test_the_end_of_a_log_as_a_message(tmp_path: Path) -> None:
    path = written(tmp_path / "log", b"a\nb\nc\n")
    assert tail_text(path, 2, 100) == "b\nc\n"
    assert tail_text(path, 2, 2) == "c\n"
    assert tail_text(tmp_path / "none", 2, 2) == ""


def test_a_full_log_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logwriter, "FILE_LIMIT_BYTES", 200)
    path = written(tmp_path / "log", *(f"line {n}\n".encode() for n in range(20)))
    assert path.stat().st_size <= 200
    older = tmp_path / "log.1"
    both = render(older) + render(path)
    assert both.splitlines()[-1] == b"line 19"
    numbers = [int(line.split()[1]) for line in both.splitlines()]
    assert numbers == list(range(numbers[0], 20))
