"""Performing one probe or hook action against a container: HTTP, TCP or a command."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import aiohttp

MESSAGE_LIMIT: Final = 1024
USER_AGENT: Final = "kube-probe/1.36"


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What a command in a container did."""

    code: int
    output: str


Execute: TypeAlias = Callable[[Sequence[str], float | None], Awaitable[CommandResult]]
"""Runs a command in the container within a timeout in seconds; TimeoutError when it passes."""


@dataclass(frozen=True, slots=True)
class Target:
    """The container that is checked."""

    pod_ip: str
    ports: Mapping[str, int]
    """Its named ports."""
    execute: Execute


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of one check."""

    success: bool
    message: str = ""


async def check(action: Mapping[str, Any], target: Target, timeout_s: float | None) -> Verdict:
    """Performs the action once, within `timeout_s` if given.

    Never raises: what goes wrong is a failed check that says why.
    """
    try:
        if http := action.get("httpGet"):
            return await _http(http, target, timeout_s)
        if tcp := action.get("tcpSocket"):
            return await _tcp(tcp, target, timeout_s)
        if command := action.get("exec"):
            result = await target.execute(command.get("command") or [], timeout_s)
            return Verdict(result.code == 0, result.output[:MESSAGE_LIMIT])
    except TimeoutError:
        return Verdict(False, f"no answer within {timeout_s:g} s")
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return Verdict(False, str(error) or type(error).__name__)
    return Verdict(
        False, f"a local cluster cannot do {_kind(action)}: use httpGet, tcpSocket, exec"
    )


def unsupported(action: Mapping[str, Any]) -> str | None:
    """A sentence when the action is one that `check` cannot do."""
    if any(kind in action for kind in ("httpGet", "tcpSocket", "exec")):
        return None
    return f"a local cluster cannot do {_kind(action)} probes: use httpGet, tcpSocket or exec"


def _kind(action: Mapping[str, Any]) -> str:
    return next((kind for kind in action if isinstance(action[kind], dict)), "empty")


async def _http(action: Mapping[str, Any], target: Target, timeout_s: float | None) -> Verdict:
    scheme = (action.get("scheme") or "HTTP").lower()
    host = action.get("host") or target.pod_ip
    path = action.get("path") or "/"
    url = f"{scheme}://{host}:{_port(action['port'], target)}/{path.removeprefix('/')}"
    headers = {"User-Agent": USER_AGENT, "Accept": "*/*"}
    headers |= {header["name"]: header["value"] for header in action.get("httpHeaders") or []}
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    connector = aiohttp.TCPConnector(
        force_close=True, ssl=_unverified() if scheme == "https" else False
    )
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
        session.get(url, headers=headers, allow_redirects=False) as answer,
    ):
        if 200 <= answer.status < 400:
            return Verdict(True)
        body = (await answer.content.read(MESSAGE_LIMIT)).decode(errors="replace")
        return Verdict(False, f"HTTP probe failed with statuscode: {answer.status} {body}".strip())


def _unverified() -> ssl.SSLContext:
    """Probes accept any certificate, as a kubelet's do."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def _tcp(action: Mapping[str, Any], target: Target, timeout_s: float | None) -> Verdict:
    host = action.get("host") or target.pod_ip
    async with asyncio.timeout(timeout_s):
        _, writer = await asyncio.open_connection(host, _port(action["port"], target))
    writer.close()
    return Verdict(True)


def _port(port: int | str, target: Target) -> int:
    if isinstance(port, int):
        return port
    if port not in target.ports:
        raise ValueError(f"the container has no port named {port!r}")
    return target.ports[port]
