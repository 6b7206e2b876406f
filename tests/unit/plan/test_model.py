"""A Model's plan: one resolver at a time, answers counted once, failures backed off."""

from __future__ import annotations

import json
from typing import Any

import pytest
from builders import NAMESPACE, RESOLVED, fleet_body, model_body
from operator_world import World
from tandem_operator.api.model import ModelSpec, Quantization
from tandem_operator.kube.client import ApiError
from tandem_operator.plan.model import inputs, retry_after_s
from tandem_operator.resources import MODELS, PODS


@pytest.fixture
async def world() -> World:
    """A Model whose resolver pod was just made."""
    world = World()
    world.kube.user_write(model_body(resolved=False))
    await world.reconcile()
    return world


def resolver(world: World) -> str:
    (pod,) = world.kube.pods(NAMESPACE)
    return str(pod["metadata"]["name"])


def answer(world: World, said: Any, exit_code: int = 0) -> None:
    """The resolver pod ends with this termination message."""
    message = said if isinstance(said, str) else json.dumps(said)
    ended = {"terminated": {"exitCode": exit_code, "message": message}}
    world.body(PODS, resolver(world))["status"] = {
        "phase": "Failed" if exit_code else "Succeeded",
        "containerStatuses": [{"name": "runtime", "state": ended}],
    }


def status(world: World) -> dict[str, Any]:
    found: dict[str, Any] = world.body(MODELS, "smollm2").get("status", {})
    return found


def condition(world: World, type_: str) -> dict[str, Any] | None:
    return next((c for c in status(world)["conditions"] if c["type"] == type_), None)


KNOWN = ("uri", "dtype", "quantization")
"""By the operator, which adds them to an answer."""
GOOD = {"ok": True, **{k: v for k, v in RESOLVED.items() if k not in KNOWN}}
BAD = {"ok": False, "reason": "UnsupportedArchitecture", "message": "qwen is not supported"}


async def test_a_sidecar_that_ends_first_is_no_answer(world: World) -> None:
    sidecar = {"name": "a-sidecar", "state": {"terminated": {"exitCode": 0}}}
    runtime = {"name": "runtime", "state": {"running": {}}}
    world.body(PODS, resolver(world))["status"] = {
        "phase": "Running",
        "containerStatuses": [sidecar, runtime],
    }
    await world.reconcile()
    assert condition(world, "ModelResolved")["reason"] == "Resolving"  # type: ignore[index]


