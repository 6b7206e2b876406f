"""Weights that pods fetch: where they put them, and the Secret that they need."""

from __future__ import annotations

import re
from typing import Any

import pytest
from builders import NAMESPACE, fleet_body, model_body
from operator_world import World
from tandem_operator.api.model import SOURCE_PATTERN, ModelSpec
from tandem_operator.plan.model import inputs

HUB = {"uri": "hf://meta-llama/Llama-3.1-8B@main", "secretRef": {"name": "hub"}}


def container(pod: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = pod["spec"]["containers"][0]
    return found


@pytest.mark.parametrize("source", [HUB, {"uri": HUB["uri"]}, {"uri": "s3://bucket/llama"}])
async def test_the_resolver_fetches_into_a_volume_of_its_own(source: dict[str, Any]) -> None:
    world = World()
    world.kube.user_write(model_body(resolved=False, source=source))
    await world.reconcile()
    (pod,) = world.kube.pods(NAMESPACE)
    environment = {e["name"]: e.get("value") for e in container(pod)["env"]}
    (mount,) = container(pod)["volumeMounts"]
    assert environment["TANDEM_MODEL_CACHE"] == mount["mountPath"]
    assert environment["HF_HOME"].startswith(mount["mountPath"])
    assert pod["spec"]["volumes"] == [{"name": mount["name"], "emptyDir": {}}]
    secrets = [{"secretRef": {"name": "hub"}}] if "secretRef" in source else None
    assert container(pod).get("envFrom") == secrets


async def test_a_fleets_pods_get_what_the_resolver_had() -> None:
    world = World()
    model = model_body(source=HUB)
    resolved = model["status"]["resolved"] | {"uri": HUB["uri"], "secretName": "hub"}
    model["status"]["resolved"] = resolved
    world.kube.user_write(model)
    world.kube.user_write(fleet_body())
    await world.settle()
    pods = [p for p in world.kube.pods(NAMESPACE) if "-prefill-" in p["metadata"]["name"]]
    assert pods
    assert container(pods[0])["envFrom"] == [{"secretRef": {"name": "hub"}}]
    assert {"name": "weights", "emptyDir": {}} in pods[0]["spec"]["volumes"]


def test_another_secret_asks_again_and_none_changes_nothing() -> None:
    def asked(source: dict[str, Any]) -> str:
        return inputs(ModelSpec.model_validate({"source": source}))

    assert asked(HUB) != asked({"uri": HUB["uri"]})
    assert asked(HUB) != asked(HUB | {"secretRef": {"name": "other"}})


@pytest.mark.parametrize(
    ("uri", "works"),
    [
        ("hf://meta-llama/Llama-3.1-8B", True),
        ("hf://meta-llama/Llama-3.1-8B@v1.0", True),
        ("hf://bartowski/Llama-GGUF@main/llama-Q4_K_M.gguf", True),
        ("hf://meta-llama/Llama-3.1-8B/config.json", False),
        ("hf://llama", False),
        ("s3://bucket/models/llama", True),
        ("s3://bucket", False),
        ("https://models.example/llama.gguf", True),
        ("http://models.web.svc:8080/llama", True),
        ("https://models.example", False),
        ("https://models.example/llama.gguf?X-Amz-Signature=1", False),
        ("ftp://models.example/llama.gguf", False),
    ],
)
def test_what_a_source_may_look_like(uri: str, works: bool) -> None:
    assert bool(re.fullmatch(SOURCE_PATTERN, uri)) == works
