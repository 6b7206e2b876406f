"""Contexts whose content is elsewhere: read once, by a gateway, before pods get them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

import aiohttp
import msgspec

from tandem_runtime.contract import MAX_CONTEXT_BYTES
from tandem_runtime.gateway.pod_client import PodClient, PodUnreachable
from tandem_runtime.gateway.pods import PodView
from tandem_runtime.protocol import Context

log = logging.getLogger(__name__)

AGAIN_S: Final = 15.0
_FETCH: Final = aiohttp.ClientTimeout(total=120.0, sock_connect=5.0)
_REDIRECTS: Final = 3


class SourceFailed(Exception):
    """The content cannot be read now; a sentence."""


class Sources:
    """Reads what is awaited, one task for each context, again after a while where it failed."""

    def __init__(self, client: PodClient, read: Callable[[Context], object]) -> None:
        self._client = client
        self._read = read
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._next_s: dict[str, float] = {}
        self.awaited: dict[str, Context] = {}
        """By id, without content yet."""
        self.reasons: dict[str, str] = {}
        """Why the last try failed."""

    def add(self, context: Context) -> None:
        """Read it instead of whatever has its id."""
        known = self.awaited.get(context.id)
        if known is not None and known.created_unix_s == context.created_unix_s:
            self.awaited[context.id] = context
            return
        self.drop(context.id)
        self.awaited[context.id] = context

    def drop(self, id_: str) -> None:
        self.awaited.pop(id_, None)
        self.reasons.pop(id_, None)
        self._next_s.pop(id_, None)
        if (task := self._tasks.pop(id_, None)) is not None:
            task.cancel()

    def look(self, pods: Sequence[PodView]) -> None:
        """Begin what is due."""
        for id_ in self.awaited:
            if id_ not in self._tasks and time.monotonic() >= self._next_s.get(id_, 0.0):
                self._tasks[id_] = asyncio.create_task(self._try(id_, tuple(pods)))

    async def _try(self, id_: str, pods: Sequence[PodView]) -> None:
        uri = self.awaited[id_].uri
        try:
            fleet = self.awaited[id_].fleet
            members = [pod for pod in pods if pod.fleet == fleet and pod.ready]
            text = await (self._file(uri, members) if uri.startswith("pvc://") else _fetched(uri))
        except SourceFailed as failure:
            log.warning("the context %s: %s", id_, failure)
            self.reasons[id_] = str(failure)
            self._next_s[id_] = time.monotonic() + AGAIN_S
            del self._tasks[id_]
            return
        context = self.awaited[id_]
        del self._tasks[id_]
        self.drop(id_)
        self._read(_filled(context, text))

    async def _file(self, uri: str, pods: Sequence[PodView]) -> str:
        reason = "no pod of the fleet can be asked for it"
        for pod in pods:
            try:
                return (await self._client.file(pod, uri)).text
            except PodUnreachable as error:
                reason = str(error)
        raise SourceFailed(reason)


def _filled(context: Context, text: str) -> Context:
    if not context.role:
        return msgspec.structs.replace(context, prompt=text)
    return msgspec.structs.replace(context, messages=[{"role": context.role, "content": text}])


async def _fetched(uri: str) -> str:
    """Raises `SourceFailed`."""
    try:
        async with (
            aiohttp.ClientSession(timeout=_FETCH) as session,
            session.get(uri, max_redirects=_REDIRECTS) as reply,
        ):
            if reply.status != 200:
                raise SourceFailed(f"{uri} answers {reply.status}")
            content = bytearray()
            async for chunk in reply.content.iter_any():
                content += chunk
                if len(content) > MAX_CONTEXT_BYTES:
                    raise SourceFailed(f"{uri} is larger than {MAX_CONTEXT_BYTES} bytes")
            return content.decode("utf-8")
    except UnicodeDecodeError:
        raise SourceFailed(f"{uri} is no text in UTF-8") from None
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise SourceFailed(f"{uri} cannot be read: {error or 'no answer in time'}") from error
