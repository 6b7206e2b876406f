"""Rollout steps: exact sequences, then invariants under arbitrary faults."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from ideal_rollout import all_steps
from tandem_operator.plan.rollout import (
    Member,
    PoolState,
    PoolStep,
    complete,
    next_step,
    routable,
)


def pool(
    role: str, size: int, *, surge: int = 1, unavailable: int = 0, serving: str | None = "a"
) -> PoolState:
    """A pool of Ready pods of revision a that should move to b."""
    members = tuple(
        Member(f"{role}-a-{i}", "a", ready=True, alone=role == "both", slot=i) for i in range(size)
    )
    return PoolState(role, size, "b", serving, surge, unavailable, members)


def with_members(state: PoolState, *members: Member) -> PoolState:
    return replace(state, members=(*state.members, *members))


def test_a_fleet_that_serves_its_target_has_nothing_to_do() -> None:
    states = [replace(pool("prefill", 2), target="a"), replace(pool("decode", 3), target="a")]
    step = next_step(states)
    assert step.idle
    assert not step.rolling
    assert complete(states)


def test_the_first_rollout_makes_every_pod_at_once() -> None:
    states = [PoolState(role, 3, "b", None, 1, 0) for role in ("prefill", "decode")]
    step = next_step(states)
    assert [p.create for p in step.pools] == [("b",) * 3] * 2
    assert not step.rolling


def test_one_pool_replaces_its_pods_one_by_one() -> None:
    steps = [(p.create, p.leave) for s in all_steps([pool("both", 2)]) for p in s.pools]
    assert steps == [
        (("b",), ()),
        ((), ()),
        ((), ("both-a-1",)),
        (("b",), ()),
        ((), ()),
        ((), ("both-a-0",)),
    ]


def test_the_last_old_prefill_pod_goes_after_the_old_decode_pods() -> None:
    steps = all_steps([pool("prefill", 1), pool("decode", 2)])
    departures = [name for s in steps for p in s.pools for name in p.leave]
    assert departures == ["decode-a-1", "decode-a-0", "prefill-a-0"]
    gone = [s.pools[0].leave for s in steps].index(("prefill-a-0",))
    assert steps[gone].pools[1] == PoolStep()


def test_decode_waits_until_the_target_has_a_prefill_pod() -> None:
    decode = with_members(pool("decode", 2), Member("decode-b-0", "b", ready=True))
    waiting = with_members(pool("prefill", 1), Member("prefill-b-0", "b"))
    assert next_step([waiting, decode]).idle
    ready = with_members(pool("prefill", 1), Member("prefill-b-0", "b", ready=True))
    assert next_step([ready, decode]).pools[1].leave == ("decode-a-1",)


def test_no_room_replaces_in_place_below_the_floor_that_the_user_gave() -> None:
    states = [pool("decode", 3, surge=0, unavailable=1)]
    steps = [(p.create, p.leave) for s in all_steps(states) for p in s.pools]
    assert steps[:3] == [((), ("decode-a-2",)), (("b",), ()), ((), ())]


def test_in_place_goes_on_when_the_only_decode_pod_has_to_go_first() -> None:
    """Found by test_fleet_faults: prefill waited for decode, decode for prefill's floor."""
    prefill = pool("prefill", 3, surge=0, unavailable=1)
    moved = replace(prefill.members[2], name="prefill-b-0", revision="b")
    prefill = replace(prefill, members=(*prefill.members[:2], moved))
    decode = pool("decode", 1, surge=0, unavailable=1)
    assert next_step([prefill, decode]).pools[1].leave == ("decode-a-0",)
    all_steps([prefill, decode])


@pytest.mark.parametrize("broken_role", ["prefill", "decode"])
def test_a_broken_pod_halts_every_pool(broken_role: str) -> None:
    states = [
        with_members(pool(role, 2), Member(f"{role}-b-0", "b", broken=role == broken_role))
        for role in ("prefill", "decode")
    ]
    step = next_step(states)
    assert step.halted
    assert step.idle


def test_a_pod_lost_in_a_halted_rollout_comes_back_in_the_serving_revision() -> None:
    state = with_members(pool("both", 2), Member("both-b-0", "b", broken=True))
    lost = replace(state, members=state.members[1:])
    assert next_step([lost]).pools[0].create == ("a",)


