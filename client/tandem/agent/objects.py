"""The ConfigMaps and Secrets that this node's pods refer to, fetched by name.

The API server lets a node read one only once a pod that refers to it is bound there, and its own
authoriser learns of the binding a moment after the agent: a 403 is asked again for a while.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping
from typing import Final

from tandem.agent.api import Api, ApiError, Object

FRESH_S: Final = 1.0
"""Pods that start or refresh together share one request."""
FORBIDDEN_TRIES: Final = 6
FORBIDDEN_PAUSE_S: Final = 0.3


class ObjectReader:
    """Reads objects by name, through a cache of a second."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._cache: dict[str, tuple[float, Object | None]] = {}

    async def config_map(self, namespace: str, name: str) -> Mapping[str, bytes] | None:
        """The data of a ConfigMap, binary data included; None when there is no such object."""
        item = await self._read(f"/api/v1/namespaces/{namespace}/configmaps/{name}")
        if item is None:
            return None
        text = {key: value.encode() for key, value in (item.get("data") or {}).items()}
        return text | _decoded(item.get("binaryData"))

    async def secret(self, namespace: str, name: str) -> Mapping[str, bytes] | None:
        """The decoded data of a Secret; None when there is no such object."""
        item = await self._read(f"/api/v1/namespaces/{namespace}/secrets/{name}")
        return None if item is None else _decoded(item.get("data"))

    async def claim_path(self, namespace: str, name: str) -> str | None:
        """The machine's folder behind a PersistentVolumeClaim; None when it has none.

        Only volumes that are folders of the machine (hostPath, local) have one.
        """
        claim = await self._read(f"/api/v1/namespaces/{namespace}/persistentvolumeclaims/{name}")
        volume_name = (claim or {}).get("spec", {}).get("volumeName")
        if not volume_name:
            return None
        volume = await self._read(f"/api/v1/persistentvolumes/{volume_name}")
        spec = (volume or {}).get("spec", {})
        source = spec.get("hostPath") or spec.get("local") or {}
        return source.get("path")

    async def _read(self, path: str) -> Object | None:
        now_s = time.monotonic()
        self._cache = {p: entry for p, entry in self._cache.items() if entry[0] > now_s}
        if path in self._cache:
            return self._cache[path][1]
        item = await self._fetch(path)
        if item is not None:
            self._cache[path] = (now_s + FRESH_S, item)
        return item

    async def _fetch(self, path: str) -> Object | None:
        for attempt in range(FORBIDDEN_TRIES):
            try:
                return await self._api.get(path)
            except ApiError as error:
                if error.status == 404:
                    return None
                if error.status != 403 or attempt == FORBIDDEN_TRIES - 1:
                    raise
            await asyncio.sleep(FORBIDDEN_PAUSE_S)
        raise AssertionError("the last attempt returns or raises")


def _decoded(data: Mapping[str, str] | None) -> dict[str, bytes]:
    return {key: base64.b64decode(value) for key, value in (data or {}).items()}
