"""From an `EngineConfig` to an engine that is ready to step."""

from __future__ import annotations

from tandem_runtime.config import EngineConfig
from tandem_runtime.engine.engine import Engine


def build_engine(config: EngineConfig, *, prefix_secret: bytes = b"") -> Engine:
    """Load the model, size the KV cache, warm up.

    Args:
        config: what to load and how much memory to take.
        prefix_secret: the fleet's handoff secret, from which prefix keys are derived.

    Raises:
        ModelError: the weights cannot be served; the sentence says why.
        ValueError: the configuration and the model do not fit (context, memory).
    """
    raise NotImplementedError
