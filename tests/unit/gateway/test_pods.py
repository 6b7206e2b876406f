from __future__ import annotations

from typing import Any

import pytest
from tandem_runtime import contract
from tandem_runtime.contract import Role
from tandem_runtime.gateway.pods import PodView, pod_view

POD: dict[str, Any] = {
    "metadata": {
        "uid": "u-1",
        "name": "chat-decode-r1-0",
        "creationTimestamp": "2026-11-23T20:00:00Z",
        "labels": {
            contract.LABEL_FLEET: "chat",
            contract.LABEL_ROLE: "decode",
            contract.LABEL_REVISION: "r1",
        },
        "annotations": {contract.ANNOTATION_SERVED_NAMES: "a, org/b ,"},
    },
    "status": {
        "phase": "Running",
        "podIP": "10.0.0.7",
        "conditions": [
            {"type": "Initialized", "status": "True"},
            {"type": "Ready", "status": "True"},
        ],
    },
}


def changed(**changes: Any) -> dict[str, Any]:
    return {
        "metadata": {**POD["metadata"], **changes.get("metadata", {})},
        "status": {**POD["status"], **changes.get("status", {})},
    }


def test_a_ready_pod() -> None:
    assert pod_view(POD) == PodView(
        uid="u-1",
        name="chat-decode-r1-0",
        ip="10.0.0.7",
        fleet="chat",
        role=Role.DECODE,
        revision="r1",
        served_names=("a", "org/b"),
        created_unix_s=1795464000.0,
        ready=True,
        leaving=False,
    )


@pytest.mark.parametrize(
    "change",
    [
        {"status": {"phase": "Failed"}},
        {"status": {"phase": "Succeeded"}},
        {"metadata": {"labels": {contract.LABEL_FLEET: "chat"}}},
        {"metadata": {"labels": {contract.LABEL_FLEET: "chat", contract.LABEL_ROLE: "novel"}}},
        {"metadata": {"labels": None}},
    ],
)
def test_what_is_no_runtime_pod(change: dict[str, Any]) -> None:
    assert pod_view(changed(**change)) is None


@pytest.mark.parametrize(
    ("change", "ready", "leaving"),
    [
        ({"status": {"conditions": [{"type": "Ready", "status": "False"}]}}, False, False),
        ({"status": {"conditions": None}}, False, False),
        ({"metadata": {"deletionTimestamp": "2026-11-23T20:00:01Z"}}, True, True),
        ({"metadata": {"annotations": {contract.ANNOTATION_DRAINING: "scale-in"}}}, True, True),
    ],
)
def test_pods_that_do_not_admit(change: dict[str, Any], ready: bool, leaving: bool) -> None:
    view = pod_view(changed(**change))
    assert view is not None
    assert (view.ready, view.leaving, view.admits) == (ready, leaving, False)


@pytest.mark.parametrize("ip", [None, ""])
def test_a_pod_without_an_address_tells_its_names(ip: str | None) -> None:
    view = pod_view(changed(status={"podIP": ip, "phase": "Pending"}))
    assert view is not None
    assert view.served_names == ("a", "org/b")
    assert (view.ip, view.ready, view.admits) == ("", False, False)


def test_an_empty_object() -> None:
    assert pod_view({}) is None


@pytest.mark.parametrize(
    ("text", "percent"), [(None, 0), ("30", 30), ("9999", 400), ("-5", 0), ("x", 0), ("", 0)]
)
def test_how_much_slower_it_seems(text: str | None, percent: int) -> None:
    note = {} if text is None else {"tandem.dev/slower-percent": text}
    body = changed()
    body["metadata"]["annotations"] = {**body["metadata"]["annotations"], **note}
    view = pod_view(body)
    assert view is not None
    assert view.slower_percent == percent