async def test_the_resolver_is_asked_what_the_spec_says(world: World) -> None:
    container = world.body(PODS, resolver(world))["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "tandem_runtime.resolve"]
    assert container["args"] == ["--uri", RESOLVED["uri"], "--dtype", "bfloat16"]
    reconciling = condition(world, "Reconciling")
    assert reconciling is not None
    assert reconciling["status"] == "True"


async def test_an_answer_becomes_the_status_and_the_pod_goes(world: World) -> None:
    answer(world, GOOD)
    await world.reconcile()
    assert status(world)["resolved"] == RESOLVED
    assert status(world)["parameters"] == "135M"
    ready = condition(world, "Ready")
    assert ready is not None
    assert ready["status"] == "True"
    await world.settle()
    assert not world.kube.pods(NAMESPACE)
    world.clock.sleep(10_000.0)
    assert await world.reconcile() == 0


async def test_a_failure_says_why_and_when_it_is_tried_again(world: World) -> None:
    answer(world, BAD, exit_code=64)
    await world.reconcile()
    failed = condition(world, "ModelResolved")
    assert failed is not None
    assert (failed["status"], failed["reason"]) == ("False", "UnsupportedArchitecture")
    assert failed["message"].startswith("qwen is not supported (attempt 1; next at 20")
    assert condition(world, "Stalled") is not None
    assert condition(world, "Reconciling") is None
    first = resolver(world)
    await world.reconcile()
    world.kubelet()
    assert not world.kube.pods(NAMESPACE), "the pod that was read stays"
    world.clock.sleep(9.0)
    await world.reconcile()
    assert not world.kube.pods(NAMESPACE), "tried again too early"
    world.clock.sleep(2.0)
    await world.reconcile()
    assert resolver(world) != first
    assert condition(world, "ModelResolved") == failed, "forgot why while it tries again"
    answer(world, GOOD)
    await world.reconcile()
    assert condition(world, "Stalled") is None
    assert status(world)["resolution"]["failures"] == 0


async def test_an_answer_is_counted_once_however_often_it_is_seen(world: World) -> None:
    answer(world, BAD, exit_code=64)
    world.freeze()
    for _ in range(3):
        await world.reconcile()
    world.thaw()
    await world.reconcile()
    assert status(world)["resolution"]["failures"] == 1


async def test_a_pod_without_an_answer_is_a_failure(world: World) -> None:
    answer(world, "Traceback: no module named torch", exit_code=1)
    await world.reconcile()
    failed = condition(world, "ModelResolved")
    assert failed is not None
    assert failed["reason"] == "ResolveFailed"
    assert "exit 1 and no result: Traceback: no module named torch" in failed["message"]


async def test_a_silent_resolver_is_given_up_with_what_held_it(world: World) -> None:
    world.starve(resolver(world))
    await world.reconcile()
    waiting = condition(world, "ModelResolved")
    assert waiting is not None
    assert "Insufficient nvidia.com/gpu" in waiting["message"]
    world.clock.sleep(601.0)
    await world.reconcile()
    failed = condition(world, "ModelResolved")
    assert failed is not None
    assert failed["reason"] == "ResolverTimedOut"
    assert "Insufficient nvidia.com/gpu" in failed["message"]


async def test_another_source_is_read_again_and_other_names_are_not(world: World) -> None:
    answer(world, GOOD)
    await world.settle()
    world.edit(MODELS, "smollm2", lambda b: b["spec"].update(servedNames=["x"]))
    await world.settle()
    assert status(world)["servedNames"] == ["x"]
    assert not world.kube.pods(NAMESPACE)
    world.edit(MODELS, "smollm2", lambda b: b["spec"].update(dtype="float32"))
    await world.reconcile()
    assert "float32" in str(world.body(PODS, resolver(world))["spec"])


async def test_a_changed_model_replaces_the_resolver_under_way(world: World) -> None:
    first = resolver(world)
    world.edit(MODELS, "smollm2", lambda b: b["spec"].update(dtype="float32"))
    await world.reconcile()
    world.kubelet()
    await world.reconcile()
    assert resolver(world) != first


async def test_a_template_that_sets_what_is_ours_is_refused_without_a_pod() -> None:
    world = World()
    template = {"metadata": {"labels": {"tandem.dev/model": "x"}}}
    world.kube.user_write(model_body(resolved=False, template=template))
    await world.settle()
    assert not world.kube.pods(NAMESPACE)
    failed = condition(world, "ModelResolved")
    assert failed is not None
    assert failed["reason"] == "TemplateRefused"


def test_a_claim_is_mounted_where_the_runtime_looks() -> None:
    from tandem_operator.plan.resolver import resolver_manifest
    from tandem_operator.plan.views import model_view
    from tandem_operator.settings import Settings

    body = model_body(source={"uri": "pvc://weights/llama/model.gguf"})
    body["metadata"] |= {"uid": "u", "generation": 1, "creationTimestamp": "2023-01-01T00:00:00Z"}
    spec = resolver_manifest(model_view(body), "r", Settings())["spec"]
    assert spec["volumes"] == [
        {"name": "weights", "persistentVolumeClaim": {"claimName": "weights", "readOnly": True}}
    ]
    mount = {"name": "weights", "mountPath": "/mnt/tandem/pvc/weights", "readOnly": True}
    assert spec["containers"][0]["volumeMounts"] == [mount]


@pytest.mark.parametrize(("failures", "wait_s"), [(1, 10), (2, 20), (5, 160), (6, 300), (40, 300)])
def test_retries_back_off(failures: int, wait_s: float) -> None:
    assert retry_after_s(failures) == wait_s


def test_inputs_change_with_what_decides_the_answer_alone() -> None:
    spec = ModelSpec.model_validate(model_body()["spec"])
    assert inputs(spec) == inputs(spec.model_copy(update={"served_names": ("x",)}))
    assert inputs(spec) != inputs(spec.model_copy(update={"dtype": "float32"}))
    assert inputs(spec) != inputs(spec.model_copy(update={"max_context_tokens": 5}))
    assert inputs(spec) == inputs(spec.model_copy(update={"quantization": Quantization()}))
    int4 = Quantization(weights="int4")
    assert inputs(spec) != inputs(spec.model_copy(update={"quantization": int4}))


async def test_quantisation_reaches_resolver_and_pods() -> None:
    quantization = {"weights": "int4", "exclude": ["last-layer"], "kvCache": "fp8"}
    flags = "--weights int4 --kv-cache fp8 --weights-exclude last-layer"
    world = World()
    world.kube.user_write(model_body(resolved=False, quantization=quantization))
    await world.reconcile()
    asked = world.body(PODS, resolver(world))["spec"]["containers"][0]["args"]
    assert flags in " ".join(asked)
    answer(world, GOOD)
    await world.reconcile()
    assert status(world)["resolved"]["quantization"] == quantization
    world.kube.user_write(fleet_body(prefill=None, decode={"replicas": 1}))
    await world.settle()
    served = [pod["spec"]["containers"][0]["args"] for pod in world.kube.pods(NAMESPACE)]
    assert any(flags in " ".join(args) and "--role" in args for args in served)


async def test_a_resolver_that_cannot_be_made_says_why() -> None:
    world = World()
    world.kube.refuse = {"smollm2-": ApiError(403, "Forbidden", "exceeded quota: pods=3")}
    world.kube.user_write(model_body(resolved=False))
    for _ in range(3):
        await world.reconcile()
    found = condition(world, "ModelResolved")
    assert found is not None
    assert "the resolver pod cannot be made: exceeded quota: pods=3" in found["message"]


async def test_an_edit_that_changes_nothing_asked_is_observed_while_a_retry_waits(
    world: World,
) -> None:
    answer(world, BAD, 1)
    await world.reconcile()
    before = condition(world, "ModelResolved")
    world.edit(MODELS, "smollm2", lambda b: b["spec"].update(servedNames=["x"]))
    await world.reconcile()
    assert status(world)["observedGeneration"] == 2
    assert status(world)["servedNames"] == ["x"]
    after = condition(world, "ModelResolved")
    assert before is not None
    assert after == before | {"observedGeneration": 2}
