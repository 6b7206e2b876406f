from __future__ import annotations

import json
from pathlib import Path

from tandem.cluster import flags
from tandem.cluster.paths import ClusterDir
from tandem.cluster.spec import Cluster, ClusterSpec, Network, NodeTimings

CLUSTER = Cluster(ClusterSpec(timings=NodeTimings(grace_s=4, toleration_s=5)), Network(2))
FOLDER = ClusterDir(Path("/c"))


def as_dict(argv: list[str]) -> dict[str, str]:
    """Flags by name; every one has the form --name=value."""
    return dict(flag.removeprefix("--").split("=", 1) for flag in argv[1:])


def test_etcd() -> None:
    found = as_dict(flags.etcd("etcd", FOLDER, CLUSTER))
    assert found["listen-client-urls"] == "http://127.66.0.1:2379"
    assert found["data-dir"] == "/c/etcd"
    assert found["unsafe-no-fsync"] == "true"


def test_the_api_server_authorises() -> None:
    paths = [Path(f"/{n}") for n in range(9)]
    found = as_dict(flags.api_server("x", FOLDER, CLUSTER, flags.ApiServerFiles(*paths)))
    assert found["authorization-mode"] == "Node,RBAC"
    assert found["enable-admission-plugins"] == "NodeRestriction"
    assert "disable-admission-plugins" not in found
    assert "token-auth-file" not in found
    assert found["kubelet-preferred-address-types"] == "InternalIP"
    assert found["default-unreachable-toleration-seconds"] == "5"
    assert found["service-node-port-range"] == "30100-30199"
    assert found["advertise-address"] == found["bind-address"] == "127.66.0.1"


def test_anonymous_requests_get_health_only() -> None:
    anonymous = json.loads(flags.authentication_configuration())["anonymous"]
    paths = [condition["path"] for condition in anonymous["conditions"]]
    assert paths == ["/livez", "/readyz", "/healthz"]


def test_the_audit_log_holds_no_bodies() -> None:
    policy = json.loads(flags.audit_policy())
    assert [rule["level"] for rule in policy["rules"]] == ["Metadata"]


def test_the_controller_manager() -> None:
    argv = flags.controller_manager("x", CLUSTER, Path("/k"), Path("/ca"), Path("/sa"))
    found = as_dict(argv)
    assert found["controllers"].split(",")[0] == "*"
    assert "-endpointslice-controller" in found["controllers"]
    routed = Cluster(ClusterSpec(loopback=False), Network(2, loopback=False))
    argv = flags.controller_manager("x", routed, Path("/k"), Path("/ca"), Path("/sa"))
    assert as_dict(argv)["controllers"] == "*,-service-lb-controller,-node-route-controller"
    assert as_dict(argv)["bind-address"] == "10.66.0.1"
    assert found["node-monitor-grace-period"] == "4000ms"
    assert found["node-monitor-period"] == "500ms"
    assert found["use-service-account-credentials"] == "true"


def test_the_scheduler() -> None:
    assert as_dict(flags.scheduler("x", CLUSTER, Path("/k")))["leader-elect"] == "false"
