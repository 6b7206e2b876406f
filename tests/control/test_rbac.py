"""The shipped roles: no wildcard, enough for everything, and no more than is used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fleets import Fleets, context, documents, eventually, fleet, model, pool
from tandem.cluster.binaries import candidates
from tandem.cluster.running import Running

MANIFESTS = Path(__file__).parents[2] / "manifests"
OPERATOR = "system:serviceaccount:tandem-system:tandem-operator"
Verb = tuple[str, str, str]

UNUSED = {
    ("", "events", "patch"): "a repetition after ten minutes",
    ("events.k8s.io", "events", "patch"): "a repetition after ten minutes",
    ("apps", "controllerrevisions", "delete"): "the eleventh revision",
    (
        "tandem.dev",
        "models/finalizers",
        "update",
    ): "for OwnerReferencesPermissionEnforcement",
    ("tandem.dev", "inferencefleets/finalizers", "update"): "likewise",
    ("tandem.dev", "pools/finalizers", "update"): "likewise",
    ("rbac.authorization.k8s.io", "clusterroles", "bind"): "checked when the RoleBinding is made",
    ("", "pods/eviction", "create"): "from a failing node: test_node_health.py",
    ("tandem.dev", "nodehealthpolicies/status", "patch"): "where there is a policy: likewise",
    ("coordination.k8s.io", "leases", "create"): "once in a cluster's life",
}


def rendered(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send."""
    kubectl = next(candidates("kubectl", {}, Path(sys.executable).parent))
    text = subprocess.run(
        [kubectl, "kustomize", str(folder)], check=True, capture_output=True, text=True
    ).stdout
    return [body for body in yaml.safe_load_all(text) if body]


def rules(name: str) -> Iterator[dict[str, Any]]:
    for body in rendered(MANIFESTS / "base"):
        if body["kind"] in ("ClusterRole", "Role") and body["metadata"]["name"] == name:
            yield from body["rules"]


def granted(name: str) -> set[Verb]:
    return {
        (group, resource, verb)
        for rule in rules(name)
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


@pytest.mark.parametrize(
    "role", ["tandem-operator", "tandem-gateway", "tandem-view", "tandem-edit"]
)
def test_no_wildcard(role: str) -> None:
    found = granted(role)
    assert found
    assert not [entry for entry in found if "*" in entry]


def test_secrets_are_made_and_never_read() -> None:
    verbs = {verb for _, resource, verb in granted("tandem-operator") if resource == "secrets"}
    assert verbs == {"create"}


def test_binding_is_limited_to_the_gateways_role() -> None:
    (rule,) = [rule for rule in rules("tandem-operator") if "bind" in rule["verbs"]]
    assert rule["resourceNames"] == ["tandem-gateway"]


def test_the_gateway_reads_pods_alone() -> None:
    assert granted("tandem-gateway") == {("", "pods", verb) for verb in ("get", "list", "watch")}


def test_writing_to_nodes_is_a_role_of_its_own() -> None:
    verbs = {verb for _, resource, verb in granted("tandem-operator") if resource == "nodes"}
    assert verbs == {"get", "list", "watch"}
    local = rendered(MANIFESTS / "overlays" / "local")
    (role,) = [body for body in local if body["metadata"]["name"] == "tandem-node-repair"
               and body["kind"] == "ClusterRole"]  # fmt: skip
    assert role["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["patch"]}]


def test_nobody_elses_kinds_are_needed() -> None:
    groups = {body["apiVersion"].partition("/")[0] for body in rendered(MANIFESTS)}
    assert groups == {"v1", "apps", "rbac.authorization.k8s.io", "apiextensions.k8s.io"}


@pytest.mark.usefixtures("operator")
def test_everything_is_allowed_and_everything_allowed_is_used(
    cluster: Running, namespace: str, audit_log: Callable[[], list[dict[str, Any]]]
) -> None:
    """A fleet's whole life; then the audit log of the operator and of the gateway."""
    fleets = Fleets(cluster, namespace)
    fleets.apply(model(), documents(), fleet(), context())
    fleets.wait_ready()
    fleets.wait_condition("Ready", "True", what="cachedcontext/handbook")
    fleets.roll("2")
    fleets.wait_ready()
    fleets.roll("1")
    fleets.wait_ready()
    fleets.kubectl("patch", "inferencefleet", "chat", "--type=json",
                   '--patch=[{"op": "remove", "path": "/spec/prefill"}]')  # fmt: skip
    eventually(lambda: not fleets.find("pool/chat-prefill"))
    fleets.edit("inferencefleet/chat", {"spec": {"prefill": pool(2)}})
    fleets.wait_ready()
    fleets.kubectl("delete", "inferencefleet", "chat")
    eventually(lambda: not fleets.pods(terminating=True))

    gateway = f"system:serviceaccount:{namespace}:tandem-gateway"
    requests = [e for e in audit_log() if e["user"]["username"] in (OPERATOR, gateway)]
    assert {e["user"]["username"] for e in requests} == {OPERATOR, gateway}
    assert not [e["requestURI"] for e in requests if _forbidden(e)]
    own = [e for e in requests if e["user"]["username"] == OPERATOR and "objectRef" in e]
    used = {verb for event in own for verb in _used(event)}
    unused = granted("tandem-operator") - used - set(UNUSED)
    assert not {entry for entry in unused if entry[2] not in ("get", "list", "watch")}


def _forbidden(event: dict[str, Any]) -> bool:
    """Refused for want of a permission. (Another test's namespace may be going meanwhile.)"""
    answer = event["responseStatus"]
    causes = (answer.get("details") or {}).get("causes", ())
    going = any(cause["reason"] == "NamespaceTerminating" for cause in causes)
    return answer.get("code") == 403 and not going


def _used(event: dict[str, Any]) -> set[Verb]:
    """The permissions that a request needed."""
    reference = event["objectRef"]
    resource = reference["resource"]
    if reference.get("subresource"):
        resource += "/" + reference["subresource"]
    verbs = {event["verb"]}
    if event["verb"] == "patch" and event["responseStatus"].get("code") == 201:
        # Server-side apply of what does not exist is authorised as a create as well.
        verbs.add("create")
    return {(reference.get("apiGroup", ""), resource, verb) for verb in verbs}
