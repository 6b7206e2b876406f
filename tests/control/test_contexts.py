"""CachedContexts on a real control plane: operator and gateway are real, the pods stand-ins."""

from __future__ import annotations

import pytest
from fleets import Fleets, context, documents, eventually, fleet, model, pool
from tandem.cluster.running import Running

pytestmark = pytest.mark.usefixtures("operator")
WHAT = "cachedcontext/handbook"


@pytest.fixture
def fleets(cluster: Running, namespace: str) -> Fleets:
    return Fleets(cluster, namespace)


def texts(fleets: Fleets) -> list[str]:
    """What the prefill pods keep of it now."""
    kept = [c for pod in fleets.ready("chat-prefill") for c in fleets.contexts(pod)]
    return [c["messages"][0]["content"] for c in kept if not c.get("deleted")]


def test_a_context_is_kept_replaced_and_ended_with_its_object(fleets: Fleets) -> None:
    fleets.apply(model(), fleet(prefill=pool(2)), context(copies=2, tier="Memory"))
    said = fleets.wait_condition("Ready", "False", "ContentNotFound", what=WHAT)
    assert said.sentence == "there is no ConfigMap 'docs' in this namespace"
    fleets.apply(documents())
    fleets.wait_condition("Ready", "True", "Kept", what=WHAT)
    status = fleets.get(WHAT)["status"]
    assert (status["copies"], status["tier"], status["tokens"]) == ("2/2", "Memory", 14)
    assert status["bytes"] == 280
    assert set(status["pods"]) == fleets.names("chat-prefill")
    assert texts(fleets) == ["the whole book"] * 2
    columns = fleets.kubectl("get", WHAT).splitlines()
    titles = ["NAME", "FLEET", "READY", "COPIES", "TIER", "TOKENS", "HITS", "AGE"]
    assert columns[0].split() == titles
    assert columns[1].split()[:6] == ["handbook", "chat", "True", "2/2", "Memory", "14"]
    # A pod that is lost is replaced, and the one that replaces it has the context again.
    fleets.kubectl("delete", "pod", fleets.ready("chat-prefill")[0], "--wait=true")
    eventually(lambda: texts(fleets) == ["the whole book"] * 2, timeout_s=60)
    fleets.edit(WHAT, {"spec": {"configMap": None, "text": "another book"}})
    eventually(lambda: texts(fleets) == ["another book"] * 2, timeout_s=60)
    fleets.wait_condition("Ready", "True", "Kept", what=WHAT)
    assert fleets.get(WHAT)["metadata"].get("finalizers") is None
    fleets.kubectl("delete", WHAT)
    eventually(lambda: texts(fleets) == [], timeout_s=60)
