from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem_runtime.contract import Role
from tandem_runtime.gateway.pods import PodView
from tandem_runtime.gateway.route import Demand, NoRoute, Pair, choose, most_held


def pod(name: str, role: Role = Role.DECODE, revision: str = "r1", **changes: Any) -> PodView:
    fields: dict[str, Any] = {
        "uid": name,
        "name": name,
        "ip": "127.0.0.1",
        "fleet": "chat",
        "role": role,
        "revision": revision,
        "served_names": ("m",),
        "created_unix_s": 0.0,
        "ready": True,
        "leaving": False,
    }
    return PodView(**{**fields, **changes})


def prefill(name: str, revision: str = "r1", **changes: Any) -> PodView:
    return pod(name, Role.PREFILL, revision, **changes)


def names(chosen: Pair | NoRoute) -> tuple[str, str | None]:
    assert isinstance(chosen, Pair), chosen
    return chosen.decode.name, None if chosen.prefill is None else chosen.prefill.name


DEMAND = Demand("s", prompt_tokens=100)


class TestPairing:
    def test_within_one_revision(self) -> None:
        pods = [prefill("p1", "r1"), pod("d1", revision="r1"), pod("d2", revision="r2")]
        for n in range(20):
            assert names(choose(pods, Demand(f"s{n}", 100), {})) == ("d1", "p1")

    def test_both_revisions_take_part_once_both_are_whole(self) -> None:
        pods = [prefill("p1", "r1"), pod("d1", revision="r1")]
        pods += [prefill("p2", "r2"), pod("d2", revision="r2")]
        seen = Counter(names(choose(pods, Demand(f"s{n}", 100), {})) for n in range(100))
        assert set(seen) == {("d1", "p1"), ("d2", "p2")}

    def test_when_no_revision_has_both_decode_pods_prefill_themselves(self) -> None:
        pods = [prefill("p1", "r1"), pod("d2", revision="r2")]
        assert names(choose(pods, DEMAND, {})) == ("d2", None)
        assert names(choose([prefill("p1", ready=False), pod("d1")], DEMAND, {})) == ("d1", None)

    def test_an_aggregated_pod_needs_no_partner(self) -> None:
        assert names(choose([pod("b", Role.BOTH)], DEMAND, {})) == ("b", None)
        mixed = [pod("b", Role.BOTH), prefill("p")]
        assert names(choose(mixed, DEMAND, {})) == ("b", None)

    def test_a_failed_prefill_pod_is_left_out(self) -> None:
        pods = [prefill("p1"), prefill("p2"), pod("d")]
        avoided = Demand("s", 100, avoid={"p1"})
        assert names(choose(pods, avoided, {})) == ("d", "p2")
        assert names(choose(pods, Demand("s", 100, avoid={"p1", "p2"}), {})) == ("d", None)


class TestWhoIsLeftOut:
    @pytest.mark.parametrize("change", [{"ready": False}, {"leaving": True}])
    def test_pods_that_do_not_admit(self, change: dict[str, Any]) -> None:
        assert names(choose([pod("a", **change), pod("b")], DEMAND, {})) == ("b", None)

    def test_the_sentence_when_nobody_is_left(self) -> None:
        pods = [pod("a", ready=False), pod("b", leaving=True), pod("c"), prefill("p")]
        chosen = choose(pods, Demand("s", 10, avoid={"c"}), {})
        assert chosen == NoRoute(
            "2 of 3 decode pods are ready, 1 are leaving, 1 failed this request"
        )
        assert choose([prefill("p")], DEMAND, {}) == NoRoute("it has no pod that decodes")


class TestCost:
    def test_the_least_loaded_pod(self) -> None:
        pods = [prefill("p1"), prefill("p2"), pod("d1"), pod("d2")]
        loads = {"p1": 500, "p2": 400, "d1": 10, "d2": 20}
        assert names(choose(pods, DEMAND, loads)) == ("d1", "p2")

    def test_a_held_prefix_draws_until_the_queue_outweighs_it(self) -> None:
        pods = [prefill("p1"), prefill("p2"), pod("d")]
        demand = Demand("s", 1000, held_tokens={"p2": 600})
        assert names(choose(pods, demand, {"p2": 599})) == ("d", "p2")
        assert names(choose(pods, demand, {"p2": 601})) == ("d", "p1")

    def test_among_equals_streams_spread(self) -> None:
        pods = [pod(f"d{n}") for n in range(4)]
        seen = Counter(names(choose(pods, Demand(f"s{n}", 10), {}))[0] for n in range(1000))
        assert all(150 < seen[p.name] < 350 for p in pods)


