"""CachedContexts: told to gateways that do not know them, renewed, replaced, ended; statuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
from builders import NAMESPACE, context_body, fleet_body, model_body
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_world import World
from tandem_operator.api.cached_context import CachedContextStatus
from tandem_operator.keys import Key
from tandem_operator.plan.actions import PutContext, WriteStatus
from tandem_operator.plan.context import (
    BUILDING_S,
    LEASE_S,
    CachedContextView,
    ContextSnapshot,
    cached_context_view,
    plan_context,
)
from tandem_operator.plan.gateway import GatewayPod
from tandem_operator.plan.times import to_text
from tandem_operator.plan.views import fleet_view, model_view
from tandem_operator.resources import CACHED_CONTEXTS, CONFIG_MAPS, Ref
from tandem_runtime.contract import COMPONENT_GATEWAY, LABEL_COMPONENT
from tandem_runtime.protocol import Context, ContextCopy, ContextState

NOW_S = 1_700_000_000.0
GATEWAYS = [GatewayPod(NAMESPACE, f"gateway-{n}", f"uid-{n}", f"127.0.0.{n}") for n in range(2)]


def live(body: dict[str, Any], created_s: float = NOW_S - 100) -> dict[str, Any]:
    meta = {
        "uid": f"uid-{body['metadata']['name']}",
        "generation": 1,
        "creationTimestamp": to_text(created_s),
    }
    return {**body, "metadata": {**body["metadata"], **meta}}


def view(created_s: float = NOW_S - 100, **spec: Any) -> CachedContextView:
    return cached_context_view(live(context_body(**spec), created_s))


def snapshot(context: CachedContextView | None, **fields: Any) -> ContextSnapshot:
    told: dict[str, Any] = {
        "now_s": NOW_S,
        "name": "handbook",
        "context": context,
        "fleets": (fleet_view(live(fleet_body())),),
        "models": (model_view(live(model_body(servedNames=["chat-model"]))),),
        "content": "a long text",
        "states": dict.fromkeys(GATEWAYS),
    }
    return ContextSnapshot(**{**told, **fields})


def puts(plan: Any) -> list[PutContext]:
    return [action for action in plan.actions if isinstance(action, PutContext)]


def status(plan: Any) -> dict[str, Any]:
    (write,) = [a for a in plan.actions if type(a).__name__ == "WriteStatus"]
    return dict(write.status)


def ready(plan: Any) -> tuple[str, str, str]:
    (condition,) = [c for c in status(plan)["conditions"] if c["type"] == "Ready"]
    return condition["status"], condition["reason"], condition["message"]


def settled(context: CachedContextView, now_s: float = NOW_S, **fields: Any) -> ContextSnapshot:
    """After the plan was carried out: gateways know what they were told, the status is written."""
    plan = plan_context(snapshot(context, now_s=now_s, **fields))
    states = dict(fields.get("states", dict.fromkeys(GATEWAYS)))
    for put in puts(plan):
        pod = next(p for p in GATEWAYS if p.uid == put.target.uid)
        before = states[pod]
        states[pod] = ContextState(
            msgspec.structs.replace(put.context, prompt="", messages=[]),
            {} if before is None else before.pods,
        )
    wrote = [a.status for a in plan.actions if isinstance(a, WriteStatus)]
    written = context
    if wrote:
        written = replace(context, status=CachedContextStatus.model_validate(wrote[0]))
    return snapshot(written, now_s=now_s, **{**fields, "states": states})


def with_copy(at: ContextSnapshot, **fields: Any) -> ContextSnapshot:
    states = {}
    for pod, state in at.states.items():
        assert state is not None
        known = state.context
        copy = {"state": "ready", "tokens": 900, "bytes": 5000, "tier": "memory", **fields}
        states[pod] = msgspec.structs.replace(
            state,
            pods={
                "prefill-0": ContextCopy("handbook", known.created_unix_s, known.version, **copy)
            },
            requests=7,
            cached_tokens=12_345,
            saved_s=61.7,
        )
    return replace(at, states=states)


def test_gateways_that_do_not_know_it_are_told() -> None:
    plan = plan_context(snapshot(view(tier="Memory", copies=2, tenant="a")))
    assert [put.target.uid for put in puts(plan)] == ["uid-0", "uid-1"]
    told = puts(plan)[0].context
    assert (told.id, told.fleet, told.model, told.tenant) == ("handbook", "chat", "chat-model", "a")
    assert (told.tier, told.copies, told.expires_unix_s) == ("memory", 2, NOW_S + LEASE_S)
    assert told.messages == [{"role": "system", "content": "a long text"}]
    assert plan.requeue_after_s == BUILDING_S
    assert ready(plan)[0] == "False"


def test_the_status_tells_what_is_kept() -> None:
    plan = plan_context(with_copy(settled(view())))
    assert puts(plan) == []
    assert ready(plan) == ("True", "Kept", "1 of 1 pods keep it")
    told = status(plan)
    assert {c["type"] for c in told["conditions"]} == {"Ready"}
    assert (told["copies"], told["tier"], told["tokens"], told["pods"]) == (
        "1/1",
        "Memory",
        900,
        ("prefill-0",),
    )
    assert (told["hits"], told["cachedTokens"], told["savedSeconds"]) == (14, 24_000, 120)


def test_what_requests_had_of_it_is_not_written_for_each_of_them() -> None:
    at = with_copy(settled(view()))
    at = replace(at, states={**at.states})
    assert at.context is not None
    told = CachedContextStatus.model_validate(status(plan_context(at)))
    written = replace(at, context=replace(at.context, status=told))
    more = {
        pod: msgspec.structs.replace(state, requests=90)
        for pod, state in at.states.items()
        if state is not None
    }
    soon = replace(written, states=more, now_s=NOW_S + 29)
    assert plan_context(soon).actions == ()
    assert status(plan_context(replace(soon, now_s=NOW_S + 31)))["hits"] == 180


def test_what_pods_refuse_is_told() -> None:
    at = settled(view(tier="Disk"))
    states = {
        pod: msgspec.structs.replace(state, reason="The tier 'disk' is none here.")
        for pod, state in at.states.items()
        if state is not None
    }
    plan = plan_context(replace(at, states=states))
    assert ready(plan) == ("False", "NotKept", "0 of 1 pods keep it: The tier 'disk' is none here.")
    assert "Stalled" in {c["type"] for c in status(plan)["conditions"]}


def test_what_is_missing_is_named() -> None:
    for fields, spec, reason in (
        ({"fleets": ()}, {}, "FleetNotFound"),
        ({}, {"fleetRef": None, "modelRef": {"name": "other"}}, "FleetNotFound"),
        ({"models": ()}, {}, "ModelNotFound"),
        ({"content": None, "trouble": "there is no ConfigMap 'x'"}, {}, "ContentNotFound"),
        ({"states": {}}, {}, "GatewayNotReady"),
    ):
        plan = plan_context(snapshot(view(**spec), **fields))
        assert puts(plan) == []
        assert ready(plan)[:2] == ("False", reason)
    by_model = {"fleetRef": None, "modelRef": {"name": "smollm2"}}
    assert puts(plan_context(snapshot(view(**by_model))))


def test_what_is_elsewhere_is_for_gateways_to_read() -> None:
    file = {"claimName": "docs", "path": "a/book.txt"}
    for spec, uri in (
        ({"url": "https://host/book"}, "https://host/book"),
        ({"file": file}, "pvc://docs/a/book.txt"),
    ):
        context = view(text=None, **spec)
        (told, _) = puts(plan_context(snapshot(context, content="")))
        assert (told.context.uri, told.context.role) == (uri, "system")
        assert (told.context.prompt, told.context.messages) == ("", [])
        assert plan_context(settled(context, content="")).actions == ()
        other = view(text=None, url="https://host/other")
        changed = settled(context, content="")
        assert changed.context is not None
        moved = replace(changed.context, spec=other.spec)
        assert puts(plan_context(replace(changed, context=moved, now_s=NOW_S + 9)))


def test_a_lease_is_renewed_long_before_it_ends_and_not_before() -> None:
    at = with_copy(settled(view()))
    assert puts(plan_context(replace(at, now_s=NOW_S + LEASE_S / 2 - 60))) == []
    renewed = puts(plan_context(replace(at, now_s=NOW_S + LEASE_S / 2 + 60)))
    assert [put.context.expires_unix_s for put in renewed] == [NOW_S + LEASE_S * 1.5 + 60] * 2
    known = next(iter(at.states.values()))
    assert known is not None
    assert renewed[0].context.version > known.context.version
    assert renewed[0].context.created_unix_s == known.context.created_unix_s


def test_an_end_that_the_user_sets_is_met() -> None:
    at = settled(view(ttlSeconds=1000))
    known = next(iter(at.states.values()))
    assert known is not None
    assert known.context.expires_unix_s == NOW_S + 900
    assert puts(plan_context(replace(at, now_s=NOW_S + 800))) == []
    longer = replace(at, context=replace(at.context, spec=view(ttlSeconds=2000).spec))  # type: ignore[type-var]
    assert {put.context.expires_unix_s for put in puts(plan_context(longer))} == {NOW_S + 1900}
    over = plan_context(replace(at, now_s=NOW_S + 901))
    assert {put.context.deleted for put in puts(over)} == {True}
    assert ready(over)[:2] == ("False", "Expired")


def test_another_text_takes_its_place() -> None:
    at = with_copy(settled(view()))
    plan = plan_context(replace(at, content="another text", now_s=NOW_S + 50))
    assert {put.context.created_unix_s for put in puts(plan)} == {NOW_S + 50}
    assert ready(plan)[0] == "False"  # the copies are of the text before


def test_a_deleted_object_ends_its_context_and_no_clients() -> None:
    at = settled(view())
    plan = plan_context(snapshot(None, states=at.states))
    assert [put.context.deleted for put in puts(plan)] == [True, True]
    assert plan.destructive
    client = ContextState(Context("handbook", "m", "chat", "t", 1.0, 9e9))
    assert plan_context(snapshot(None, states=dict.fromkeys(GATEWAYS, client))).actions == ()


specs = st.fixed_dictionaries(
    {
        "copies": st.integers(1, 3),
        "tier": st.sampled_from([None, "Memory", "Disk"]),
        "ttlSeconds": st.sampled_from([None, 150, 10**6]),
        "role": st.sampled_from(["system", "user", "prompt"]),
        "tenant": st.sampled_from(["default", "a"]),
    }
)


@settings(deadline=None, max_examples=50)
@given(specs, specs, st.sampled_from(["one", "two"]), st.floats(0, 3 * LEASE_S))
def test_what_was_told_need_not_be_told_again(
    before: dict[str, Any], now: dict[str, Any], text: str, later_s: float
) -> None:
    """From whatever gateways know, one plan is enough, and its successor is quiet."""
    first = settled(view(**before), content="one")
    assert first.context is not None
    changed = replace(first.context, spec=view(**now).spec)
    again = settled(changed, now_s=NOW_S + later_s, content=text, states=first.states)
    plan = plan_context(again)
    assert plan.actions == ()
    ttl_s = now["ttlSeconds"]
    for state in again.states.values():
        assert state is not None
        if ttl_s is not None and NOW_S - 100 + ttl_s <= again.now_s:
            assert state.context.deleted
        else:
            assert not state.context.deleted
            assert state.context.expires_unix_s > again.now_s
            assert (state.context.copies, state.context.tenant) == (now["copies"], now["tenant"])


async def test_the_operator_reads_the_config_map_that_is_named_and_heals_a_gateway() -> None:
    world = World()
    world.kube.user_write(model_body())
    world.kube.user_write(fleet_body())
    world.kube.user_write(context_body(text=None, configMap={"name": "docs", "key": "book"}))
    gateway = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "tandem-gateway-x",
            "namespace": NAMESPACE,
            "labels": {
                LABEL_COMPONENT: COMPONENT_GATEWAY,
                "app.kubernetes.io/managed-by": "tandem",
            },
        },
        "spec": {},
        "status": {"phase": "Running", "podIP": "127.0.0.9"},
    }
    world.kube.user_write(gateway)
    await world.settle()
    assert world.told_contexts == []
    world.kube.objects[CONFIG_MAPS, NAMESPACE, "docs"] = {
        "metadata": {"name": "docs", "namespace": NAMESPACE, "uid": "uid-docs"},
        "data": {"book": "the whole book"},
    }
    await world.settle()
    ((pod, told),) = world.told_contexts
    assert (pod, told.messages[0]["content"]) == ("tandem-gateway-x", "the whole book")
    world.contexts.clear()  # it was restarted, and has met no pod that knows
    await world.settle()
    assert len(world.told_contexts) == 2
    world.kube.vanish(Ref(CACHED_CONTEXTS, NAMESPACE, "handbook"))
    world.restart()
    await world.reconciler.reconcile(Key("CachedContext", NAMESPACE, "handbook"))
    assert world.told_contexts[-1][1].deleted