def test_a_pod_lost_before_the_target_is_proven_comes_back_in_the_serving_revision() -> None:
    state = with_members(pool("both", 2), Member("both-b-0", "b"))
    lost = replace(state, members=state.members[1:])
    assert next_step([lost]).pools[0].create == ("a",)


def test_a_pod_lost_after_the_target_is_proven_comes_back_in_the_target() -> None:
    state = with_members(pool("both", 2), Member("both-b-0", "b", ready=True, alone=True))
    lost = replace(state, members=state.members[1:])
    assert next_step([lost]).pools[0].create == ("b",)


def test_no_resources_for_a_surge_pod_replaces_one_in_place() -> None:
    state = with_members(pool("both", 2), Member("both-b-0", "b", starved=True))
    assert next_step([state]).pools[0].leave == ("both-a-1",)


def test_no_resources_and_a_single_replica_waits() -> None:
    state = with_members(pool("both", 1), Member("both-b-0", "b", starved=True))
    assert next_step([state]).idle


def test_decode_keeps_its_pods_while_prefill_waits_for_room_that_it_cannot_make() -> None:
    prefill = with_members(pool("prefill", 1), Member("prefill-b-0", "b", starved=True))
    decode = with_members(pool("decode", 2), Member("decode-b-0", "b", starved=True))
    assert next_step([prefill, decode]).idle


def test_the_pods_of_an_abandoned_revision_go_first() -> None:
    abandoned = Member("both-x-0", "x", broken=True)
    state = with_members(pool("both", 2), abandoned)
    step = next_step([state]).pools[0]
    assert step.leave == ("both-x-0",)


def test_scale_in_takes_the_pod_with_the_least_to_lose() -> None:
    members = (
        Member("d-0", "a", ready=True, in_flight=3, slot=0),
        Member("d-1", "a", ready=True, in_flight=1, slot=1),
        Member("d-2", "a", ready=True, in_flight=1, slot=2),
        Member("d-3", "a", ready=False, in_flight=0, slot=3),
    )
    state = PoolState("decode", 2, "a", "a", 1, 0, members)
    assert next_step([state]).pools[0].leave == ("d-3", "d-2")


def test_a_scale_out_takes_back_a_pod_that_still_drains() -> None:
    members = (
        Member("d-0", "a", ready=True),
        Member("d-1", "a", ready=True, leaving=True),
    )
    state = PoolState("decode", 3, "a", "a", 1, 0, members)
    step = next_step([state]).pools[0]
    assert (step.stay, step.create) == (("d-1",), ("a",))


def test_a_lost_pod_is_replaced_while_others_drain() -> None:
    members = (
        Member("d-0", "a", ready=True),
        Member("d-2", "a", ready=False, leaving=True),
        Member("d-3", "a", ready=False, leaving=True),
    )
    state = PoolState("decode", 2, "a", "a", 1, 0, members)
    assert next_step([state]).pools[0].create == ("a",)


def test_adding_a_prefill_pool_keeps_the_aggregated_pods_until_pairs_serve() -> None:
    both = pool("both", 2)
    decode = replace(both, role="decode")
    prefill = PoolState("prefill", 1, "b", None, 1, 0)
    steps = all_steps([prefill, decode])
    first_departure = next(i for i, s in enumerate(steps) if s.pools[1].leave)
    assert steps[first_departure].proven
    assert steps[0].pools[0].create == ("b",)


def test_removing_the_prefill_pool_ends_it_after_its_decode_pods() -> None:
    target = replace(pool("decode", 2), role="both")
    retired = replace(pool("prefill", 1), size=0)
    steps = all_steps([retired, target])
    departures = [name for s in steps for p in s.pools for name in p.leave]
    assert departures[-1] == "prefill-a-0"


def test_two_unfinished_revisions_do_not_hold_each_other() -> None:
    """Found by the machine below: a fleet that was edited twice before its first rollout ended.

    Each old revision has a decode pod, without which the other's prefill pods fall short.
    """
    prefill = [Member(f"p-{r}", r, ready=True) for r in "ab"]
    decode = [Member(f"d-{r}", r, ready=True) for r in "ab"]
    states = [
        PoolState("prefill", 2, "c", None, 1, 0, tuple(prefill)),
        PoolState("decode", 1, "c", None, 1, 0, tuple(decode)),
    ]
    ends = [name for s in all_steps(states) for p in s.pools for name in p.leave]
    assert {"d-a", "d-b", "p-a", "p-b"} <= set(ends)


