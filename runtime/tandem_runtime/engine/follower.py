"""`python -m tandem_runtime.engine.follower FD PARENT`: a rank that does what rank 0 tells it.

It ends when its channel closes, with rank 0 (whatever became of that), or with a fault of its own;
exit status 64 means that a restart does not help. Signals that stop a pod are rank 0's affair.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Final

from tandem_runtime.config import EngineConfig
from tandem_runtime.contract import EXIT_BAD_CONFIG

if TYPE_CHECKING:
    from tandem_runtime.engine.runner import TorchRunner

_PR_SET_PDEATHSIG: Final = 1


def end_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends, even a stuck one."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        sys.exit(1)


def main(channel: Connection) -> int:
    """The exit status."""
    config, rank, port = channel.recv()
    logging.basicConfig(
        level=os.environ.get("TANDEM_LOG_LEVEL", "INFO"),
        format=f"%(asctime)s %(levelname)s rank {rank}: %(message)s",
        stream=sys.stderr,
    )
    from tandem_runtime.model.parallel import RankLost  # torch takes seconds to load

    with contextlib.suppress(EOFError):
        try:
            runner = _build(config, rank, port)
            while True:
                method, args = channel.recv()
                answer = getattr(runner, method)(*args)
                if method == "read_kv":
                    channel.send_bytes(answer)
        except RankLost:
            # Another rank is gone, and is to be named: this one waits for its own end.
            while channel.recv():
                pass
    return 0


def _build(config: EngineConfig, rank: int, port: int) -> TorchRunner:
    """This rank's runner. Ends the process with a sentence where a restart does not help."""
    from tandem_runtime.checkpoint.errors import ModelError
    from tandem_runtime.checkpoint.open import open_checkpoint
    from tandem_runtime.checkpoint.source import resolve_source
    from tandem_runtime.engine.build import build_runner
    from tandem_runtime.engine.ranks import join_group

    try:
        ranks = join_group(config, rank, port)
        runner, _ = build_runner(config, open_checkpoint(resolve_source(config.model_uri)), ranks)
    except (ModelError, ValueError) as error:
        logging.error("%s", error)
        sys.exit(EXIT_BAD_CONFIG)
    return runner


if __name__ == "__main__":
    end_with(int(sys.argv[2]))
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    status = main(Connection(int(sys.argv[1])))
    # Not by way of destructors, which could wait for ranks that are gone.
    os._exit(status)
