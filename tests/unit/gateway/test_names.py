"""Names outlive the last pod of their fleet for a little while."""

from __future__ import annotations

from typing import Any

from tandem_runtime.contract import Role
from tandem_runtime.frontend.backend import ModelCard
from tandem_runtime.gateway.names import MEMORY_S, ServedNames
from tandem_runtime.gateway.pods import PodView


def pod(name: str, fleet: str, *names: str, created_unix_s: float = 5.0) -> PodView:
    role = Role.DECODE
    return PodView(name, name, "", fleet, role, "r1", names, created_unix_s, False, False)


def owners(served: ServedNames, pods: list[PodView], now_s: float) -> dict[str, str]:
    return {name: card.fleet for name, card in served.cards(pods, now_s).items()}


def test_a_card_for_each_name() -> None:
    pods = [
        pod("a", "one", "m", "n", created_unix_s=7.9),
        pod("b", "one", "m"),
        pod("c", "two", "o"),
    ]
    assert ServedNames().cards(pods, 0.0) == {
        "m": ModelCard("m", "one", 5),
        "n": ModelCard("n", "one", 5),
        "o": ModelCard("o", "two", 5),
    }


def test_the_fleet_of_a_name_is_the_older_one() -> None:
    pods: list[Any] = [
        pod("a", "new", "m", created_unix_s=20.0),
        pod("b", "old", "m", created_unix_s=10.0),
        pod("c", "other", "x", "y", created_unix_s=1.0),
    ]
    assert owners(ServedNames(), pods, 0.0) == {"m": "old", "x": "other", "y": "other"}


def test_the_last_pod_leaves_its_names_for_five_minutes() -> None:
    served = ServedNames()
    served.cards([pod("a", "one", "m"), pod("b", "two", "o")], 100.0)
    assert owners(served, [pod("b", "two", "o")], 100.0 + MEMORY_S) == {"m": "one", "o": "two"}
    assert owners(served, [pod("b", "two", "o")], 101.0 + MEMORY_S) == {"o": "two"}
    assert len(served._fleets) == 1, "what is forgotten takes no memory"


def test_a_name_that_a_fleet_gave_up_is_forgotten_at_once() -> None:
    served = ServedNames()
    served.cards([pod("a", "one", "m", "n")], 0.0)
    assert owners(served, [pod("a", "one", "n")], 1.0) == {"n": "one"}
    assert owners(served, [], 2.0) == {"n": "one"}


def test_a_fleet_with_pods_wins_over_one_that_is_remembered() -> None:
    served = ServedNames()
    served.cards([pod("a", "one", "m", created_unix_s=1.0)], 0.0)
    assert owners(served, [pod("b", "two", "m", created_unix_s=9.0)], 1.0) == {"m": "two"}
    assert owners(served, [], 2.0) == {"m": "two"}, "and so does the one that was there last"
