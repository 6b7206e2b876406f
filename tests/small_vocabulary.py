"""A byte-level vocabulary of 256 tokens, one for each byte: what a hash engine's ids spell."""

from __future__ import annotations

from tandem_runtime.protocol import TokenizerBundle
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def byte_bundle(**fields: object) -> TokenizerBundle:
    """Every byte is a token; the id of a byte is its place in the sorted alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={char: n for n, char in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    bundle = {
        "digest": "bytes",
        "tokenizer_json": raw.to_str(),
        "context_tokens": 8192,
        "vocab_size": 256,
        "eos_token_ids": (),
        "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    }
    return TokenizerBundle(**{**bundle, **fields})
