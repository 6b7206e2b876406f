"""`python -m tandem_runtime.serve`: one pod. SIGTERM drains it; exit status 64 means bad config."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from tandem_runtime import contract
from tandem_runtime.serve.options import BadConfig, parse


def main() -> int:
    logging.basicConfig(
        level=os.environ.get("TANDEM_LOG_LEVEL", "INFO"),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    # Before torch loads: a spinning OpenMP thread takes the core from the neighbour pod.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        options = parse(sys.argv[1:], os.environ)
        import uvloop

        from tandem_runtime.serve.run import run

        return uvloop.run(run(options))
    except BadConfig as error:
        return _give_up(f"{error}.")


def _give_up(sentence: str) -> int:
    """For whoever reads the log, and for the operator, which reads the termination message."""
    print(sentence, file=sys.stderr)
    log = Path(contract.TERMINATION_LOG)
    if log.exists():
        log.write_text(sentence)
    return contract.EXIT_BAD_CONFIG


if __name__ == "__main__":
    sys.exit(main())
