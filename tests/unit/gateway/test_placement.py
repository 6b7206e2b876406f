"""Which pods keep which contexts: enough copies of each revision, no needless ones, and it ends."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_runtime.contract import Role
from tandem_runtime.gateway.placement import keepers, repairs
from tandem_runtime.gateway.pods import PodView
from tandem_runtime.protocol import Context, ContextCopy


def view(
    n: int, role: Role, revision: str, *, ready: bool = True, leaving: bool = False
) -> PodView:
    return PodView(
        f"uid-{n}", f"pod-{n}", "127.0.0.1", "chat", role, revision, ("m",), 1.0, ready, leaving
    )


def context(n: int, copies: int = 1, version: int = 0, deleted: bool = False) -> Context:
    return Context(
        f"ctx-{n}", "m", "chat", "t", 1.0, 99.0, copies=copies, version=version, deleted=deleted
    )


def copy(of: Context, state: str = "ready", version: int | None = None) -> ContextCopy:
    have = of.version if version is None else version
    return ContextCopy(of.id, of.created_unix_s, have, state)  # type: ignore[arg-type]


pods = st.lists(
    st.tuples(st.sampled_from(Role), st.sampled_from(["r1", "r2"]), st.booleans(), st.booleans()),
    max_size=8,
).map(
    lambda drawn: [
        view(n, *rest[:2], ready=rest[2], leaving=rest[3]) for n, rest in enumerate(drawn)
    ]
)
contexts = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2), st.booleans()), max_size=5).map(
    lambda drawn: [context(n, *rest) for n, rest in enumerate(drawn)]
)


@settings(deadline=None, max_examples=60)
@given(pods, contexts, st.data())
def test_after_the_repairs_there_is_nothing_to_repair(
    members: list[PodView], wanted: list[Context], data: st.DataObject
) -> None:
    held: dict[str, dict[str, ContextCopy]] = {}
    for pod in members:
        for one in wanted:
            state = data.draw(st.sampled_from(["none", "ready", "building", "failed"]))
            if state != "none":
                held.setdefault(pod.uid, {})[one.id] = copy(one, state, 0)
    before = {one.id: keepers(one, members, held) for one in wanted}
    for pod, one in repairs(wanted, members, held):
        held.setdefault(pod.uid, {})[one.id] = copy(one, "building")
    assert repairs(wanted, members, held) == []
    for one in wanted:
        assert all(pod.admits for pod in before[one.id])
        for revision in {pod.revision for pod in members}:
            able = [p for p in members if p.revision == revision and p.admits]
            able = [p for p in able if p.role is Role.PREFILL] or able
            chosen = [p for p in before[one.id] if p.revision == revision]
            assert len(chosen) == min(one.copies, len(able))
            assert all(pod in able for pod in chosen)
            if not one.deleted:
                assert all(one.id in held.get(pod.uid, {}) for pod in chosen)


def test_who_has_it_goes_on_and_who_failed_comes_last() -> None:
    members = [view(n, Role.BOTH, "r1") for n in range(4)]
    one = context(0, copies=2)
    held = {"uid-2": {one.id: copy(one)}, "uid-0": {one.id: copy(one, "failed")}}
    assert keepers(one, members, held)[0].uid == "uid-2"
    assert "uid-0" not in {pod.uid for pod in keepers(one, members, held)}
    assert len(keepers(context(0, copies=4), members, held)) == 4


def test_gateways_choose_alike_and_contexts_spread() -> None:
    members = [view(n, Role.BOTH, "r1") for n in range(4)]
    chosen = [keepers(context(n), members, {})[0].uid for n in range(80)]
    assert chosen == [keepers(context(n), members[::-1], {})[0].uid for n in range(80)]
    assert all(chosen.count(pod.uid) >= 8 for pod in members)


def test_what_is_deleted_goes_to_all_who_have_it_and_to_nobody_else() -> None:
    members = [view(0, Role.BOTH, "r1"), view(1, Role.BOTH, "r1", leaving=True)]
    gone = context(0, version=2, deleted=True)
    held = {"uid-1": {gone.id: copy(gone, "ready", 1)}}
    assert repairs([gone], members, held) == [(members[1], gone)]
