"""From options to an engine that has answered a prompt. Loads torch, which takes seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from tandem_runtime.engine.build import build_engine
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request
from tandem_runtime.frontend.process import BadConfig
from tandem_runtime.protocol import Sampling
from tandem_runtime.serve.model import no_restart_helps
from tandem_runtime.serve.options import ServeOptions
from tandem_runtime.serve.worker import EngineFailed

log = logging.getLogger(__name__)


def load_engine(options: ServeOptions, fail: Callable[[Exception], None]) -> Engine:
    """To be called in the engine's thread. Raises `BadConfig` for what a restart cannot mend.

    Args:
        options: what to load.
        fail: called from another thread where the engine cannot go on, then or later, although its
            own thread may not know it; see `EngineWorker.fail`.
    """

    def lost(error: Exception) -> None:
        told = f"the engine failed: {error}"
        fail(BadConfig(told) if isinstance(error, ValueError) else EngineFailed(told))

    began_s = time.monotonic()
    with no_restart_helps():
        engine = build_engine(options.engine, prefix_secret=options.secret, lost=lost)
    _check(engine)
    log.info("engine ready after %.1f s", time.monotonic() - began_s)
    if options.engine.pace is not None:
        log.warning("paced: steps take as long as those of %s", options.engine.stated_name)
    return engine


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