def displaced(state: PoolState, *slots: int) -> PoolState:
    """Some pods' nodes are to be drained."""
    members = tuple(replace(m, displaced=m.slot in slots) for m in state.members)
    return replace(state, target="a", members=members)


def test_a_displaced_pod_leaves_when_another_serves_in_its_place() -> None:
    tainted = displaced(pool("both", 2), 1)
    step = next_step([tainted])
    assert step.pools == (PoolStep(create=("a",)),)
    assert not step.rolling
    coming = Member("both-a-2", "a", alone=True, slot=2)
    assert next_step([with_members(tainted, coming)]).idle
    come = with_members(tainted, replace(coming, ready=True))
    assert next_step([come]).pools == (PoolStep(leave=("both-a-1",), displaced=("both-a-1",)),)


def test_displaced_pods_are_replaced_all_at_once_and_leave_one_for_one() -> None:
    tainted = displaced(pool("both", 3), 0, 2)
    assert next_step([tainted]).pools[0].create == ("a", "a")
    one = with_members(tainted, Member("n0", "a", ready=True, alone=True), Member("n1", "a"))
    assert len(next_step([one]).pools[0].leave) == 1


def test_what_takes_a_displaced_pods_place_in_mid_rollout_does_not_leave() -> None:
    """Nothing of the target serves: once such a pod was made and sent away again without end."""
    tainted = displaced(pool("decode", 3), 1, 2)
    states = [replace(pool("prefill", 0), serving="a"), tainted]
    (_, step) = next_step(states).pools
    assert step == PoolStep(create=("a",))
    come = with_members(tainted, Member("decode-a-3", "a", slot=3))
    assert next_step([states[0], come]).pools[1].leave == ()
    (_, step) = next_step(
        [states[0], replace(come, members=tuple(replace(m, ready=True) for m in come.members))]
    ).pools
    assert len(step.displaced) <= 1
    assert step.leave == step.displaced


def test_without_room_for_another_a_displaced_pod_stays() -> None:
    """Its going would free nothing that the other could use: its node takes no pods."""
    tainted = displaced(pool("both", 2), 1)
    assert next_step([with_members(tainted, Member("n", "a", starved=True, alone=True))]).idle


def test_the_taint_goes_while_the_replacement_comes() -> None:
    state = replace(pool("both", 2), target="a")
    coming = Member("both-a-2", "a", alone=True, slot=2)
    assert next_step([with_members(state, coming)]).pools[0].leave == ("both-a-2",)


def test_a_displaced_pod_that_drains_does_not_come_back_for_a_larger_pool() -> None:
    tainted = displaced(pool("both", 2), 1)
    members = tuple(replace(m, leaving=m.displaced) for m in tainted.members)
    state = replace(tainted, size=3, members=members)
    assert next_step([state]).pools == (PoolStep(create=("a", "a")),)


def test_a_displaced_prefill_pod_keeps_its_decode_pods_served() -> None:
    prefill, decode = displaced(pool("prefill", 1), 0), replace(pool("decode", 2), target="a")
    assert next_step([prefill, decode]).pools[0] == PoolStep(create=("a",))
    come = with_members(prefill, Member("prefill-a-1", "a", ready=True, slot=1))
    assert next_step([come, decode]).pools[0].leave == ("prefill-a-0",)


def test_a_displaced_pod_of_a_pool_that_sleeps_goes() -> None:
    prefill, decode = displaced(pool("prefill", 1), 0), replace(pool("decode", 2), target="a")
    step = next_step([replace(prefill, target="a", size=0), decode])
    assert step.pools == (PoolStep(leave=("prefill-a-0",), displaced=("prefill-a-0",)), PoolStep())


def test_routable_needs_a_pair_or_falls_back_to_decode() -> None:
    prefill = replace(pool("prefill", 1), members=())
    decode = pool("decode", 1)
    assert routable([prefill, decode]) == {"a"}
    paired = with_members(prefill, Member("p", "b", ready=True))
    both = with_members(decode, Member("d", "b", ready=True))
    assert routable([paired, both]) == {"b"}


