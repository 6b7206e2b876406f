"""Every HTTP endpoint, fuzzed from its own OpenAPI document: no fault of ours, no unlisted status.

A pod and a gateway around hash engines, in a thread of this process; schemathesis draws requests
that fit the document and requests that do not.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import schemathesis
from hash_pods import SECRET, Served, serving_pods
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import status_code_conformance
from tandem_runtime import contract
from tandem_runtime.gateway.options import GatewayOptions
from tandem_runtime.gateway.run import Gateway

EXAMPLES = 12
"""Of each operation, besides those that schemathesis always tries."""
VALID: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/completions": ("CompletionRequest", {"model": "hash", "prompt": "x"}),
    "/v1/chat/completions": (
        "ChatCompletionRequest",
        {"model": "hash", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4},
    ),
}
"""By path: a body's name in the document, and one of which nothing is wrong. Of a whole body drawn
something always is, so that nothing behind the checks would ever run."""
OF_OTHERS = {contract.PATH_DRAIN}
"""Without the operator's token here: a drained pod would serve nobody else."""


@dataclass
class Listed:
    pods: tuple[Any, ...] = ()
    synced: bool = True
    age_s: float = 0.0


@dataclass
class World:
    pod: Served
    gateway: Gateway
    gateway_port: int


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    started, loop = threading.Event(), asyncio.new_event_loop()
    stop, made = asyncio.Event(), []

    async def serve() -> None:
        async with serving_pods() as make:
            pod = await make(max_waiting=64)
            gateway = Gateway(
                GatewayOptions("ns", None, "127.0.0.1", 0, 0, SECRET, "gateway-0"),
                Listed((pod.view(),)),
            )
            port, _ = await gateway.start()
            made.append(World(pod, gateway, port))
            started.set()
            await stop.wait()
            await gateway.stop()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert started.wait(60)
    yield made[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(60)
    loop.close()


bounded = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)


def fuzz(port: int, seen: set[str]) -> None:
    """Each operation of the server's document, its path added to `seen`."""
    document = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
    for found in document.get_all_operations():
        operation = found.ok()
        seen.add(operation.path)
        for mode in GenerationMode:
            with suppress(Unsatisfiable):  # what takes nothing cannot be given something wrong
                cases = operation.as_strategy(generation_mode=mode)
                bounded(given(case=cases, kept=kept(document, operation.path))(check))()


def kept(document: Any, path: str) -> st.SearchStrategy[set[str] | None]:
    """Which fields of a drawn body replace those of a valid one; None: all, and no others."""
    if path not in VALID:
        return st.none()
    schemas = document.raw_schema["components"]["schemas"]
    fields = sorted(schemas[VALID[path][0]]["properties"])
    return st.none() | st.sets(st.sampled_from(fields), max_size=3)


def test_pod(world: World) -> None:
    seen: set[str] = set()
    fuzz(world.pod.port, seen)
    assert {"/v1/chat/completions", contract.PATH_GENERATE, contract.PATH_DRAIN} <= seen
    assert world.pod.pod.healthy


def test_gateway(world: World) -> None:
    seen: set[str] = set()
    fuzz(world.gateway_port, seen)
    assert {"/v1/completions", "/v2/models/{model}/infer", contract.PATH_STATE} <= seen
    assert world.pod.pod.healthy


def check(case: Any, kept: set[str] | None) -> None:
    """Mostly at the model that is served: of another one all that can be said is 404."""
    if isinstance(case.body, dict) and kept is not None:
        drawn = {name: value for name, value in case.body.items() if name in kept}
        case.body = {**VALID[case.operation.path][1], **drawn}
    if isinstance(case.path_parameters, dict) and "model" in case.path_parameters:
        case.path_parameters["model"] = "hash"
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "hash"
    headers = {}
    if case.operation.path not in OF_OTHERS:
        headers["authorization"] = f"Bearer {contract.pod_token(SECRET)}"
    reply = case.call(headers=headers, timeout=60)
    case.validate_response(reply, checks=[not_a_server_error, status_code_conformance])
