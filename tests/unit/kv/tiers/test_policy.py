"""Budget, pins, floors, quotas and determinism of a tier's policy, whatever is asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_runtime.kv.tiers.policy import Decision, Share, TierPolicy

SHARES = {"floored": Share(floor_pages=4), "limited": Share(quota_pages=5)}
DEFAULT = 7
TENANTS = ["floored", "limited", "a", "b"]


def pages(tenant: str, document: int, count: int) -> list[bytes]:
    return [
        blake2b(f"{tenant} {document} {page}".encode(), digest_size=16).digest()
        for page in range(count)
    ]


@dataclass(frozen=True)
class Act:
    what: str
    tenant: str
    document: int
    count: int


acts = st.builds(
    Act,
    st.sampled_from(["use", "use", "use", "goes on", "keep", "pin", "unpin", "drop"]),
    st.sampled_from(TENANTS),
    st.integers(0, 5),
    st.integers(1, 14),
)


class Model:
    """What a tier that obeys the policy would hold."""

    def __init__(self, capacity: int, default: int | None = None) -> None:
        self.policy = TierPolicy(capacity, shares=SHARES, default_quota_pages=default)
        self.held: dict[bytes, str] = {}
        self.pinned: list[list[bytes]] = []

    def unpinned(self, tenant: str) -> int:
        """Of his pages."""
        pinned = {key for keys in self.pinned for key in keys}
        return sum(owner == tenant and key not in pinned for key, owner in self.held.items())

    def count(self, tenant: str) -> int:
        return sum(owner == tenant for owner in self.held.values())

    def act(self, act: Act) -> Decision | bool | None:
        keys = pages(act.tenant, act.document, act.count)
        if act.what in ("use", "goes on", "keep"):
            decision = (
                self.policy.keep(act.tenant, keys)
                if act.what == "keep"
                else self.policy.use(act.tenant, keys, goes_on=act.what == "goes on")
            )
            if decision is None:
                return None
            if act.what == "keep":
                self.pinned.append(keys)
            for key in decision.evict:
                del self.held[key]
            for place in decision.store:
                assert keys[place] not in self.held
                self.held[keys[place]] = act.tenant
            return decision
        if act.what == "pin":
            pinned = self.policy.pin(keys)
            if pinned:
                self.pinned.append(keys)
            return pinned
        if act.what == "unpin" and self.pinned:
            self.policy.unpin(self.pinned.pop())
        if act.what == "drop" and not any(keys[0] in pinned for pinned in self.pinned):
            self.policy.drop(keys[0])
            self.held.pop(keys[0], None)
        return None


@settings(deadline=None)
@given(st.lists(acts, max_size=80), st.integers(6, 30), st.sampled_from([None, DEFAULT]))
def test_budget_pins_floors_and_quotas_hold(
    steps: list[Act], capacity: int, default: int | None
) -> None:
    model = Model(capacity, default)
    for step in steps:
        before = model.count("floored")
        quota_pinned = sum(
            model.held.get(key) == "limited" for key in {k for keys in model.pinned for k in keys}
        )
        model.act(step)
        assert len(model.held) == model.policy.resident_pages <= capacity
        for keys in model.pinned:
            assert all(model.policy.has(key) and key in model.held for key in keys)
        assert all(model.policy.has(key) for key in model.held)
        assert model.count("limited") <= max(5, quota_pinned)
        if default is not None and step.what in ("use", "goes on", "keep"):
            unpinned = model.unpinned(step.tenant)
            assert step.tenant in SHARES or unpinned <= default
        if step.what in ("use", "goes on", "keep") and step.tenant != "floored":
            assert model.count("floored") >= min(before, 4)
        assert model.policy.pages_of("floored") == model.count("floored")


@settings(deadline=None)
@given(st.lists(acts, max_size=60))
def test_the_same_acts_give_the_same_decisions(steps: list[Act]) -> None:
    one, other = Model(12), Model(12)
    assert [one.act(step) for step in steps] == [other.act(step) for step in steps]


def test_before_it_has_learnt_it_is_lru_that_evicts_ends_first() -> None:
    policy = TierPolicy(6)
    old, new = pages("a", 0, 4), pages("a", 1, 4)
    assert policy.use("a", old) == Decision((0, 1, 2, 3))
    assert policy.use("a", new) == Decision((0, 1, 2, 3), (old[3], old[2]))
    assert policy.lookup(old) == 2


def test_a_scan_of_one_tenant_leaves_others_what_they_use() -> None:
    policy = TierPolicy(100)
    documents = [pages("reader", number, 10) for number in range(6)]
    found = []
    for prompt in range(2000):
        policy.use("scanner", pages("scanner", prompt, 10))
        if prompt % 5 == 0:
            document = documents[prompt // 5 % len(documents)]
            found.append(policy.lookup(document))
            policy.use("reader", document)
    # Between two uses of a document 300 pages of the scan pass through a tier of 100.
    assert sum(found[200:]) == 10 * len(found[200:])


def test_what_was_evicted_is_learnt_from() -> None:
    policy = TierPolicy(30, remembered_pages=400)
    documents = [pages("a", number, 2) for number in range(10)]
    hits = 0
    for prompt in range(3000):
        policy.use("a", pages("a", 100 + prompt, 8))
        if prompt % 3 == 0:
            document = documents[prompt // 3 % len(documents)]
            hits += policy.lookup(document)
            policy.use("a", document)
    # LRU finds none: 240 pages come between.
    assert hits > 1500


def test_floors_beyond_the_tier_are_refused() -> None:
    with pytest.raises(ValueError, match="floors are 7 pages together, but the tier holds 6"):
        TierPolicy(6, shares={"a": Share(floor_pages=4), "b": Share(floor_pages=3)})


def test_who_is_not_named_has_the_default_quota() -> None:
    policy = TierPolicy(30, shares={"free": Share()}, default_quota_pages=7)
    policy.use("anybody", pages("anybody", 0, 10))
    assert policy.resident_pages == 7
    policy.use("free", pages("free", 0, 10))
    assert (policy.resident_pages, policy.pages_of("free")) == (17, 10)
    assert policy.keep("anybody", pages("anybody", 1, 8)) is None
    assert policy.keep("anybody", pages("anybody", 1, 7)) is not None
    assert policy.resident_pages == 17
    assert TierPolicy(9, default_quota_pages=0).use("a", pages("a", 0, 3)) == Decision()


def test_what_a_tier_found_counts_for_nobody_until_it_is_used() -> None:
    policy = TierPolicy(30, default_quota_pages=7)
    found = [key for tenant in range(20) for key in pages(str(tenant), 0, 1)]
    assert all(policy.adopt(key, place) for place, key in enumerate(found))
    for tenant in range(20):
        policy.use(str(tenant), pages(str(tenant), 0, 1))
        assert policy.resident_pages == 20
    assert policy.lookup(found) == 20


def test_what_is_kept_outlives_any_scan_and_goes_when_it_is_unpinned() -> None:
    policy = TierPolicy(8)
    book = pages("a", 0, 5)
    assert policy.keep("a", book) == Decision((0, 1, 2, 3, 4))
    for prompt in range(1, 40):
        policy.use("b", pages("b", prompt, 8))
    assert policy.lookup(book) == 5
    policy.unpin(book)
    for prompt in range(40, 80):
        policy.use("b", pages("b", prompt, 8))
    assert policy.lookup(book) == 0


def test_nothing_is_kept_beyond_the_tier_others_floors_or_the_quota() -> None:
    policy = TierPolicy(12, shares=SHARES)
    assert policy.keep("a", pages("a", 0, 9)) is None  # 4 are the floored tenant's
    assert policy.keep("limited", pages("limited", 0, 6)) is None
    assert policy.resident_pages == 0
    assert policy.keep("a", pages("a", 0, 6)) is not None
    assert policy.keep("b", pages("b", 0, 3)) is None
    assert policy.keep("floored", pages("floored", 0, 6)) is not None
    assert policy.keep("b", pages("b", 0, 1)) is None
    assert policy.keep("a", pages("a", 0, 6)) == Decision()  # the same again takes no room
    policy.unpin(pages("a", 0, 6))
    assert policy.keep("b", pages("b", 0, 1)) is None
    policy.unpin(pages("a", 0, 6))
    assert policy.keep("b", pages("b", 0, 1)) is not None
