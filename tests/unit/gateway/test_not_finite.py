"""A model whose output is not a number would give the same on every pod: one attempt, one error."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from hash_pods import MakePod
from tandem_runtime.contract import Role

BODY: dict[str, Any] = {"model": "hash", "prompt": "four", "max_tokens": 3}


@pytest.mark.parametrize("position", [4, 5], ids=["on the prefill pod", "on the decode pod"])
async def test_it_is_not_carried_to_other_pods(
    front: Any, make_pod: MakePod, position: int
) -> None:
    prefill = await make_pod(role=Role.PREFILL, pod="prefill-0")
    decodes = [await make_pod(role=Role.DECODE, pod=f"decode-{n}") for n in range(2)]
    for served in (prefill, *decodes):
        served.runner.not_finite = lambda sample: sample.position == position
    front.discovery.show(*(served.view() for served in (prefill, *decodes)))
    with pytest.raises(openai.InternalServerError, match="for this stream is not a number") as told:
        await front.client.completions.create(**BODY, timeout=30)
    assert told.value.status_code == 500
    assert "attempt_failures_total{" not in (await front.http.get("/metrics")).text
    for served in (prefill, *decodes):
        await served.empty()
