from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tandem_runtime.frontend.detokenize import Detokenizer
from tandem_runtime.frontend.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer


def text_of(tokenizer: Tokenizer, prompt: list[int], pieces: list[list[int]]) -> str:
    detokenizer = Detokenizer(tokenizer, prompt)
    return "".join(detokenizer.push(ids) for ids in pieces) + detokenizer.flush()


class TestSmallVocabulary:
    @given(data=st.data())
    def test_pieces_are_the_text_however_the_ids_are_cut(
        self, tokenizer: Tokenizer, data: st.DataObject
    ) -> None:
        ids = data.draw(st.lists(st.integers(0, tokenizer.bundle.vocab_size - 1), max_size=40))
        assume(tokenizer.bundle.digest != "spm" or "�" not in tokenizer.decode(ids))
        cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=8))
        borders = [0, *sorted(cuts), len(ids)]
        pieces = [ids[a:b] for a, b in itertools.pairwise(borders)]
        assert text_of(tokenizer, [], pieces) == tokenizer.decode(ids)

    @given(text=st.text(max_size=60))
    def test_real_text_comes_out_character_by_character(
        self, tokenizer: Tokenizer, text: str
    ) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        detokenizer = Detokenizer(tokenizer, [])
        shown = ""
        for i in ids:
            shown += detokenizer.push([i])
            assert tokenizer.decode(ids).startswith(shown)
        assert shown + detokenizer.flush() == tokenizer.decode(ids)

    @given(
        prompt=st.text(min_size=1, max_size=20).filter(lambda t: t.isprintable()),
        text=st.text(min_size=1, max_size=20).filter(lambda t: t.isprintable()),
    )
    def test_a_continuation_keeps_its_leading_space(
        self, tokenizer: Tokenizer, prompt: str, text: str
    ) -> None:
        both = tokenizer.encode(f"{prompt} {text}", add_special_tokens=False)
        for cut in range(1, len(both) + 1):
            head = tokenizer.decode(both[:cut])
            if not head.endswith("�"):
                tail = text_of(tokenizer, both[:cut], [[i] for i in both[cut:]])
                assert head + tail == tokenizer.decode(both)


def test_half_a_character_is_held_back(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("𝄞", add_special_tokens=False)
    assert len(ids) == 4
    detokenizer = Detokenizer(byte_level, [])
    assert [detokenizer.push([i]) for i in ids] == ["", "", "", "𝄞"]
    assert detokenizer.flush() == ""


def test_many_tokens_at_once_may_end_inside_a_character(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("x" * 100 + "𝄞", add_special_tokens=False)
    assert len(ids) > 64
    assert text_of(byte_level, [], [ids[:-1], ids[-1:]]) == "x" * 100 + "𝄞"


def test_half_a_character_at_the_end_is_shown_as_such(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a𝄞", add_special_tokens=False)
    assert text_of(byte_level, [], [[i] for i in ids[:3]]) == "a�"


def test_special_tokens_have_no_text(byte_level: Tokenizer) -> None:
    ids = [*byte_level.encode("a", add_special_tokens=False), 0]
    assert text_of(byte_level, [], [[i] for i in ids]) == "a"


@pytest.mark.parametrize("nothing", [[], [1]], ids=["no ids", "a special token"])
def test_a_push_without_text_does_not_make_the_next_one_a_beginning(
    sentencepiece: Tokenizer, nothing: list[int]
) -> None:
    word = sentencepiece.encode("word", add_special_tokens=False)
    assert sentencepiece.decode([*word, *word]) == "word word"
    assert text_of(sentencepiece, [], [word, nothing, word]) == "word word"


def test_bytes_that_never_become_a_character_do_not_grow_the_window(
    byte_level: Tokenizer,
) -> None:
    broken = byte_level.encode("𝄞", add_special_tokens=False)[0]
    detokenizer = Detokenizer(byte_level, [])
    shown = [detokenizer.push([broken]) for _ in range(1000)]
    assert any(shown)
    assert "".join(shown) + detokenizer.flush() == "�" * 1000
