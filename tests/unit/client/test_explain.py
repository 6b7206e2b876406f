"""`tandem explain`: sizes, who decides them, and the last decisions, from objects alone."""

from __future__ import annotations

from typing import Any

import pytest
from tandem import explain
from tandem.cli import app
from tandem.explain import explained
from typer.testing import CliRunner

DECISION = {
    "time": "2026-01-01T00:00:00Z",
    "replicasBefore": 1,
    "replicas": 5,
    "reason": "LoadOverBand",
    "demand": 272,
    "capacity": 68,
    "needPercent": 400,
    "growthPercent": 115,
    "latencyMilliseconds": 31,
    "targetMilliseconds": 25,
    "startupSeconds": 90,
    "ready": 1,
    "starting": 0,
}
SCALING = {"minReplicas": 1, "maxReplicas": 8, "policyRef": {"name": "p"}}


def fleet(**decode: Any) -> dict[str, Any]:
    condition = {
        "type": "ScalingActive",
        "status": "True",
        "reason": "Scaling",
        "message": "chat-decode follow their load",
    }
    spec = {"prefill": {"replicas": 1}, "decode": decode}
    return {"spec": spec, "status": {"conditions": [condition]}}


def pool(role: str = "decode", **scaling: Any) -> dict[str, Any]:
    status = {"readyReplicas": 1} | ({"scaling": scaling} if scaling else {})
    meta = {"name": f"chat-{role}"}
    return {"metadata": meta, "spec": {"role": role, "replicas": 5}, "status": status}


@pytest.mark.parametrize(
    ("decode", "head"),
    [
        ({"replicas": 5}, "5 replicas, 1 ready; fixed by spec.decode.replicas"),
        ({}, "5 replicas, 1 ready; set by whoever writes the Pool's size"),
        (
            {"scaling": SCALING},
            "5 replicas, 1 ready; autoscaled between 1 and 8 by ScalingPolicy p",
        ),
        (
            {"scaling": {"maxReplicas": 8}},
            "5 replicas, 1 ready; autoscaled between 1 and 8 by the defaults of a ScalingPolicy",
        ),
    ],
)
def test_who_decides(decode: dict[str, Any], head: str) -> None:
    (one,) = explained(fleet(**decode), [pool()])
    assert (one.pool, one.head, one.decisions) == ("chat-decode", head, ())


def test_a_schedule_is_named_with_its_bounds() -> None:
    schedule = {"name": "workdays", "minReplicas": 4, "maxReplicas": 8}
    last = DECISION | {"reason": "Schedule", "limitedBy": "minReplicas", "schedule": "workdays"}
    (one,) = explained(fleet(scaling=SCALING), [pool(decisions=[last], schedule=schedule)])
    assert one.head.endswith(
        "between 1 and 8 by ScalingPolicy p, and between 4 and 8 by its schedule workdays"
    )
    assert one.decisions[0].endswith("; limited by minReplicas; in schedule workdays")


def test_decisions_come_newest_first_with_their_inputs() -> None:
    later = DECISION | {"time": "2026-01-01T00:10:00Z", "shadow": True, "limitedBy": "step"}
    unlearned = DECISION | {"capacity": 0}
    del unlearned["latencyMilliseconds"]
    (one,) = explained(
        fleet(scaling=SCALING), [pool(decisions=[unlearned, DECISION, later], state="{}")]
    )
    assert one.decisions[0].startswith("2026-01-01T00:10:00Z  1 -> 5 (not carried out)  LoadOver")
    assert one.decisions[0].endswith("; limited by step")
    assert one.decisions[1] == (
        "2026-01-01T00:00:00Z  1 -> 5  LoadOverBand: 272 streams, 4 times the 68 of a replica; "
        "growth 1.15 in the 90 s of a start; 1 ready and 0 starting; 31 ms of 25 ms"
    )
    assert "LoadOverBand: what a replica can do is not learned yet" in one.decisions[2]
    assert "ms of" not in one.decisions[2]


def test_a_policy_that_stands_back_is_said() -> None:
    (one,) = explained(fleet(scaling=SCALING), [pool(standsBackUntil="2026-01-01T00:10:00Z")])
    assert "stands back until 2026-01-01T00:10:00Z" in one.head


def test_the_command_prints_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_json(namespace: str | None, *arguments: str) -> Any:
        assert namespace == "team"
        if arguments[0] == "inferencefleet/chat":
            return fleet(scaling=SCALING)
        assert arguments == ("pools", "--selector", "tandem.dev/fleet=chat")
        return {"items": [pool(decisions=[DECISION]), pool("prefill")]}

    monkeypatch.setattr(explain, "get_json", get_json)
    result = CliRunner().invoke(app, ["explain", "fleet/chat", "-n", "team"])
    assert result.exit_code == 0, result.output
    assert "ScalingActive is True, Scaling: chat-decode follow their load" in result.output
    assert "chat-prefill: 5 replicas, 1 ready; fixed by spec.prefill.replicas" in result.output
    assert "LoadOverBand" in result.output
