"""A byte-level vocabulary of 256 tokens, one for each byte: what a hash engine's ids spell."""

from __future__ import annotations

from tandem_runtime.checkpoint.byte_tokens import byte_tokenizer
from tandem_runtime.protocol import TokenizerBundle


def byte_bundle(**fields: object) -> TokenizerBundle:
    """Every byte is a token; the id of a byte is its place in the sorted alphabet."""
    bundle = {
        "digest": "bytes",
        "tokenizer_json": byte_tokenizer().to_str(),
        "context_tokens": 8192,
        "vocab_size": 256,
        "eos_token_ids": (),
        "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    }
    return TokenizerBundle(**{**bundle, **fields})
