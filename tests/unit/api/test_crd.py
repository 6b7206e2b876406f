"""crds/ is what the models say, and says what the design asks for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tandem_operator.api import crd


def _nodes(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    for child in (schema.get("properties") or {}).values():
        yield from _nodes(child)
    if "items" in schema:
        yield from _nodes(schema["items"])


def _schema(kind: crd.Kind) -> dict[str, Any]:
    version: dict[str, Any] = crd.definition(kind)["spec"]["versions"][0]
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return schema


def test_committed_files_are_what_the_models_say() -> None:
    assert crd.drift(crd.CRDS_DIR) == []


def test_check_reports_a_changed_a_missing_and_a_foreign_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert crd.main(["--write", str(tmp_path)]) == 0
    assert crd.main(["--check", str(tmp_path)]) == 0
    (tmp_path / "tandem.dev_models.yaml").write_text("changed")
    (tmp_path / "tandem.dev_pools.yaml").unlink()
    (tmp_path / "old.yaml").write_text("left over")
    assert crd.main(["--check", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "old.yaml, tandem.dev_models.yaml, tandem.dev_pools.yaml" in said
    assert crd.main(["--write", str(tmp_path)]) == 0
    assert crd.drift(tmp_path) == []
    assert not (tmp_path / "old.yaml").exists()


@pytest.mark.parametrize("kind", crd.KINDS, ids=lambda k: k.kind)
def test_no_defaults_inside_list_items(kind: crd.Kind) -> None:
    for node in _nodes(_schema(kind)["properties"]["spec"]):
        if "items" in node:
            assert not [n for n in _nodes(node["items"]) if "default" in n]


@pytest.mark.parametrize("kind", crd.KINDS, ids=lambda k: k.kind)
def test_what_a_rule_touches_is_bounded(kind: crd.Kind) -> None:
    for node in _nodes(_schema(kind)):
        if "x-kubernetes-validations" not in node:
            continue
        if node["type"] == "array":
            assert "maxItems" in node
        if node["type"] == "string":
            assert "maxLength" in node


def test_status_does_not_preserve_unknown_fields() -> None:
    for kind in crd.KINDS:
        for node in _nodes(_schema(kind)["properties"]["status"]):
            assert "x-kubernetes-preserve-unknown-fields" not in node


def test_pool_scales() -> None:
    version = crd.definition(crd.POOL)["spec"]["versions"][0]
    assert version["subresources"]["scale"] == {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    }
    assert _schema(crd.POOL)["properties"]["spec"]["properties"]["replicas"]["default"] == 1


def test_names_clash_with_nobody() -> None:
    for kind in crd.KINDS:
        names = crd.definition(kind)["spec"]["names"]
        assert "shortNames" not in names
        assert names["categories"] == ["tandem"]


def test_fleet_columns() -> None:
    columns = yaml.safe_load(crd.render(crd.INFERENCE_FLEET))["spec"]["versions"][0][
        "additionalPrinterColumns"
    ]
    shown = [column["name"] for column in columns if not column.get("priority")]
    assert shown == ["MODEL", "READY", "PREFILL", "DECODE", "TTFT", "TPOT", "AGE"]
