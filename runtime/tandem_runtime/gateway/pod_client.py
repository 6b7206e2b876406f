"""HTTP from the gateway to pods: one connection for each stream, small calls beside."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Final, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

from tandem_runtime import contract
from tandem_runtime.gateway.pods import PodView
from tandem_runtime.page_events import PageEvents
from tandem_runtime.protocol import (
    Context,
    ContextCopies,
    ContextCopy,
    FileText,
    GenerateEvent,
    GenerateRequest,
    HeldStream,
    HeldStreams,
    PodState,
    TokenizerBundle,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

_CONNECT_S: Final = 2.0
_LINE_BYTES: Final = 4 << 20
_SMALL_CALL: Final = aiohttp.ClientTimeout(total=2.0)
_LIST_CALL: Final = aiohttp.ClientTimeout(total=5.0)
_CONTENT_CALL: Final = aiohttp.ClientTimeout(total=30.0, sock_connect=_CONNECT_S)
_TOKENIZER_CALL: Final = aiohttp.ClientTimeout(total=30.0)
_STREAM: Final = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)


class PodUnreachable(Exception):
    """The pod did not answer, broke off, or refused this gateway; the message says which."""


class PodRefused(PodUnreachable):
    """The pod answered that it cannot do what it is asked; the message is its sentence."""


class PodClient:
    def __init__(self, handoff_secret: bytes) -> None:
        headers = {"authorization": f"Bearer {contract.pod_token(handoff_secret)}"}
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            read_bufsize=_LINE_BYTES,
            auto_decompress=False,
        )
        self._replies: dict[str, set[aiohttp.ClientResponse]] = {}
        """Streams that run now, by pod uid."""
        self._heard_s: dict[str, float] = {}
        self._cancelling: set[asyncio.Task[None]] = set()
        self._encode = msgspec.json.Encoder().encode
        self._event = msgspec.json.Decoder(GenerateEvent)

    async def close(self) -> None:
        await asyncio.gather(*self._cancelling)
        await self._session.close()

    async def generate(
        self, pod: PodView, request: GenerateRequest
    ) -> AsyncGenerator[GenerateEvent, None]:
        """The pod's events. Raises `PodUnreachable`; closing it cancels the attempt."""
        ended = False
        try:
            async with self._session.post(
                _url(pod, contract.PATH_GENERATE),
                data=self._encode(request),
                headers={"content-type": "application/json"},
                timeout=_STREAM,
            ) as reply:
                if reply.status != 200:
                    raise PodUnreachable(f"pod {pod.name} answered {await _complaint(reply)}")
                with self._live(pod.uid, reply):
                    async for line in reply.content:
                        self._heard_s[pod.uid] = time.monotonic()
                        event = self._event.decode(line)
                        ended = event.error is not None or event.finish_reason is not None
                        yield event
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, RecursionError) as error:
            raise PodUnreachable(f"pod {pod.name} broke off: {error or 'no answer'}") from error
        finally:
            if request.journal and not ended:
                # A connection that only breaks may be that of a gateway that died.
                self.cancel(pod, request)
        raise PodUnreachable(f"pod {pod.name} ended a stream without its finish")

    def cancel(self, pod: PodView, request: GenerateRequest) -> None:
        """Tells the pod that nobody wants more of this attempt, or older ones; soon."""
        telling = asyncio.create_task(self._cancel(pod, request))
        self._cancelling.add(telling)
        telling.add_done_callback(self._cancelling.discard)

    async def _cancel(self, pod: PodView, request: GenerateRequest) -> None:
        path = f"{contract.PATH_STREAMS}/{quote(request.stream_id, safe='')}?epoch={request.epoch}"
        try:
            async with self._session.delete(_url(pod, path), timeout=_SMALL_CALL):
                pass
        except (aiohttp.ClientError, OSError, TimeoutError, RuntimeError) as error:
            log.debug("pod %s holds stream %s for a while: %s", pod.name, request.stream_id, error)

    async def held(self, pod: PodView, answer: str) -> tuple[HeldStream, ...]:
        """The streams of an answer that the pod has. Raises `PodUnreachable`."""
        path = f"{contract.PATH_STREAMS}/{quote(answer, safe='')}"
        return (await self._get(pod, path, _LIST_CALL, HeldStreams)).streams

    @contextmanager
    def _live(self, uid: str, reply: aiohttp.ClientResponse) -> Iterator[None]:
        replies = self._replies.setdefault(uid, set())
        replies.add(reply)
        try:
            yield
        finally:
            replies.discard(reply)
            if not replies:
                self._replies.pop(uid, None)
                self._heard_s.pop(uid, None)

    @property
    def live_uids(self) -> frozenset[str]:
        """Pods that streams of ours run on."""
        return frozenset(self._replies)

    def heard_s(self, uid: str) -> float:
        """When a stream's event last came from this pod, on `time.monotonic`."""
        return self._heard_s.get(uid, float("-inf"))

    def cut(self, uid: str) -> None:
        """The pod is not there any more: its streams fail now, not when TCP notices."""
        for reply in list(self._replies.get(uid, ())):
            reply.close()

    async def tokenizer(self, pod: PodView) -> TokenizerBundle:
        """Raises `PodUnreachable`."""
        return await self._get(pod, contract.PATH_TOKENIZER, _TOKENIZER_CALL, TokenizerBundle)

    async def state(self, pod: PodView) -> PodState:
        """Raises `PodUnreachable`."""
        return await self._get(pod, contract.PATH_STATE, _SMALL_CALL, PodState)

    async def pages(self, pod: PodView, log: str, seq: int) -> PageEvents:
        """What changed since; waits a little for something. Raises `PodUnreachable`."""
        path = f"{contract.PATH_PAGES}?log={quote(log, safe='')}&seq={seq}"
        return await self._get(pod, path, _LIST_CALL, PageEvents)

    async def contexts(self, pod: PodView) -> ContextCopies:
        """What the pod keeps. Raises `PodUnreachable`."""
        return await self._get(pod, contract.PATH_CONTEXTS, _LIST_CALL, ContextCopies)

    async def context(self, pod: PodView, id_: str) -> Context:
        """With its content. Raises `PodUnreachable`."""
        path = f"{contract.PATH_CONTEXTS}/{quote(id_, safe='')}"
        return await self._get(pod, path, _CONTENT_CALL, Context)

    async def file(self, pod: PodView, uri: str) -> FileText:
        """A text on a volume that the pod mounts. Raises `PodRefused`, `PodUnreachable`."""
        path = f"{contract.PATH_FILE}?uri={quote(uri, safe='')}"
        return await self._get(pod, path, _CONTENT_CALL, FileText)

    async def keep(self, pod: PodView, context: Context) -> ContextCopy:
        """Raises `PodRefused`, `PodUnreachable`."""
        body = self._encode(context)
        return await self._call(
            "PUT", pod, contract.PATH_CONTEXTS, _CONTENT_CALL, ContextCopy, body
        )

    async def _get(
        self, pod: PodView, path: str, limits: aiohttp.ClientTimeout, kind: type[T]
    ) -> T:
        return await self._call("GET", pod, path, limits, kind)

    async def _call(
        self,
        method: str,
        pod: PodView,
        path: str,
        limits: aiohttp.ClientTimeout,
        kind: type[T],
        body: bytes | None = None,
    ) -> T:
        try:
            async with self._session.request(
                method, _url(pod, path), data=body, timeout=limits
            ) as reply:
                if reply.status == HTTPStatus.BAD_REQUEST:
                    raise PodRefused(_sentence(await reply.content.read(2000)))
                if reply.status != 200:
                    raise PodUnreachable(f"pod {pod.name} answered {await _complaint(reply)}")
                return msgspec.json.decode(await reply.read(), type=kind)
        except (ValueError, RecursionError) as error:
            # Somebody else has the address now, or a version that does not fit to ours.
            told = f"pod {pod.name} answered what is no {kind.__name__}: {error}"
            raise PodUnreachable(told) from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise PodUnreachable(f"pod {pod.name} gave no answer: {error}") from error


def _url(pod: PodView, path: str) -> str:
    host = f"[{pod.ip}]" if ":" in pod.ip else pod.ip
    return f"http://{host}:{pod.http_port}{path}"


async def _complaint(reply: aiohttp.ClientResponse) -> str:
    text = (await reply.content.read(500)).decode(errors="replace")
    return f"{reply.status}: {text}"


def _sentence(body: bytes) -> str:
    """Of an error that a pod answers."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body.decode(errors="replace")
