"""What the resolver says of a model: one JSON object of at most 4 KiB."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.open import Checkpoint, open_checkpoint
from tandem_runtime.checkpoint.quantization import loaded_bytes, quantized_names
from tandem_runtime.checkpoint.source import resolve_source
from tandem_runtime.kv.layout import ITEM_BYTES, KvLayout
from tandem_runtime.model.sharding import check_fits, sizes_that_fit

MAX_BYTES: Final = 4096
"""What Kubernetes keeps of a termination message."""
_MAX_MESSAGE_CHARACTERS: Final = 600


def resolve(
    uri: str,
    dtype: str,
    max_context_tokens: int | None,
    weights: str = "none",
    kv_cache: str = "auto",
    exclude: Collection[str] = (),
) -> dict[str, Any]:
    """The resolver's answer, for a model that can be served or not.

    Args:
        uri: where it is.
        dtype: what it is to be computed in.
        max_context_tokens: as for `ModelConfig.limit_context`.
        weights, kv_cache: what they are to be quantised to, as `EngineConfig` names it.
        exclude: the same as its `weights_exclude`.
    """
    try:
        checkpoint = open_checkpoint(resolve_source(uri, headers_only=True))
        weights = checkpoint.form(weights, exclude)
        check_fits(checkpoint.config, 1, weights)
        kv_dtype = dtype if kv_cache == "auto" else kv_cache
        answer = _success(checkpoint, max_context_tokens, weights, kv_dtype)
        return answer | {"loadedBytes": _loaded_bytes(checkpoint, weights, dtype, exclude)}
    except ModelError as error:
        return _failure(error.reason, error.message)
    except OSError as error:
        return _failure("WeightsMissing", f"{uri} cannot be read: {error}")


def _success(
    checkpoint: Checkpoint,
    max_context_tokens: int | None,
    weights: str,
    kv_dtype: str,
) -> dict[str, Any]:
    config = checkpoint.config
    layout = KvLayout(config.layers, config.kv_heads, config.head_dim, kv_dtype)
    return {
        "ok": True,
        "architecture": config.architecture,
        "format": checkpoint.format,
        "digest": checkpoint.digest(),
        "parameters": checkpoint.parameters,
        "weightsBytes": checkpoint.weights_bytes,
        "kvBytesPerToken": layout.token_bytes,
        "layers": config.layers,
        "heads": config.heads,
        "kvHeads": config.kv_heads,
        "headDim": config.head_dim,
        "vocabSize": config.vocab_size,
        "tensorParallelSizes": sizes_that_fit(config, weights),
        "contextTokens": config.limit_context(max_context_tokens),
    }


def _loaded_bytes(
    checkpoint: Checkpoint, weights: str, dtype: str, exclude: Collection[str]
) -> int:
    config = checkpoint.config
    quantized = checkpoint.fp8_weights if checkpoint.stored else quantized_names(config, exclude)
    return loaded_bytes(config, weights, ITEM_BYTES[dtype], quantized)


def _failure(reason: str, message: str) -> dict[str, Any]:
    return {"ok": False, "reason": reason, "message": message[:_MAX_MESSAGE_CHARACTERS]}
