"""Queries a Prometheus, if the operator's settings name one.

The client is synchronous: each query runs in a thread, at most QUERIES at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import requests
from prometheus_api_client import PrometheusConnect
from prometheus_api_client.exceptions import PrometheusApiClientException
from urllib3.util.retry import Retry

from tandem_operator.plan.queries import Answer

TIMEOUT_S = 4.0
QUERIES = 4
SILENT_S = 4.0
"""One that did not answer is not asked for so long: many fleets must not wait for it in turn."""
NO_RETRY = Retry(0, read=False)
"""The next look asks again."""


class Prometheus:
    """One Prometheus. The token is read again for each query: its Secret may be rotated."""

    def __init__(
        self,
        url: str,
        token_file: str = "",
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._token_file = token_file
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(QUERIES)
        self._clock = clock
        self._silence: Answer | None = None
        self._silent_until_s = 0.0

    async def ask(self, query: str) -> Answer:
        """The answer, or a sentence that says why there is none."""
        async with self._slots:
            if self._silence is not None and self._clock() < self._silent_until_s:
                return self._silence
            self._silence = None
            return await asyncio.to_thread(self._ask, query)

    def _ask(self, query: str) -> Answer:
        try:
            headers = {}
            if self._token_file:
                token = Path(self._token_file).read_text().strip()
                headers = {"Authorization": f"Bearer {token}"}
            # A session of its own: those of requests are not made for several threads.
            client = PrometheusConnect(
                self._url, headers=headers, timeout=self._timeout_s, retry=NO_RETRY
            )
            with closing(client):
                found = client.custom_query(query)
        except PrometheusApiClientException as error:
            return Answer(error=f"Prometheus at {self._url} refuses the query: {_short(error)}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            # requests' errors are OSErrors; an answer of another form is one of the others.
            answer = Answer(error=f"Prometheus at {self._url} does not answer: {_short(error)}")
            if isinstance(error, requests.RequestException):
                self._silence, self._silent_until_s = answer, self._clock() + SILENT_S
            return answer
        return _answer(found)


def _answer(found: object) -> Answer:
    """A vector's values, or a scalar's."""
    try:
        if isinstance(found, list) and len(found) == 2 and not isinstance(found[0], dict):
            return Answer((float(found[1]),))
        return Answer(tuple(float(series["value"][1]) for series in found))  # type: ignore[attr-defined]
    except (TypeError, ValueError, KeyError, IndexError):
        return Answer(
            error="the query returns no instant vector; a range needs a function around it"
        )


def _short(error: Exception) -> str:
    """One line of an error that may quote a whole answer."""
    if isinstance(error, requests.ConnectionError):
        return "the connection fails"
    if isinstance(error, requests.Timeout):
        return "it takes too long"
    text = " ".join(str(error).split())
    return text[:300]
