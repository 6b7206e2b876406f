"""One `tandem up` or `tandem down` at a time for each cluster name.

Each name locks one byte of one file, so that nothing is left of a cluster that is gone; two names
that share a byte only wait for each other.
"""

from __future__ import annotations

import fcntl
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from tandem.cluster.paths import state_home


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Waits for the process that starts or ends the cluster of that name."""
    home = state_home()
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".lock").open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, zlib.crc32(name.encode()))
        yield
