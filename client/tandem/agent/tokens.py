"""ServiceAccount tokens of pods: asked for by TokenRequest, bound to the pod, renewed in time."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tandem.agent.api import Api, Object

OLDEST_S: Final = 24 * 3600.0
RENEW_FRACTION: Final = 0.8


@dataclass(frozen=True, slots=True)
class Token:
    """A token and its life."""

    text: str
    issued_at_s: float
    expires_at_s: float

    def renew_at_s(self) -> float:
        """When to ask for the next: after 80 % of its life, or a day."""
        life_s = self.expires_at_s - self.issued_at_s
        return self.issued_at_s + min(OLDEST_S, RENEW_FRACTION * life_s)


class TokenSource:
    """The tokens of one pod, each kept until it is time for the next."""

    def __init__(self, api: Api, pod: Object, clock: Callable[[], float]) -> None:
        metadata = pod["metadata"]
        self._api = api
        self._clock = clock
        self._pod = {
            "kind": "Pod",
            "apiVersion": "v1",
            "name": metadata["name"],
            "uid": metadata["uid"],
        }
        account = pod["spec"].get("serviceAccountName") or "default"
        self._path = f"/api/v1/namespaces/{metadata['namespace']}/serviceaccounts/{account}/token"
        self._tokens: dict[tuple[str, int], Token] = {}
        self._lock = asyncio.Lock()

    async def token(self, audience: str, life_s: int) -> str:
        """A token with most of its life before it. An empty audience is the API server's own."""
        async with self._lock:
            key = (audience, life_s)
            kept = self._tokens.get(key)
            if kept is None or self._clock() >= kept.renew_at_s():
                kept = self._tokens[key] = await self._request(audience, life_s)
            return kept.text

    async def _request(self, audience: str, life_s: int) -> Token:
        body: Object = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "audiences": [audience] if audience else [],
                "expirationSeconds": life_s,
                "boundObjectRef": self._pod,
            },
        }
        issued_at_s = self._clock()
        status = (await self._api.create(self._path, body))["status"]
        expires = datetime.datetime.fromisoformat(status["expirationTimestamp"])
        return Token(status["token"], issued_at_s, expires.timestamp())
