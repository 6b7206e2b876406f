"""The command lines of a cluster's processes: pure functions of what the cluster is.

Each flag that differs from a production cluster's has its reason beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tandem.cluster.paths import ClusterDir
from tandem.cluster.spec import Cluster

HEALTH_PATHS: Final = "/healthz,/readyz,/livez,/metrics"

ENDPOINT_CONTROLLERS: Final = (
    "endpoints-controller",
    "endpointslice-controller",
    "endpointslice-mirroring-controller",
)
CLOUD_CONTROLLERS: Final = ("service-lb-controller", "node-route-controller")


@dataclass(frozen=True, slots=True)
class ApiServerFiles:
    """What the API server's flags name."""

    ca: Path
    certificate: Path
    key: Path
    agent_client_certificate: Path
    agent_client_key: Path
    service_account_key: Path
    service_account_public_key: Path
    authentication: Path
    audit_policy: Path


def authentication_configuration() -> str:
    """Anonymous requests may ask for health and nothing else."""
    paths = ("/livez", "/readyz", "/healthz")
    return json.dumps(
        {
            "apiVersion": "apiserver.config.k8s.io/v1",
            "kind": "AuthenticationConfiguration",
            "anonymous": {"enabled": True, "conditions": [{"path": path} for path in paths]},
        }
    )


def audit_policy() -> str:
    """Every finished request with its user, verb and object; no bodies."""
    return json.dumps(
        {
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived", "ResponseStarted"],
            "rules": [{"level": "Metadata"}],
        }
    )


def etcd(binary: str, folder: ClusterDir, cluster: Cluster) -> list[str]:
    """etcd, alone and without fsync: the cluster's data may go when the machine does."""
    network = cluster.network
    client = f"http://{network.host}:{network.etcd_port}"
    peer = f"http://{network.host}:{network.etcd_peer_port}"
    return [
        binary,
        "--name=local",
        f"--data-dir={folder.etcd}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=local={peer}",
        "--unsafe-no-fsync=true",
        "--auto-compaction-mode=periodic",
        "--auto-compaction-retention=1h",
        "--log-level=warn",
    ]


def api_server(
    binary: str, folder: ClusterDir, cluster: Cluster, files: ApiServerFiles
) -> list[str]:
    """kube-apiserver with Node and RBAC authorisation and NodeRestriction."""
    network, timings = cluster.network, cluster.spec.timings
    first_port, last_port = network.node_ports
    return [
        binary,
        f"--etcd-servers=http://{network.host}:{network.etcd_port}",
        f"--bind-address={network.host}",
        f"--secure-port={network.api_port}",
        # Without a default route there is no address to guess.
        f"--advertise-address={network.host}",
        # A loopback address cannot be an endpoint of the Service `kubernetes`.
        "--endpoint-reconciler-type=none",
        "--service-cluster-ip-range=10.0.0.0/16",
        f"--service-node-port-range={first_port}-{last_port}",
        f"--client-ca-file={files.ca}",
        f"--tls-cert-file={files.certificate}",
        f"--tls-private-key-file={files.key}",
        "--authorization-mode=Node,RBAC",
        f"--authentication-config={files.authentication}",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={files.service_account_public_key}",
        f"--service-account-signing-key-file={files.service_account_key}",
        # Node names resolve nowhere; agents listen on their node's address.
        "--kubelet-preferred-address-types=InternalIP",
        f"--kubelet-certificate-authority={files.ca}",
        f"--kubelet-client-certificate={files.agent_client_certificate}",
        f"--kubelet-client-key={files.agent_client_key}",
        f"--default-not-ready-toleration-seconds={timings.toleration_s}",
        f"--default-unreachable-toleration-seconds={timings.toleration_s}",
        f"--audit-policy-file={files.audit_policy}",
        f"--audit-log-path={folder.audit_log}",
        "--audit-log-maxsize=100",
        "--audit-log-maxbackup=3",
        "--profiling=false",
    ]


def controller_manager(
    binary: str, cluster: Cluster, kubeconfig: Path, ca: Path, service_account_key: Path
) -> list[str]:
    """kube-controller-manager, each controller with its own ServiceAccount."""
    network, timings = cluster.network, cluster.spec.timings
    return [
        binary,
        f"--kubeconfig={kubeconfig}",
        f"--bind-address={network.host}",
        f"--secure-port={network.controller_manager_port}",
        f"--authorization-always-allow-paths={HEALTH_PATHS}",
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        "--leader-elect=false",
        f"--controllers={','.join(_controllers(cluster))}",
        "--use-service-account-credentials=true",
        f"--service-account-private-key-file={service_account_key}",
        f"--root-ca-file={ca}",
        f"--node-monitor-period={_seconds(timings.monitor_period_s)}",
        f"--node-monitor-grace-period={_seconds(timings.grace_s)}",
        f"--node-startup-grace-period={_seconds(timings.startup_grace_s)}",
        f"--node-eviction-rate={timings.evictions_per_s:g}",
        "--kube-api-qps=100",
        "--kube-api-burst=200",
        "--profiling=false",
    ]


def scheduler(binary: str, cluster: Cluster, kubeconfig: Path) -> list[str]:
    """kube-scheduler with its default profile."""
    network = cluster.network
    return [
        binary,
        f"--kubeconfig={kubeconfig}",
        f"--bind-address={network.host}",
        f"--secure-port={network.scheduler_port}",
        f"--authorization-always-allow-paths={HEALTH_PATHS}",
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        "--leader-elect=false",
        "--profiling=false",
    ]


def _controllers(cluster: Cluster) -> list[str]:
    # No cloud is behind this cluster; `tandem.cluster.loadbalancer` is its load balancer.
    off = list(CLOUD_CONTROLLERS)
    if cluster.spec.loopback:
        # EndpointSlices refuse loopback addresses, and every pod has one: these would log an error
        # for each Service for ever. Clients find pods through the Pods API.
        off += ENDPOINT_CONTROLLERS
    return ["*", *(f"-{name}" for name in off)]


def _seconds(value_s: float) -> str:
    return f"{round(value_s * 1000)}ms"
