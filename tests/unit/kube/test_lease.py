"""Leader election: one at a time, by monotonic clocks alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_kube import Clock, FakeKube
from tandem_operator.kube.client import ApiError
from tandem_operator.kube.lease import LeaderLease, LeaseLost
from tandem_operator.resources import LEASES, Ref


class LeaseKube(FakeKube):
    """PUT with optimistic locking, and an API server that can be away."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.away = False

    async def get(self, target: Ref) -> Any:
        if self.away:
            raise OSError("connection refused")
        return await super().get(target)

    async def replace(self, manifest: dict[str, Any]) -> dict[str, Any]:
        target = Ref(LEASES, "system", manifest["metadata"]["name"])
        live = await self.get(target)
        if live["metadata"]["resourceVersion"] != manifest["metadata"]["resourceVersion"]:
            raise ApiError(409, "Conflict", "the object has been modified")
        return self._store(target, manifest, "replace lease")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def kube(clock: Clock) -> LeaseKube:
    return LeaseKube(clock)


def candidate(kube: LeaseKube, clock: Clock, name: str, renew_s: float = 0.001) -> LeaderLease:
    return LeaderLease(kube, "system", "operator", name, 15.0, renew_s, clock)


async def test_the_first_leads_and_the_second_waits(kube: LeaseKube, clock: Clock) -> None:
    first, second = candidate(kube, clock, "a"), candidate(kube, clock, "b")
    assert await first._attempt()
    assert not await second._attempt()
    assert (first.held, second.held) == (True, False)


async def test_a_silent_leader_is_succeeded_after_the_whole_duration(
    kube: LeaseKube, clock: Clock
) -> None:
    first, second = candidate(kube, clock, "a"), candidate(kube, clock, "b")
    await first._attempt()
    await second._attempt()
    clock.sleep(14.9)
    assert not await second._attempt()
    assert not first.held, "it would act while the other may start"
    clock.sleep(0.2)
    assert await second._attempt()
    lease = kube.objects[LEASES, "system", "operator"]["spec"]
    assert (lease["holderIdentity"], lease["leaseTransitions"]) == ("b", 1)


async def test_a_renewal_is_seen_by_its_change_not_by_its_time(
    kube: LeaseKube, clock: Clock
) -> None:
    first, second = candidate(kube, clock, "a"), candidate(kube, clock, "b")
    for _ in range(5):
        assert await first._attempt()
        assert not await second._attempt()
        clock.sleep(14.0)


async def test_a_restarted_container_takes_its_own_lease_over_at_once(
    kube: LeaseKube, clock: Clock
) -> None:
    await candidate(kube, clock, "a")._attempt()
    again = candidate(kube, clock, "a")
    await asyncio.wait_for(again.acquire(), 30)
    assert again.held


async def test_a_leader_that_cannot_renew_ends_before_another_starts(
    kube: LeaseKube, clock: Clock
) -> None:
    lease = candidate(kube, clock, "a")
    await lease.acquire()
    keeping = asyncio.create_task(lease.keep())
    await asyncio.sleep(0.01)
    kube.away = True
    await asyncio.sleep(0.01)
    assert not keeping.done(), "gave up while the lease still held"
    clock.sleep(10.1)
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(keeping, 30)


async def test_a_renewal_that_hangs_does_not_outlast_the_lease(
    kube: LeaseKube, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = candidate(kube, clock, "a", renew_s=0.01)
    await lease.acquire()

    async def hang(target: Ref) -> Any:
        await asyncio.sleep(3600.0)

    monkeypatch.setattr(kube, "get", hang)
    keeping = asyncio.create_task(lease.keep())
    await asyncio.sleep(0.05)
    assert not keeping.done(), "gave up while the lease still held"
    clock.sleep(10.1)
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(keeping, 30)


async def test_a_standby_lives_while_the_api_server_is_away(kube: LeaseKube, clock: Clock) -> None:
    attempts: list[bool] = []
    lease = LeaderLease(kube, "system", "operator", "a", 15.0, 5.0, clock, attempts.append)
    kube.away = True
    await lease._attempt()
    kube.away = False
    await lease._attempt()
    assert attempts == [False, True]


async def test_two_that_write_at_once_do_not_both_lead(kube: LeaseKube, clock: Clock) -> None:
    await candidate(kube, clock, "gone")._attempt()
    rivals = [candidate(kube, clock, name) for name in "ab"]
    for rival in rivals:
        await rival._attempt()
    clock.sleep(20.0)
    won = await asyncio.gather(*(rival._attempt() for rival in rivals))
    assert sorted(won) == [False, True]


async def test_a_released_lease_is_free(kube: LeaseKube, clock: Clock) -> None:
    first, second = candidate(kube, clock, "a"), candidate(kube, clock, "b")
    await first.acquire()
    await first.release()
    assert not first.held
    assert await second._attempt()


async def test_somebody_elses_lease_is_not_released(kube: LeaseKube, clock: Clock) -> None:
    await candidate(kube, clock, "a").acquire()
    await candidate(kube, clock, "b").release()
    assert kube.objects[LEASES, "system", "operator"]["spec"]["holderIdentity"] == "a"
