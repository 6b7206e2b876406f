"""An operator that has nothing to do writes nothing but its Lease."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from fleets import Fleets, eventually, fleet, model, pool
from tandem.cluster.running import Running

pytestmark = pytest.mark.usefixtures("operator")

IDLE_S = 300
"""Longer than the operator's resync."""
OPERATOR = "system:serviceaccount:tandem-system:tandem-operator"
READS = ("get", "list", "watch")


@pytest.mark.timeout(IDLE_S + 500)
def test_five_idle_minutes(
    cluster: Running, namespace: str, audit_log: Callable[[], list[dict[str, Any]]]
) -> None:
    eventually(lambda: not _going(cluster), timeout_s=200)
    fleets = Fleets(cluster, namespace)
    fleets.apply(model(), fleet())
    # One whose size follows a load that does not change idles, too.
    scaling = {"scaling": {"minReplicas": 1, "maxReplicas": 4}}
    scaled = fleet("scaled", prefill=pool(1), decode=pool(None, STANDIN_WORK="1") | scaling)
    fleets.apply(scaled)
    fleets.wait_condition("ScalingActive", "True", what="inferencefleet/scaled")
    # And one that never serves.
    fleets.apply(fleet("waiting", modelRef={"name": "nope"}))
    fleets.wait_ready()
    fleets.wait_condition("Stalled", "True", what="inferencefleet/waiting")
    time.sleep(5)
    before = len(audit_log())
    time.sleep(IDLE_S)
    requests = [e for e in audit_log()[before:] if e["user"]["username"] == OPERATOR]
    writes = [e for e in requests if e["verb"] not in READS]
    kinds = Counter((e["verb"], e["objectRef"]["resource"]) for e in writes)
    assert set(kinds) == {("update", "leases")}, kinds
    assert kinds["update", "leases"] <= IDLE_S / 5 + 2
    # It was not asleep: the resync read everything again.
    assert any(e["verb"] == "list" and e["objectRef"]["resource"] == "pods" for e in requests)


def _going(cluster: Running) -> list[str]:
    """Namespaces of other tests that are being deleted: work for the operator."""
    items = json.loads(cluster.kubectl("get", "namespaces", "-o", "json"))["items"]
    return [n["metadata"]["name"] for n in items if "deletionTimestamp" in n["metadata"]]
