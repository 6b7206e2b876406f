"""The model's files as a serving pod reads them before and beside the weights. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.open import Checkpoint, open_checkpoint
from tandem_runtime.checkpoint.source import resolve_source
from tandem_runtime.config import EngineConfig
from tandem_runtime.engine.engine import Engine
from tandem_runtime.frontend.chat import ChatTemplate
from tandem_runtime.frontend.process import BadConfig
from tandem_runtime.frontend.vocabulary import (
    VocabularyError,
    bundle_from_folder,
    bundle_from_gguf,
)
from tandem_runtime.model.sharding import check_fits
from tandem_runtime.protocol import TokenizerBundle


@contextmanager
def no_restart_helps() -> Iterator[None]:
    """Turns what is wrong with model or configuration into `BadConfig`."""
    try:
        yield
    except (ModelError, VocabularyError, ValueError) as error:
        if isinstance(error, ModelError) and error.reason == "SourceUnreachable":
            raise
        raise BadConfig(str(error)) from error


def open_model(config: EngineConfig) -> Checkpoint:
    """Reads headers alone, so a wrong URI or a damaged file is told at once. Raises `BadConfig`."""
    with no_restart_helps():
        checkpoint = open_checkpoint(resolve_source(config.model_uri))
        form = checkpoint.form(config.weights, config.weights_exclude)
        check_fits(checkpoint.config, config.tensor_parallel, form)
    return checkpoint


def read_bundle(checkpoint: Checkpoint) -> TokenizerBundle:
    """The tokenizer and the chat template of the model's files. Raises `BadConfig`."""
    digest, context_tokens = checkpoint.digest(), checkpoint.config.context_tokens
    with no_restart_helps():
        if checkpoint.gguf is not None:
            metadata = checkpoint.gguf.metadata
            bundle = bundle_from_gguf(metadata, digest=digest, context_tokens=context_tokens)
        else:
            folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
            bundle = bundle_from_folder(folder, digest=digest, context_tokens=context_tokens)
        if bundle.chat_template is not None:
            ChatTemplate(bundle.chat_template, bundle.special_tokens)
    return bundle


def fitted(bundle: TokenizerBundle, engine: Engine) -> TokenizerBundle:
    """The bundle for clients of this engine.

    What the model computes decides: a padded vocabulary may be larger than the tokenizer's.
    """
    return msgspec.structs.replace(
        bundle,
        # A stream has to fit the pool alone, however long a context the model was made for.
        context_tokens=min(engine.max_context_tokens, engine.kv_capacity_tokens),
        vocab_size=engine.vocab_size,
        eos_token_ids=tuple(sorted(engine.eos_token_ids)),
        block_tokens=engine.block_tokens,
        cache_root=engine.layout_hash.hex(),
    )
