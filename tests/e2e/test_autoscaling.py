"""An autoscaled fleet of the real runtime: to zero when idle, and woken by a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
from fleets import eventually
from served import START_S

POLICY = {
    "apiVersion": "tandem.dev/v1alpha1",
    "kind": "ScalingPolicy",
    "metadata": {"name": "sleepy"},
    "spec": {"windows": {"idleSeconds": 30}},
}


def test_an_idle_fleet_sleeps_and_a_request_wakes_it(serve: Callable[..., Any]) -> None:
    chat = serve(prefill=None, decode=1)
    fleets = chat.fleets
    fleets.apply(POLICY)
    scaling = {"minReplicas": 0, "maxReplicas": 1, "policyRef": {"name": "sleepy"}}
    fleets.edit("inferencefleet/chat", {"spec": {"decode": {"replicas": None, "scaling": scaling}}})
    fleets.wait_condition("ScalingActive", "True", "Scaling")
    with openai.OpenAI(base_url=f"{chat.url}/v1", api_key="none", timeout=START_S) as client:

        def ask() -> str:
            answer = client.completions.create(
                model=chat.model, prompt="The sea is", max_tokens=8, temperature=0
            )
            return answer.choices[0].text

        awake = ask()
        assert eventually(lambda: not fleets.pods("chat-decode", terminating=True), timeout_s=120)
        fleets.wait_condition("Ready", "True", "ScaledToZero")
        # Held at the gateway while a pod starts and loads its weights.
        assert ask() == awake
    decisions = fleets.get("pool/chat-decode")["status"]["scaling"]["decisions"]
    assert [d["reason"] for d in decisions][-2:] == ["Idle", "Wake"]