@given(
    pods=st.lists(
        st.builds(
            pod,
            st.integers(0, 10**9).map(str),
            role=st.sampled_from(Role),
            revision=st.sampled_from(["r1", "r2", "r3"]),
            ready=st.booleans(),
            leaving=st.booleans(),
        ),
        max_size=12,
        unique_by=lambda p: p.uid,
    ),
    data=st.data(),
)
def test_whatever_is_chosen_may_serve(pods: list[PodView], data: st.DataObject) -> None:
    uids = [p.uid for p in pods]
    avoid = data.draw(st.sets(st.sampled_from(uids))) if uids else set()
    loads = {uid: data.draw(st.integers(0, 1000)) for uid in uids}
    chosen = choose(pods, Demand("s", 100, avoid=avoid), loads)
    could = [p for p in pods if p.admits and p.uid not in avoid]
    if isinstance(chosen, NoRoute):
        assert not any(p.decodes for p in could)
        return
    assert chosen.decode in could
    assert chosen.decode.decodes
    partners = {p.revision for p in could if p.role is Role.PREFILL}
    if chosen.prefill is not None:
        assert chosen.prefill in could
        assert chosen.prefill.role is Role.PREFILL
        assert chosen.prefill.revision == chosen.decode.revision
        assert chosen.decode.role is Role.DECODE
    elif chosen.decode.role is Role.DECODE:
        whole = [p for p in could if p.role is Role.DECODE and p.revision in partners]
        assert not whole, "a revision with both was there"


def test_a_pod_that_seems_slow_gets_less() -> None:
    """Of streams that stay, four fifths as many as its peer at 25 %."""
    pods = [pod("slow", Role.BOTH, slower_percent=25), pod("well", Role.BOTH)]
    outstanding: Counter[str] = Counter()
    for n in range(90):
        chosen = choose(pods, Demand(f"s{n}", 100), outstanding)
        outstanding[names(chosen)[0]] += 100
    assert outstanding["slow"] == pytest.approx(4000, abs=200)


def test_a_slow_pod_still_serves_alone() -> None:
    assert names(choose([pod("slow", Role.BOTH, slower_percent=400)], DEMAND, {})) == ("slow", None)


class TestMostHeld:
    def test_the_least_busy_one_of_those_with_most_pages(self) -> None:
        pods = [pod("a"), prefill("b"), pod("c"), pod("d")]
        pages = {"a": 3, "b": 4, "c": 4}
        assert most_held(pods, pages, {"b": 10}) == pods[2]
        assert most_held(pods, pages, {"c": 10}) == pods[1]

    def test_one_that_leaves_still_gives_and_one_that_is_not_ready_does_not(self) -> None:
        leaving, down = pod("a", leaving=True), pod("b", ready=False)
        assert most_held([leaving, down], {"a": 1, "b": 9}, {}) == leaving
        assert most_held([down], {"b": 9}, {}) is None
        assert most_held([pod("c")], {"c": 0}, {}) is None


def both(name: str, **changes: Any) -> PodView:
    return pod(name, Role.BOTH, **changes)


class TestPeers:
    HELD: ClassVar = {"held_tokens": {"a": 1024}, "told_tokens": {"a": 1024}}

    def chosen(self, pods: list[PodView], outstanding: dict[str, int], **fields: Any) -> str:
        return names(choose(pods, Demand("s", 2000, **self.HELD, **fields), outstanding))[0]

    def test_what_another_pod_gives_costs_its_percent(self) -> None:
        pods = [both("a"), both("b")]
        # Without peers the holder may be busier by all that it holds; with them by a tenth less.
        assert self.chosen(pods, {"a": 1023}) == "a"
        assert self.chosen(pods, {"a": 1025}) == "b"
        takes = {"peer_percent": {"a": 10, "b": 10}}
        assert self.chosen(pods, {"a": 102}, **takes) == "a"
        assert self.chosen(pods, {"a": 104}, **takes) == "b"

    def test_nothing_is_given_by_other_revisions_and_pods_that_are_not_ready(self) -> None:
        takes = {"peer_percent": {"b": 10}}
        for holder in (both("a", revision="r2"), both("a", ready=False)):
            pods = [holder, both("b"), both("c")]
            assert self.chosen(pods, {"a": 5000, "b": 10}, **takes) == "c"
        pods = [both("a", leaving=True), both("b"), both("c")]
        assert self.chosen(pods, {"b": 10}, **takes) == "b"

    def test_a_prefill_pod_takes_pages_and_a_decode_pod_is_handed_them(self) -> None:
        pods = [prefill("a"), prefill("b"), pod("d"), pod("e")]
        busy = {"a": 104, "d": 104}
        demand = Demand("s", 2000, {"a": 1024, "d": 1024}, {"a": 1024, "d": 1024})
        percents = dict.fromkeys("abde", 10)
        assert names(choose(pods, replace(demand, peer_percent=percents), busy)) == ("d", "b")

    @given(held=st.integers(0, 2000), percent=st.integers(1, 100), load=st.integers(0, 3000))
    def test_a_pod_that_takes_pages_is_never_dearer(
        self, held: int, percent: int, load: int
    ) -> None:
        pods = [both("a"), both("b")]
        fields: dict[str, Any] = {
            "held_tokens": {"a": 1024, "b": held},
            "told_tokens": {"a": 1024, "b": held},
        }
        takes = Demand("s", 2000, **fields, peer_percent={"b": percent})
        if names(choose(pods, Demand("s", 2000, **fields), {"b": load}))[0] == "b":
            assert names(choose(pods, takes, {"b": load}))[0] == "b"
