from __future__ import annotations

import socket

import pytest
from tandem.cluster import slot
from tandem.cluster.slot import NoSlotError, claim_slot
from tandem.cluster.spec import Network


@pytest.fixture(autouse=True)
def upper_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters that run beside this test are in the lower ones."""
    monkeypatch.setattr(slot, "SLOTS", range(24, 28))


def test_two_claims_differ_and_a_freed_one_is_taken_again() -> None:
    first, second = claim_slot(), claim_slot()
    assert first.network.slot != second.network.slot
    first.handle.close()
    third = claim_slot()
    assert third.network.slot == first.network.slot
    for claim in (second, third):
        claim.handle.close()


def test_an_address_that_somebody_listens_on_is_passed_over() -> None:
    free = claim_slot()
    free.handle.close()
    with socket.socket() as somebody:
        somebody.bind((Network(free.network.slot).host, 6443))
        somebody.listen()
        other = claim_slot()
        assert other.network.slot != free.network.slot
        other.handle.close()


def test_no_slot_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "SLOTS", range(26, 28))
    claims = [claim_slot(), claim_slot()]
    with pytest.raises(NoSlotError, match="tandem down --name NAME"):
        claim_slot()
    for claim in claims:
        claim.handle.close()
