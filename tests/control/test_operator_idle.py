"""An operator that has nothing to do writes nothing but its Lease."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from fleets import Fleets, eventually, fleet, held, model, pool
from tandem.cluster.running import Running

pytestmark = pytest.mark.usefixtures("operator")

IDLE_S = 300
"""As long as the operator's resync period."""
OPERATOR = "system:serviceaccount:tandem-system:tandem-operator"
READS = ("get", "list", "watch")


@pytest.mark.timeout(IDLE_S + 500)
def test_five_idle_minutes(
    cluster: Running, namespace: str, audit_log: Callable[[], list[dict[str, Any]]]
) -> None:
    eventually(lambda: not _going(cluster), timeout_s=200)  # no other test's work is left
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
    before, begun_unix_s = len(audit_log()), time.time()
    time.sleep(IDLE_S)
    requests = [e for e in audit_log()[before:] if e["user"]["username"] == OPERATOR]
    writes = [e for e in requests if e["verb"] not in READS]
    kinds = Counter((e["verb"], e["objectRef"]["resource"]) for e in writes)
    assert set(kinds) == {("update", "leases")}, kinds
    assert kinds["update", "leases"] <= IDLE_S / 5 + 2
    # It was not asleep: everything was queued again. What was verified shortly before is not read.
    assert _last_resync_unix_s(cluster) > begun_unix_s - 10


def _last_resync_unix_s(cluster: Running) -> float:
    """As the operator that leads tells it."""
    pods = json.loads(cluster.kubectl("get", "pods", "-n", "tandem-system", "-o", "json"))["items"]
    told = []
    for pod in pods:
        url = f"http://{pod['status']['podIP']}:8080/metrics"
        with urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read().decode()
        found = re.search(r"^tandem_operator_last_resync_timestamp_seconds (\S+)$", text, re.M)
        told += [float(found[1])] if found else []
    return max(told)


def _going(cluster: Running) -> list[str]:
    """Of namespaces that are being deleted, what the operator may still have work with."""
    items = json.loads(cluster.kubectl("get", "namespaces", "-o", "json"))["items"]
    ending = [n["metadata"]["name"] for n in items if "deletionTimestamp" in n["metadata"]]
    return [what for name in ending for what in held(cluster, name)]
