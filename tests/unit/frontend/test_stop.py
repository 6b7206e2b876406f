from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem_runtime.frontend.stop import StopStrings


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    shown = ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        shown += text
        if stopped:
            return shown, True
    return shown + matcher.flush(), False


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        ([], ["hello"], ("hello", False)),
        (["END"], ["one EN", "D two"], ("one ", True)),
        (["END"], ["one EN", "ding"], ("one ENding", False)),
        (["\n\n"], ["a\n", "b\n", "\nc"], ("a\nb", True)),
        (["abab"], ["aba", "c", "abab"], ("abac", True)),
        (["aab"], ["aaab"], ("a", True)),
        (["abc", "b"], ["abc"], ("a", True)),
        (["STOP", "OP"], ["xSTOP"], ("x", True)),
        (["x"], ["x"], ("", True)),
    ],
)
def test_tables(stops: list[str], pieces: list[str], expected: tuple[str, bool]) -> None:
    assert run(stops, pieces) == expected


def naive(stops: list[str], text: str) -> tuple[str, bool]:
    """Reads the text character by character, as if each were a token."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if s and text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    text=st.text("ab\nc", max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_token_borders_do_not_matter(stops: list[str], text: str, cuts: list[int]) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    assert run(stops, pieces) == naive(stops, text)


@given(text=st.text("ab", max_size=30), stop=st.text("ab", min_size=1, max_size=5))
def test_no_more_is_held_than_may_become_the_stop_string(text: str, stop: str) -> None:
    matcher = StopStrings([stop])
    shown = ""
    for n, char in enumerate(text, 1):
        piece, stopped = matcher.push(char)
        shown += piece
        if stopped:
            break
        assert n - len(shown) < len(stop)
