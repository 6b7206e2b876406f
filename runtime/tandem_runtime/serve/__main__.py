"""`python -m tandem_runtime.serve`: one pod. SIGTERM drains it; exit status 64 means bad config."""

from __future__ import annotations

import os
import sys

# Before torch loads: a spinning OpenMP thread takes the core from the neighbour pod.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tandem_runtime.frontend.process import main
from tandem_runtime.serve.options import parse
from tandem_runtime.serve.run import run

if __name__ == "__main__":
    sys.exit(main(lambda: parse(sys.argv[1:], os.environ), run))
