"""The namespace's runtime pods, watched through the Kubernetes API.

While the API is away the last view stands: pods do not vanish because nobody can be asked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, Protocol

import aiohttp
import msgspec
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration

from tandem_runtime import contract
from tandem_runtime.gateway.pods import PodView, pod_view

log = logging.getLogger(__name__)

_WATCH_S: Final = 20
"""How long one watch lasts: its end, like every event, confirms that the view is current."""
_BACKOFF_S: Final = (0.2, 0.5, 1.0, 2.0, 5.0)


class Discovery(Protocol):
    """Where the gateway learns of pods."""

    @property
    def pods(self) -> tuple[PodView, ...]:
        """The current view."""

    @property
    def synced(self) -> bool:
        """Whether there has been a view at all."""

    @property
    def age_s(self) -> float:
        """Seconds since the view was last confirmed."""


class ApiRefused(Exception):
    """The API server answered, but not with pods."""


class WatchExpired(Exception):
    """The API no longer knows the version from which to watch: list again."""


class PodWatch:
    """A view kept by list and watch."""

    def __init__(
        self, api: ApiClient, namespace: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._api = api
        self._path = f"/api/v1/namespaces/{namespace}/pods"
        self._clock = clock
        self._pods: dict[str, PodView] = {}
        self._confirmed_s: float | None = None

    @property
    def pods(self) -> tuple[PodView, ...]:
        return tuple(self._pods.values())

    @property
    def synced(self) -> bool:
        return self._confirmed_s is not None

    @property
    def age_s(self) -> float:
        return 0.0 if self._confirmed_s is None else self._clock() - self._confirmed_s

    async def run(self) -> None:
        """Watches until cancelled."""
        version = ""
        failures = 0
        while True:
            try:
                if not version:
                    version = await self._list()
                version = await self._watch(version)
                failures = 0
            except WatchExpired:
                version = ""
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError, ApiRefused) as error:
                log.warning("the Kubernetes API is away, keeping the last view: %s", error)
                failures = await _back_off(failures)
            except Exception:
                log.exception("the watch of pods failed, keeping the last view; it lists again")
                version = ""
                failures = await _back_off(failures)

    async def _list(self) -> str:
        reply = await self._get(resourceVersion="0")
        async with reply:
            listed = msgspec.json.decode(await reply.read())
        views = [pod_view(pod) for pod in listed.get("items") or []]
        self._pods = {view.uid: view for view in views if view is not None}
        self._confirmed_s = self._clock()
        log.info("%d runtime pods", len(self._pods))
        return str(listed["metadata"]["resourceVersion"])

    async def _watch(self, version: str) -> str:
        reply = await self._get(
            watch="true",
            resourceVersion=version,
            timeoutSeconds=str(_WATCH_S),
            allowWatchBookmarks="true",
        )
        async with reply:
            async for event in _lines(reply):
                version = self._take(event)
                self._confirmed_s = self._clock()
        self._confirmed_s = self._clock()
        return version

    def _take(self, event: dict[str, Any]) -> str:
        kind, pod = event["type"], event["object"]
        if kind == "ERROR":
            if pod.get("code") == 410:
                raise WatchExpired(pod.get("message", ""))
            raise ApiRefused(pod.get("message", "the watch failed"))
        uid = pod["metadata"].get("uid", "")
        if kind != "BOOKMARK":
            view = None if kind == "DELETED" else pod_view(pod)
            if view is None:
                self._pods.pop(uid, None)
            else:
                self._pods[uid] = view
        return str(pod["metadata"]["resourceVersion"])

    async def _get(self, **query: str) -> aiohttp.ClientResponse:
        verb, url, headers, body, _ = await self._api.param_serialize(
            "GET",
            self._path,
            query_params=list({"labelSelector": contract.LABEL_FLEET, **query}.items()),
            header_params={"Accept": "application/json"},
            auth_settings=["BearerToken"],
        )
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=_WATCH_S + 10)
        answered = await self._api.call_api(verb, url, headers, body, _request_timeout=timeout)
        reply: aiohttp.ClientResponse = answered.response
        if reply.status == 200:
            return reply
        text = (await reply.read()).decode(errors="replace")[:500]
        if reply.status == 410:
            raise WatchExpired(text)
        raise ApiRefused(f"{reply.status}: {text}")


async def _back_off(failures: int) -> int:
    """Waits after one more failure in a row; returns how many that makes."""
    await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
    return failures + 1


async def _lines(reply: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """A pod may be larger than aiohttp's longest line."""
    rest = b""
    async for chunk in reply.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line:
                yield msgspec.json.decode(line)


async def api_client(kubeconfig: str | None) -> ApiClient:
    """From a kubeconfig file, or the pod's own ServiceAccount.

    Raises kubernetes.aio.config.ConfigException where there is neither.
    """
    configuration = Configuration()
    if kubeconfig is not None:
        await config.load_kube_config(config_file=kubeconfig, client_configuration=configuration)
    else:
        config.load_incluster_config(client_configuration=configuration)
    return ApiClient(configuration)