class Rollouts(RuleBasedStateMachine):
    """A fleet under faults. Revisions whose name starts with `bad` never become Ready."""

    def __init__(self) -> None:
        super().__init__()
        self.pools: list[PoolState] = []
        self.serial = 0

    @initialize(
        split=st.booleans(),
        sizes=st.tuples(st.integers(0, 3), st.integers(1, 4)),
        budget=st.sampled_from([(1, 0), (0, 1), (2, 1), (1, 2), (3, 0)]),
    )
    def start(self, split: bool, sizes: tuple[int, int], budget: tuple[int, int]) -> None:
        roles = ["prefill", "decode"] if split else ["both"]
        self.pools = [
            PoolState(role, size, "good0", None, *budget)
            for role, size in zip(roles, sizes[-len(roles) :], strict=True)
        ]

    def _edit(self, index: int, members: tuple[Member, ...]) -> None:
        self.pools[index] = replace(self.pools[index], members=members)

    def _map(self, pick: int, change: Member | None) -> None:
        every = [(i, m) for i, p in enumerate(self.pools) for m in p.members]
        if every:
            index, member = every[pick % len(every)]
            kept = [m for m in self.pools[index].members if m.name != member.name]
            self._edit(index, (*kept, *([change] if change else ())))

    def _pick(self, pick: int) -> Member | None:
        every = [m for p in self.pools for m in p.members]
        return every[pick % len(every)] if every else None

    @rule(repeat=st.integers(1, 3))
    def reconcile(self, repeat: int) -> None:
        for _ in range(repeat):
            if complete(self.pools):
                self.pools = [replace(p, serving=p.target) for p in self.pools]
            before = list(self.pools)
            step = next_step(before)
            self._apply(step.pools)
            self._check(before)

    def _apply(self, steps: tuple[PoolStep, ...]) -> None:
        for index, step in enumerate(steps):
            state = self.pools[index]
            members = [
                replace(m, leaving=(m.leaving or m.name in step.leave) and m.name not in step.stay)
                for m in state.members
            ]
            for revision in step.create:
                self.serial += 1
                name, alone = f"{state.role}-{self.serial}", state.role == "both"
                members.append(Member(name, revision, alone=alone, slot=self.serial))
            self._edit(index, tuple(members))

    def _check(self, before: list[PoolState]) -> None:
        was, now = routable(before), routable(self.pools)
        rolling = any(p.serving not in (None, p.target) for p in before)
        for old, new in zip(before, self.pools, strict=True):
            starved = any(m.starved for m in old.new) and old.size > 1
            floor = old.size - max(old.max_unavailable, int(starved))
            available = sum(m.ready and m.revision in was for m in old.active)
            left = sum(m.ready and m.revision in now for m in new.active)
            if old.role == "prefill" and not now and self._may_stop_decoding(before):
                continue  # Nothing decodes for a while, as the user allows: prefill serves nobody.
            assert left >= min(available, floor), "a step took capacity below the floor"
            if len(new.members) > len(old.members) and rolling:
                away = sum(m.leaving and m.revision != new.target for m in new.members)
                assert len(new.active) + away <= new.size + new.max_surge
            if old.role == "prefill" and old.max_surge and old.size:
                self._check_partners(before, old, new)

    def _may_stop_decoding(self, before: list[PoolState]) -> bool:
        return all(p.size <= p.max_unavailable for p in before if p.role != "prefill")

    def _check_partners(self, before: list[PoolState], old: PoolState, new: PoolState) -> None:
        decode = [m for p in before if p.role != "prefill" for m in p.members if m.ready]
        for revision in {m.revision for m in old.old if m.ready} & {m.revision for m in decode}:
            assert any(m.revision == revision for m in new.active), "decode lost its partner"

    @rule(pick=st.integers(0, 99))
    def become_ready(self, pick: int) -> None:
        member = self._pick(pick)
        if member and not member.revision.startswith("bad"):
            self._map(pick, replace(member, ready=True, broken=False, starved=False))

    @rule(pick=st.integers(0, 99))
    def falter(self, pick: int) -> None:
        member = self._pick(pick)
        if member:
            self._map(pick, replace(member, ready=False))

    @rule(pick=st.integers(0, 99))
    def lose(self, pick: int) -> None:
        self._map(pick, None)

    @rule(pick=st.integers(0, 99))
    def break_down(self, pick: int) -> None:
        member = self._pick(pick)
        if member and member.revision.startswith("bad"):
            self._map(pick, replace(member, broken=True, ready=False))

    @rule(pick=st.integers(0, 99), displaced=st.booleans())
    def taint_or_untaint(self, pick: int, displaced: bool) -> None:
        member = self._pick(pick)
        if member:
            self._map(pick, replace(member, displaced=displaced))

    @rule()
    def drains_end(self) -> None:
        for index, state in enumerate(self.pools):
            self._edit(index, tuple(m for m in state.members if not m.leaving))

    @rule(bad=st.booleans())
    def new_revision(self, bad: bool) -> None:
        self.serial += 1
        target = f"{'bad' if bad else 'good'}{self.serial}"
        self.pools = [replace(p, target=target) for p in self.pools]

    @rule()
    def roll_back(self) -> None:
        if all(p.serving for p in self.pools):
            self.pools = [replace(p, target=p.serving or "") for p in self.pools]

    @rule(pick=st.integers(0, 1), size=st.integers(1, 5))
    def resize(self, pick: int, size: int) -> None:
        index = pick % len(self.pools)
        self.pools[index] = replace(self.pools[index], size=size)

    @precondition(lambda self: self.pools)
    @invariant()
    def never_stuck(self) -> None:
        """From here, if nothing more goes wrong, the fleet ends where it should."""
        pools = self.pools
        for _ in range(200):
            if complete(pools):
                pools = [replace(p, serving=p.target) for p in pools]
            step = next_step(pools)
            following = [_settle(p, s) for p, s in zip(pools, step.pools, strict=True)]
            if following == pools:
                break
            pools = following
        else:
            pytest.fail("no end")
        if all(not p.target.startswith("bad") for p in pools):
            assert complete(pools)
            return
        good = [p for p in pools if p.role != "prefill" and p.serving]
        for p in good:
            if not (p.serving or "").startswith("bad"):
                ready = sum(m.ready for m in p.active)
                assert ready >= p.size - p.max_unavailable, "a bad revision took capacity"


