"""`python -m tandem_runtime.gateway`: serves a namespace's fleets. SIGTERM finishes its streams."""

from __future__ import annotations

import os
import sys

from tandem_runtime.frontend.process import main
from tandem_runtime.gateway.options import parse
from tandem_runtime.gateway.run import run

if __name__ == "__main__":
    sys.exit(main(lambda: parse(sys.argv[1:], os.environ), run))
