"""From options to an engine that has answered a prompt, and its tokenizer. Loads torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from tandem_runtime.engine.build import build_engine
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request
from tandem_runtime.frontend.process import BadConfig
from tandem_runtime.frontend.vocabulary import (
    VocabularyError,
    bundle_from_folder,
    bundle_from_gguf,
)
from tandem_runtime.model.checkpoint import Checkpoint, open_checkpoint
from tandem_runtime.model.errors import ModelError
from tandem_runtime.model.source import resolve_source
from tandem_runtime.protocol import Sampling, TokenizerBundle
from tandem_runtime.serve.options import ServeOptions

log = logging.getLogger(__name__)


def load_engine(options: ServeOptions) -> Engine:
    """To be called in the engine's thread. Raises `BadConfig` for what a restart cannot mend."""
    began_s = time.monotonic()
    with _bad_config():
        engine = build_engine(options.engine, prefix_secret=options.secret)
    _check(engine)
    log.info("engine ready after %.1f s", time.monotonic() - began_s)
    return engine


def load_bundle(options: ServeOptions, engine: Engine) -> TokenizerBundle:
    """Raises `BadConfig`."""
    with _bad_config():
        checkpoint = open_checkpoint(resolve_source(options.engine.model_uri))
        bundle = _bundle(checkpoint, engine)
    # What the model computes decides: a padded vocabulary may be larger than the tokenizer's.
    return msgspec.structs.replace(
        bundle,
        vocab_size=engine.vocab_size,
        eos_token_ids=tuple(sorted(engine.eos_token_ids)),
        block_tokens=engine.block_tokens,
    )


@contextmanager
def _bad_config() -> Iterator[None]:
    try:
        yield
    except (ModelError, VocabularyError, ValueError) as error:
        raise BadConfig(str(error)) from error


def _bundle(checkpoint: Checkpoint, engine: Engine) -> TokenizerBundle:
    digest, cache_root = checkpoint.digest(), engine.layout_hash.hex()
    # A stream has to fit the pool alone, however long a context the model was made for.
    context_tokens = min(engine.max_context_tokens, engine.kv_capacity_tokens)
    if checkpoint.gguf is not None:
        return bundle_from_gguf(
            checkpoint.gguf.metadata,
            digest=digest,
            context_tokens=context_tokens,
            cache_root=cache_root,
        )
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    return bundle_from_folder(
        folder, digest=digest, context_tokens=context_tokens, cache_root=cache_root
    )


def _check(engine: Engine) -> None:
    """A prompt through the whole engine, before anybody's request goes through it."""
    sampling = Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)
    engine.add(Request("self-check", [0] * (engine.block_tokens + 1), sampling))
    tokens = []
    while engine.has_work:
        tokens += [s.token for s in engine.step().streams if s.token is not None]
    if len(tokens) != sampling.max_tokens:
        raise RuntimeError(f"the self-check prompt gave {len(tokens)} tokens instead of 4")
    engine.check_integrity()