def _settle(state: PoolState, step: PoolStep) -> PoolState:
    """A cluster in which every action succeeds at once and only bad revisions fail."""
    gone = [m.name for m in state.members if m.leaving and m.name not in step.stay]
    kept = [m for m in state.members if m.name not in (*step.leave, *gone)]
    taken = {m.name for m in kept}
    free = (f"{state.role}~{i}" for i in range(1000) if f"{state.role}~{i}" not in taken)
    made = [Member(next(free), r, alone=state.role == "both") for r in step.create]
    members = tuple(
        replace(
            m,
            leaving=False,
            ready=not m.revision.startswith("bad"),
            broken=m.revision.startswith("bad"),
            starved=False,
        )
        for m in [*kept, *made]
    )
    return replace(state, members=members)


TestRollouts = Rollouts.TestCase
TestRollouts.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_prefill_pool_that_wakes_in_mid_rollout_takes_no_capacity() -> None:
    """Without prefill pods every revision serves. The first one, of the target, makes the old
    decode pods unroutable: they leave as fast as others come all the same."""
    awake = replace(pool("prefill", 0), size=1)
    awake = with_members(awake, Member("prefill-b-0", "b", ready=True))
    decode = with_members(pool("decode", 3), Member("decode-b-0", "b", ready=True))
    assert [len(p.leave) for p in next_step([awake, decode]).pools] == [0, 1]
    left = [len(p.leave) for s in all_steps([awake, decode]) for p in s.pools]
    assert max(left) == 1


def test_a_fleet_that_sleeps_has_rolled_nothing_out() -> None:
    """Whether the target can serve is not known before a pod of it does."""
    asleep = [replace(pool(role, 0), size=0) for role in ("prefill", "decode")]
    assert not complete(asleep)
    awake = [replace(state, size=2) for state in asleep]
    step = next_step(awake)
    assert step.rolling
    assert all("a" in p.create for p in step.pools), "what served comes back beside it"
