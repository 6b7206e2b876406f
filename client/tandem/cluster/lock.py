"""One `tandem up` or `tandem down` at a time for each cluster name."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

from tandem.cluster.paths import state_home


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Waits for whoever starts or ends the cluster of that name."""
    home = state_home()
    home.mkdir(parents=True, exist_ok=True)
    with (home / f".{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
