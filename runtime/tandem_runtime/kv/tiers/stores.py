"""Stores on the network that keep records for several pods: Valkey or Redis, and S3.

A store knows names and bytes; what they mean is `remote`'s. It raises `StoreError` for whatever
may go wrong on the way, within the time-outs below.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Final, Protocol
from urllib.parse import unquote, urlsplit

log = logging.getLogger(__name__)

VALKEY_SCHEMES: Final = ("valkey", "valkeys", "redis", "rediss")
SCHEMES: Final = (*VALKEY_SCHEMES, "s3")
CONNECT_S: Final = 1.0
"""To connect."""
SILENT_S: Final = 2.0
"""For which a server may send nothing, or take nothing."""
_OBJECT_S: Final = 10.0
"""For one object, whole."""
_READ_BYTES: Final = 8 << 20
"""At once from a socket: with the usual 64 KiB a page takes three times as long."""
_TRIP_BYTES: Final = 8 << 20
"""Values that one round trip carries, or one value: more at once are slower to take in."""
_OBJECTS_AT_ONCE: Final = 4


class StoreError(Exception):
    """It did not work; `reason` is for metrics, and the text for people."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Store(Protocol):
    """Used by one thread."""

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        """Their values; None for what is not there."""

    def put(self, records: Sequence[tuple[str, bytes]]) -> None:
        """Keep these; a name that is there gets the new value."""

    def close(self) -> None: ...


def open_store(uri: str, credentials: Mapping[str, str], *, ttl_s: int, value_bytes: int) -> Store:
    """The store that a URI names; nothing is asked of it yet.

    Args:
        uri: `valkey://HOST:PORT/DB`, `redis://...`, with TLS `valkeys://` or `rediss://`, or
            `s3://BUCKET/PREFIX`.
        credentials: USERNAME, PASSWORD and CA_CERT (PEM) of a server; AWS_* of S3.
        ttl_s: for which a value is kept after its last use. S3 forgets by its own rules.
        value_bytes: about the size of a value.

    Raises:
        ValueError: it names none; the sentence says what is wrong.
    """
    check_uri(uri)
    if urlsplit(uri).scheme == "s3":
        return ObjectStore(uri, credentials)
    return ValkeyStore(uri, credentials, ttl_s=ttl_s, value_bytes=value_bytes)


def check_uri(uri: str) -> None:
    """Raises ValueError unless it names a store."""
    parts = urlsplit(uri)
    if parts.scheme not in SCHEMES or not parts.hostname:
        raise ValueError(
            f"{uri} names no store: write valkey://HOST:6379, rediss://HOST:6379 for TLS, or "
            "s3://BUCKET/PREFIX"
        )
    if parts.username or parts.password:
        raise ValueError(
            f"the URI of {parts.hostname} carries a name or password, which everybody can read "
            "there: put USERNAME and PASSWORD into a Secret"
        )
    if parts.query or parts.fragment:
        raise ValueError(f"{uri}: leave out ? and # and what follows")
    database = parts.path.strip("/")
    if parts.scheme != "s3" and database and not database.isdecimal():
        raise ValueError(f"{uri}: behind the host may stand the number of a database, nothing else")
    try:
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"{uri}: the port is no number from 1 to 65535") from error


class ValkeyStore:
    """Implements `Store` with the `valkey` client, which also speaks to Redis."""

    def __init__(
        self, uri: str, credentials: Mapping[str, str], *, ttl_s: int, value_bytes: int
    ) -> None:
        from valkey import ConnectionPool, SSLConnection, Valkey
        from valkey.backoff import NoBackoff
        from valkey.retry import Retry

        parts = urlsplit(uri)
        options: dict[str, Any] = {
            "host": parts.hostname,
            "port": parts.port or 6379,
            "db": int(parts.path.strip("/") or 0),
            "username": credentials.get("USERNAME"),
            "password": credentials.get("PASSWORD"),
            "socket_connect_timeout": CONNECT_S,
            "socket_timeout": SILENT_S,
            "socket_read_size": _READ_BYTES,
            "retry": Retry(NoBackoff(), 0),
        }
        if parts.scheme in ("rediss", "valkeys"):
            options |= {"connection_class": SSLConnection, "ssl_check_hostname": True}
            if credentials.get("CA_CERT"):
                options["ssl_ca_data"] = credentials["CA_CERT"]
        self._client: Any = Valkey(connection_pool=ConnectionPool(**options))
        self._ttl_s = ttl_s
        self._at_once = max(1, _TRIP_BYTES // value_bytes)

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        found: list[bytes | None] = []
        for first in range(0, len(names), self._at_once):
            trip = self._client.pipeline(transaction=False)
            for name in names[first : first + self._at_once]:
                trip.getex(name, ex=self._ttl_s)
            found += self._ask(trip)
        return found

    def put(self, records: Sequence[tuple[str, bytes]]) -> None:
        for first in range(0, len(records), self._at_once):
            trip = self._client.pipeline(transaction=False)
            for name, value in records[first : first + self._at_once]:
                trip.set(name, value, ex=self._ttl_s)
            self._ask(trip)

    def close(self) -> None:
        self._client.close()

    @staticmethod
    def _ask(trip: Any) -> list[Any]:
        from valkey import exceptions

        try:
            # What it raises by itself quotes the command, a page and all.
            answers: list[Any] = trip.execute(raise_on_error=False)
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
        except exceptions.TimeoutError as error:
            raise StoreError("slow", str(error)) from error
        except exceptions.OutOfMemoryError as error:
            raise StoreError("full", str(error)) from error
        except (exceptions.AuthenticationError, exceptions.ResponseError) as error:
            raise StoreError("refused", str(error)) from error
        except (exceptions.ValkeyError, OSError) as error:
            raise StoreError("unreachable", str(error)) from error
        return answers


class ObjectStore:
    """Implements `Store` with `obstore`: an object for each page."""

    def __init__(self, uri: str, credentials: Mapping[str, str]) -> None:
        from obstore.store import S3Store

        parts = urlsplit(uri)
        config: Any = {
            name.lower(): value for name, value in credentials.items() if name.startswith("AWS_")
        }
        client: Any = {
            "allow_http": True,
            "connect_timeout": f"{int(CONNECT_S * 1000)}ms",
            "timeout": f"{int(_OBJECT_S * 1000)}ms",
        }
        retries: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=_OBJECT_S)}
        self._store = S3Store(
            parts.netloc,
            prefix=unquote(parts.path).strip("/") or None,
            config=config,
            client_options=client,
            retry_config=retries,
        )
        self._pool = ThreadPoolExecutor(_OBJECTS_AT_ONCE, thread_name_prefix="s3-tier")

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        return list(self._pool.map(self._get, names))

    def put(self, records: Sequence[tuple[str, bytes]]) -> None:
        list(self._pool.map(self._put, records))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _get(self, name: str) -> bytes | None:
        import obstore

        try:
            return obstore.get(self._store, name).bytes().to_bytes()
        except FileNotFoundError:
            return None
        except Exception as error:
            raise _object_error(error) from error

    def _put(self, record: tuple[str, bytes]) -> None:
        import obstore

        try:
            obstore.put(self._store, record[0], record[1], use_multipart=False)
        except Exception as error:
            raise _object_error(error) from error


def _object_error(error: Exception) -> StoreError:
    from obstore import exceptions

    text = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
    if isinstance(error, FileNotFoundError):
        return StoreError("refused", f"there is no such bucket: {text}")
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        return StoreError("refused", text)
    return StoreError("slow" if "timed out" in str(error) else "unreachable", text)
