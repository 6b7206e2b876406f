"""Writing down a new cluster: keys, configurations, and the supervisor's plan."""

from __future__ import annotations

import datetime
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tandem.agent.config import API_SERVER, AgentConfig, Gpu
from tandem.cluster import flags, kubeconfig
from tandem.cluster.gpus import real_gpus, spread
from tandem.cluster.paths import ClusterDir, state_home
from tandem.cluster.pins import SERVERS, Pins
from tandem.cluster.pki import Authority, KeyPair, create_service_account_keys
from tandem.cluster.process import ProcessId
from tandem.cluster.spec import Cluster
from tandem.cluster.supervisor import Command, Plan, Stage

LOAD_BALANCER: Final = "tandem-load-balancer"
NODES_PER_RACK: Final = 2
NODES_PER_ZONE: Final = 4


@dataclass(frozen=True, slots=True)
class ClusterFiles:
    """Writes the files of one cluster; nothing runs yet."""

    folder: ClusterDir
    cluster: Cluster
    binaries: dict[str, Path]

    def write(self, owner: ProcessId | None) -> Plan:
        """Writes everything below the cluster's folder, and returns what to start."""
        for path in (self.folder.pki, self.folder.config, self.folder.logs, self.folder.etcd):
            path.mkdir(parents=True, exist_ok=True)
        self.folder.root.chmod(0o700)
        self.folder.etcd.chmod(0o700)
        self.folder.audit_log.parent.mkdir(exist_ok=True)
        now = datetime.datetime.now(datetime.UTC)
        authority = Authority.create(self.folder.pki, f"tandem-{self.cluster.spec.name}", now)
        admin = authority.issue("admin", "kubernetes-admin", now, organizations=["system:masters"])
        self._kubeconfig(self.folder.kubeconfig, authority, admin)
        servers = self._servers(authority, now)
        spec = self.cluster.spec
        gpus = spread(real_gpus(), spec.nodes, spec.gpus_per_node)
        nodes = [
            self._node(authority, now, index, given) for index, given in enumerate(gpus, start=1)
        ]
        balancer = self._load_balancer(authority, now)
        plan = Plan((*servers, Stage((*nodes, balancer))), str(authority.path), owner)
        self.folder.cluster.write_text(self.cluster.to_json())
        self.folder.plan.write_text(plan.to_json())
        return plan

    def _servers(self, authority: Authority, now: datetime.datetime) -> tuple[Stage, ...]:
        """etcd and the API server, then what talks to it."""
        folder, cluster, network = self.folder, self.cluster, self.cluster.network
        names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"]
        serving = authority.issue(
            "apiserver", "kube-apiserver", now, hosts=[network.host, "10.0.0.1", *names]
        )
        to_agents = authority.issue("apiserver-agent-client", API_SERVER, now)
        signing_key, verification_key = create_service_account_keys(folder.pki)
        files = flags.ApiServerFiles(
            ca=authority.path,
            certificate=serving.certificate,
            key=serving.key,
            agent_client_certificate=to_agents.certificate,
            agent_client_key=to_agents.key,
            service_account_key=signing_key,
            service_account_public_key=verification_key,
            authentication=folder.config / "authentication.json",
            audit_policy=folder.config / "audit-policy.json",
        )
        files.authentication.write_text(flags.authentication_configuration())
        files.audit_policy.write_text(flags.audit_policy())
        configs = {}
        for name in ("kube-controller-manager", "kube-scheduler"):
            client = authority.issue(name, f"system:{name}", now)
            path = folder.config / f"{name}.kubeconfig"
            configs[name] = self._kubeconfig(path, authority, client)
        manager = flags.controller_manager(
            str(self.binaries["kube-controller-manager"]),
            cluster,
            configs["kube-controller-manager"],
            authority.path,
            files.service_account_key,
        )
        scheduler = flags.scheduler(
            str(self.binaries["kube-scheduler"]), cluster, configs["kube-scheduler"]
        )
        etcd = flags.etcd(str(self.binaries["etcd"]), folder, cluster)
        api = flags.api_server(str(self.binaries["kube-apiserver"]), folder, cluster, files)
        etcd_, api_, manager_, scheduler_ = (
            Command(name, tuple(argv), {})
            for name, argv in zip(SERVERS, (etcd, api, manager, scheduler), strict=True)
        )
        # etcd is a stage of its own so that it is ended after the API server: without it, the API
        # server does not end in peace.
        return (
            Stage((etcd_,)),
            Stage((api_,), f"{network.api_url}/readyz"),
            Stage((manager_, scheduler_)),
        )

    def _node(
        self, authority: Authority, now: datetime.datetime, index: int, gpus: tuple[Gpu, ...]
    ) -> Command:
        """The agent of one node: its identity, its configuration, its command."""
        cluster, network = self.cluster, self.cluster.network
        name = cluster.spec.node_names()[index - 1]
        client = authority.issue(name, f"system:node:{name}", now, organizations=["system:nodes"])
        server = authority.issue(f"{name}-server", name, now, hosts=[network.node_ip(index), name])
        folder = self.folder.node(name)
        folder.mkdir(parents=True, exist_ok=True)
        config = AgentConfig(
            node=name,
            node_ip=network.node_ip(index),
            pod_network=network.pod_network(index),
            port=network.agent_port,
            labels={
                "tandem.dev/rack": f"rack-{(index - 1) // NODES_PER_RACK + 1}",
                "topology.kubernetes.io/zone": f"zone-{(index - 1) // NODES_PER_ZONE + 1}",
            },
            gpus=gpus,
            folder=str(folder),
            state_home=str(state_home()),
            api_host=network.host,
            api_port=network.api_port,
            ca=str(authority.path),
            client_certificate=str(client.certificate),
            client_key=str(client.key),
            server_certificate=str(server.certificate),
            server_key=str(server.key),
            lease_duration_s=cluster.spec.timings.lease_duration_s,
            lease_renew_s=cluster.spec.timings.lease_renew_s,
            cluster=cluster.spec.name,
            kubernetes_version=str(Pins.read().kubernetes),
        )
        path = self.folder.config / f"{name}.json"
        path.write_text(config.to_json())
        return Command(name, (sys.executable, "-m", "tandem.agent", str(path)), {})

    def _load_balancer(self, authority: Authority, now: datetime.datetime) -> Command:
        client = authority.issue(LOAD_BALANCER, LOAD_BALANCER, now)
        module = (sys.executable, "-m", "tandem.cluster.loadbalancer")
        flags_ = (
            f"--server={self.cluster.network.api_url}",
            f"--ca={authority.path}",
            f"--certificate={client.certificate}",
            f"--key={client.key}",
        )
        return Command("load-balancer", (*module, *flags_), {})

    def _kubeconfig(self, path: Path, authority: Authority, client: KeyPair) -> Path:
        network, name = self.cluster.network, f"tandem-{self.cluster.spec.name}"
        return kubeconfig.write(
            path, cluster=name, server=network.api_url, ca=authority.path, client=client
        )
