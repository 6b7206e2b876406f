"""The optional PodMonitors find the pods that there are, and compose with the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from builders import fleet_body, model_body
from operator_world import World
from tandem.cluster.binaries import candidates
from tandem_operator.resources import DEPLOYMENTS

MANIFESTS = Path(__file__).parents[3] / "manifests"


def built(tmp_path: Path, *, component: bool) -> list[dict[str, Any]]:
    """What `kubectl kustomize` makes of an overlay with the component or without."""
    overlay = tmp_path / "overlay"
    overlay.mkdir(exist_ok=True)
    base = os.path.relpath(MANIFESTS / "base", overlay)
    more = os.path.relpath(MANIFESTS / "components" / "podmonitor", overlay)
    components = f"components: [{more}]\n" if component else ""
    (overlay / "kustomization.yaml").write_text(f"resources: [{base}]\n{components}")
    kubectl = next(candidates("kubectl", os.environ, Path(sys.executable).parent))
    answer = subprocess.run(
        [kubectl, "kustomize", "--load-restrictor=LoadRestrictionsNone", str(overlay)],
        capture_output=True,
        text=True,
        check=True,
    )
    return list(yaml.safe_load_all(answer.stdout))


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(
        labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", ())
    )


def scraped(selector: dict[str, Any], port: str, labels: dict[str, str], spec: Any) -> bool:
    names = {p["name"] for c in spec["containers"] for p in c.get("ports", ())}
    return matches(selector, labels) and port in names


async def test_the_component_finds_every_pod_that_has_metrics(tmp_path: Path) -> None:
    objects = built(tmp_path, component=True)
    monitors = {o["metadata"]["name"]: o["spec"] for o in objects if o["kind"] == "PodMonitor"}
    assert not [o for o in built(tmp_path, component=False) if o["kind"] == "PodMonitor"]
    world = World()
    world.kube.user_write(model_body())
    world.kube.user_write(fleet_body())
    await world.settle()
    templates = [(p["metadata"]["labels"], p["spec"]) for p in world.kube.pods("team")]
    gateway = world.body(DEPLOYMENTS, "tandem-gateway")["spec"]["template"]
    templates.append((gateway["metadata"]["labels"], gateway["spec"]))
    fleets = monitors["tandem-fleets"]
    (endpoint,) = fleets["podMetricsEndpoints"]
    assert fleets["namespaceSelector"] == {"any": True}
    assert len(templates) == 4
    for labels, spec in templates:
        assert scraped(fleets["selector"], endpoint["port"], labels, spec), labels
    operator = next(o for o in objects if o["kind"] == "Deployment")["spec"]["template"]
    (endpoint,) = monitors["tandem-operator"]["podMetricsEndpoints"]
    labels, spec = operator["metadata"]["labels"], operator["spec"]
    assert scraped(monitors["tandem-operator"]["selector"], endpoint["port"], labels, spec)
