"""The Kubernetes API over HTTPS: the few verbs that a node agent and a load balancer need.

Objects are the API's own JSON. `follow` is list + watch: it survives everything an API server
does (restarts, 410 Gone, silent sockets) and says when it had to list again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import aiohttp

Object: TypeAlias = dict[str, Any]

MERGE_PATCH: Final = "application/merge-patch+json"
STRATEGIC_PATCH: Final = "application/strategic-merge-patch+json"

WATCH_S: Final = 600
SILENCE_S: Final = 90.0
"""Bookmarks come every minute, so a watch that is silent for longer has lost its socket."""
REQUEST_S: Final = 30.0
FIRST_RETRY_S: Final = 0.25
LAST_RETRY_S: Final = 10.0


log = logging.getLogger(__name__)


class ApiError(Exception):
    """The API server's refusal."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class Credentials:
    """A server and the client certificate to talk to it with."""

    server: str
    ca: Path
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Listed:
    """Everything there is now; what was known before and is not among it is gone."""

    items: list[Object]


@dataclass(frozen=True, slots=True)
class Changed:
    """One object was added, modified or deleted."""

    item: Object
    deleted: bool


class Api:
    """A client of one API server; an async context manager."""

    def __init__(
        self, server: str, tls: ssl.SSLContext | None = None, user_agent: str = "tandem"
    ) -> None:
        self._server = server
        self._tls = tls
        self._user_agent = user_agent
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def connect(cls, credentials: Credentials, user_agent: str) -> Self:
        """A client that shows a certificate and trusts one CA."""
        tls = ssl.create_default_context(cafile=str(credentials.ca))
        tls.load_cert_chain(credentials.certificate, credentials.key)
        return cls(credentials.server, tls, user_agent)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._tls or False, limit=0),
            headers={"User-Agent": self._user_agent, "Accept": "application/json"},
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def get(self, path: str, params: Mapping[str, str] | None = None) -> Object:
        """GET of an object or a list."""
        return await self._request("GET", path, params=params)

    async def create(self, path: str, body: Object) -> Object:
        """POST of a new object (or of a subresource such as `token`)."""
        return await self._request("POST", path, body=body)

    async def patch(self, path: str, body: Object, content_type: str = MERGE_PATCH) -> Object:
        """PATCH; `content_type` chooses merge or strategic merge."""
        return await self._request("PATCH", path, body=body, content_type=content_type)

    async def replace(self, path: str, body: Object) -> Object:
        """PUT."""
        return await self._request("PUT", path, body=body)

    async def delete(self, path: str, uid: str | None = None, grace_s: int | None = None) -> None:
        """DELETE, of exactly the object with `uid` if given."""
        options: Object = {"kind": "DeleteOptions", "apiVersion": "v1"}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        await self._request("DELETE", path, body=options)

    async def follow(
        self, path: str, params: Mapping[str, str] | None = None
    ) -> AsyncIterator[Listed | Changed]:
        """Lists, then yields changes for ever, listing again whenever the thread is lost."""
        selection = dict(params or {})
        retry_s = FIRST_RETRY_S
        version: str | None = None
        while True:
            try:
                if version is None:
                    listing = await self.get(path, selection)
                    version = listing["metadata"]["resourceVersion"]
                    yield Listed(listing.get("items") or [])
                async for item, deleted in self._watch(path, selection, version):
                    version = item["metadata"]["resourceVersion"]
                    retry_s = FIRST_RETRY_S
                    if deleted is not None:
                        yield Changed(item, deleted)
            except ApiError as error:
                if error.status == 410:
                    version = None
                    continue
                log.warning("watch of %s: %s", path, error)
            except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError) as error:
                log.warning("watch of %s: %s", path, error or type(error).__name__)
            await asyncio.sleep(retry_s * random.uniform(0.5, 1.0))
            retry_s = min(LAST_RETRY_S, retry_s * 2)

    async def _watch(
        self, path: str, selection: Mapping[str, str], version: str
    ) -> AsyncIterator[tuple[Object, bool | None]]:
        """Yields (object, deleted); deleted is None for a bookmark: it only moves the version."""
        assert self._session is not None
        params = {
            **selection,
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_S),
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=SILENCE_S)
        async with self._session.get(
            self._server + path, params=params, timeout=timeout, read_bufsize=2**22
        ) as answer:
            await _raise_for_status(answer)
            async for line in answer.content:
                event = json.loads(line)
                kind, item = event["type"], event["object"]
                if kind == "ERROR":
                    raise ApiError(item.get("code", 500), item.get("reason", ""), item["message"])
                yield item, None if kind == "BOOKMARK" else kind == "DELETED"

    async def _request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
    ) -> Object:
        assert self._session is not None, "use `async with Api(...)`"
        async with self._session.request(
            method,
            self._server + path,
            params=params,
            data=None if body is None else json.dumps(body),
            headers={} if body is None else {"Content-Type": content_type},
            timeout=aiohttp.ClientTimeout(total=REQUEST_S, sock_connect=5),
        ) as answer:
            await _raise_for_status(answer)
            result: Object = await answer.json()
            return result


async def _raise_for_status(answer: aiohttp.ClientResponse) -> None:
    if answer.status < 400:
        return
    text = await answer.text()
    try:
        status = json.loads(text)
        raise ApiError(answer.status, status.get("reason", ""), status.get("message", text))
    except json.JSONDecodeError:
        raise ApiError(answer.status, answer.reason or "", text[:500]) from None
