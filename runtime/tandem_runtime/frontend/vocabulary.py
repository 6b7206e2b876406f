"""Vocabularies as models carry them -> `TokenizerBundle`.

Two sources: the metadata of a GGUF file, and a folder with `tokenizer.json`. A vocabulary that
cannot be expressed exactly is refused by name: a nearly right tokenizer gives fluent nonsense.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from tandem_runtime.protocol import TokenizerBundle


class VocabularyError(ValueError):
    """A vocabulary that we cannot express; the message says what is supported."""


class _TokenType(IntEnum):
    """`tokenizer.ggml.token_type` (gguf's TokenType)."""

    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


_LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _digits() -> PreTokenizer:
    # The digits are cut out first: a space before a digit is a token of its own.
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


_PRE_TOKENIZERS: Final[Mapping[str, Callable[[], PreTokenizer]]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "smollm": _digits,
    "llama-bpe": lambda: _split(_LLAMA3),
    "llama3": lambda: _split(_LLAMA3),
    "llama-v3": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
}
_WHOLE_WORDS_FIRST: Final = frozenset({"llama-bpe", "llama3", "llama-v3"})
"""Vocabularies in which a word that is a token is never built from merges."""


def bundle_from_gguf(
    metadata: Mapping[str, Any], *, digest: str, context_tokens: int, cache_root: str = ""
) -> TokenizerBundle:
    """`metadata` maps GGUF keys to plain Python values (strings, numbers, lists).

    Raises `VocabularyError` for a tokenizer that is not `gpt2` or `llama`, and for a pre-tokenizer
    that is not in the list of the message.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata)
    else:
        raise VocabularyError(
            f"the GGUF file's tokenizer is {kind!r}; supported are 'gpt2' (byte-level BPE) "
            "and 'llama' (SentencePiece BPE)"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    tokenizer.add_special_tokens(_added(tokens, types, _TokenType.CONTROL, special=True))
    tokenizer.add_tokens(_added(tokens, types, _TokenType.USER_DEFINED, special=False))

    def token_id(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if value is None else int(value)

    pre = metadata.get("tokenizer.ggml.pre")
    bos_by_default = kind == "llama" or pre in _WHOLE_WORDS_FIRST
    ends = [token_id(name) for name in ("eos", "eot", "eom")]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: token_id(key) for name, key in names.items()}
    return TokenizerBundle(
        digest=digest,
        tokenizer_json=tokenizer.to_str(),
        context_tokens=context_tokens,
        vocab_size=len(tokens),
        eos_token_ids=tuple(dict.fromkeys(e for e in ends if e is not None)),
        bos_token_id=ids["bos_token"],
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", bos_by_default))
        and ids["bos_token"] is not None,
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens={name: tokens[i] for name, i in ids.items() if i is not None},
        cache_root=cache_root,
    )


def _byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in _PRE_TOKENIZERS:
        raise VocabularyError(
            f"the GGUF file's pre-tokenizer is {pre!r}; supported are "
            + ", ".join(sorted(_PRE_TOKENIZERS))
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    model = models.BPE(
        vocab={token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])},
        merges=merges,
        ignore_merges=pre in _WHOLE_WORDS_FIRST,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece BPE: the merges follow from the scores (as transformers rebuilds them)."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    scores: list[float] = metadata["tokenizer.ggml.scores"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == 2), None)
    model = models.BPE(
        vocab=vocab,
        merges=_merges_from_scores(vocab, scores),
        fuse_unk=True,
        byte_fallback=True,
        unk_token=unknown,
    )
    tokenizer = Tokenizer(model)
    prefix_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first" if prefix_space else "never", split=False
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix_space:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_from_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    merges: list[tuple[float, int, int, int, str, str]] = []
    for token, index in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                merges.append((-scores[index], -len(left), -len(right), index, left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _added(
    tokens: Iterable[str], types: Iterable[int], kind: _TokenType, *, special: bool
) -> list[AddedToken]:
    return [
        AddedToken(token, normalized=False, special=special)
        for token, token_type in zip(tokens, types, strict=True)
        if token_type == kind
    ]


def bundle_from_folder(
    folder: Path, *, digest: str, context_tokens: int, cache_root: str = ""
) -> TokenizerBundle:
    """Reads tokenizer.json, tokenizer_config.json, generation_config.json, chat_template.jinja.

    Raises `VocabularyError` where tokenizer.json is missing or broken, or where its post-processor
    does more than put one token in front.
    """
    path = folder / "tokenizer.json"
    try:
        text = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
    except FileNotFoundError:
        raise VocabularyError(
            f"{path} is missing; export it with transformers' save_pretrained()"
        ) from None
    except Exception as error:  # the library raises bare Exception
        raise VocabularyError(f"{path} cannot be read: {error}") from error
    config = _json(folder / "tokenizer_config.json")
    special = {
        name: content
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if (content := _content(config.get(name))) is not None
    }
    added_first = _tokens_put_in_front(tokenizer, path)
    bos = tokenizer.token_to_id(special["bos_token"]) if "bos_token" in special else None
    if added_first is not None and bos is None:
        bos = added_first
    explicit = config.get("add_bos_token")
    add_bos = explicit if isinstance(explicit, bool) else added_first is not None
    return TokenizerBundle(
        digest=digest,
        tokenizer_json=text,
        context_tokens=context_tokens,
        vocab_size=tokenizer.get_vocab_size(with_added_tokens=True),
        eos_token_ids=_eos_ids(folder, tokenizer, special.get("eos_token")),
        bos_token_id=bos,
        add_bos=add_bos and bos is not None,
        chat_template=_chat_template(folder, config),
        special_tokens=special,
        cache_root=cache_root,
    )


def _tokens_put_in_front(tokenizer: Tokenizer, path: Path) -> int | None:
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    if full == bare:
        return None
    if full[1:] == bare:
        return int(full[0])
    raise VocabularyError(
        f"{path}: the post-processor turns {bare} into {full}; "
        "only one token in front of the prompt is supported"
    )


def _eos_ids(folder: Path, tokenizer: Tokenizer, eos_token: str | None) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        value = _json(folder / name).get("eos_token_id")
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list) and value:
            return tuple(int(v) for v in value)
    index = tokenizer.token_to_id(eos_token) if eos_token else None
    return () if index is None else (index,)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates: the plain one
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template


def _content(token: object) -> str | None:
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VocabularyError(f"{path} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}
