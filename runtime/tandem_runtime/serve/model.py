"""The model's files as a serving pod reads them before and beside the weights. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from tandem_runtime.engine.engine import Engine
from tandem_runtime.frontend.process import BadConfig
from tandem_runtime.frontend.vocabulary import (
    VocabularyError,
    bundle_from_folder,
    bundle_from_gguf,
)
from tandem_runtime.model.checkpoint import Checkpoint, open_checkpoint
from tandem_runtime.model.errors import ModelError
from tandem_runtime.model.source import resolve_source
from tandem_runtime.protocol import TokenizerBundle


@contextmanager
def no_restart_helps() -> Iterator[None]:
    """Turns what is wrong with model or configuration into `BadConfig`."""
    try:
        yield
    except (ModelError, VocabularyError, ValueError) as error:
        raise BadConfig(str(error)) from error


def open_model(uri: str) -> Checkpoint:
    """Reads headers alone, so a wrong URI or a damaged file is told at once. Raises `BadConfig`."""
    with no_restart_helps():
        return open_checkpoint(resolve_source(uri))


def bundle_of(checkpoint: Checkpoint, engine: Engine) -> TokenizerBundle:
    """The tokenizer for clients of this engine. Raises `BadConfig`."""
    digest, cache_root = checkpoint.digest(), engine.layout_hash.hex()
    # A stream has to fit the pool alone, however long a context the model was made for.
    context_tokens = min(engine.max_context_tokens, engine.kv_capacity_tokens)
    with no_restart_helps():
        if checkpoint.gguf is not None:
            bundle = bundle_from_gguf(
                checkpoint.gguf.metadata,
                digest=digest,
                context_tokens=context_tokens,
                cache_root=cache_root,
            )
        else:
            folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
            bundle = bundle_from_folder(
                folder, digest=digest, context_tokens=context_tokens, cache_root=cache_root
            )
    # What the model computes decides: a padded vocabulary may be larger than the tokenizer's.
    return msgspec.structs.replace(
        bundle,
        vocab_size=engine.vocab_size,
        eos_token_ids=tuple(sorted(engine.eos_token_ids)),
        block_tokens=engine.block_tokens,
    )
