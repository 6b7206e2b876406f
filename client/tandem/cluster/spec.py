"""What a local cluster is asked to be, and the loopback addresses that follow from its slot.

Every cluster of a machine has a slot of its own, and with it a /16 of the loopback network: the
control plane's ports are then the usual ones on an address of its own, node i is 127.X.i.1 and its
pods are the other addresses of 127.X.i.0/24.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any, Final

NAME_PATTERN: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,28}[a-z0-9])?")
MAX_NODES: Final = 200
SLOTS: Final = range(1, 28)
NODE_PORTS_PER_SLOT: Final = 100
"""27 slots x 100 ports fill Kubernetes' usual node port range, 30000 to 32767."""


class SpecError(ValueError):
    """A cluster that cannot be; the message says what to ask for instead."""


@dataclass(frozen=True, slots=True)
class NodeTimings:
    """How quickly silence of a node is noticed. The defaults are those of Kubernetes 1.36."""

    grace_s: float = 50.0
    """A node that renewed no lease for this long becomes Unknown and is tainted."""
    toleration_s: int = 300
    """How long pods tolerate the not-ready and unreachable taints unless they say otherwise."""
    evictions_per_s: float = 0.1
    """Nodes whose pods are evicted, a second."""

    @property
    def monitor_period_s(self) -> float:
        """How often the controller manager looks at the leases."""
        return min(5.0, self.grace_s / 8)

    @property
    def startup_grace_s(self) -> float:
        """The grace of a node that never reported."""
        return self.grace_s + 10.0

    @property
    def lease_duration_s(self) -> int:
        """What a node writes into its lease."""
        return max(1, int(min(40.0, self.grace_s * 0.8)))

    @property
    def lease_renew_s(self) -> float:
        """How often a node renews its lease: a quarter of its duration, as a kubelet does."""
        return self.lease_duration_s / 4


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """What `tandem up` was asked for.

    Raises:
        SpecError: a name, size or timing that cannot work.
    """

    name: str = "tandem"
    nodes: int = 4
    gpus_per_node: int = 8
    """Pretended where the machine has no NVIDIA GPU; real ones are spread over the nodes."""
    operator: bool = True
    loopback: bool = True
    """False: addresses below 10.64.0.0/10, which the caller has routed to this machine, and
    endpoint controllers on. EndpointSlices refuse loopback addresses, so that is what it takes to
    see a Service's endpoints; tests do it in a network namespace."""
    timings: NodeTimings = field(default_factory=NodeTimings)

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.name):
            raise SpecError(
                f"cluster name {self.name!r}: use lower-case letters, digits and '-', "
                "at most 30 characters"
            )
        if not 1 <= self.nodes <= MAX_NODES:
            raise SpecError(f"--nodes {self.nodes}: use 1 to {MAX_NODES}")
        if not 0 <= self.gpus_per_node <= 64:
            raise SpecError(f"--gpus-per-node {self.gpus_per_node}: use 0 to 64")
        if self.timings.grace_s < 2:
            raise SpecError(f"node grace {self.timings.grace_s} s: use 2 s or more")

    def node_names(self) -> list[str]:
        """The nodes, `node-1` first."""
        return [f"node-{index}" for index in range(1, self.nodes + 1)]


@dataclass(frozen=True, slots=True)
class Network:
    """The addresses of the cluster in slot `slot`."""

    slot: int
    loopback: bool = True
    api_port: int = 6443
    etcd_port: int = 2379
    etcd_peer_port: int = 2380
    controller_manager_port: int = 10257
    scheduler_port: int = 10259
    agent_port: int = 10250

    @property
    def prefix(self) -> str:
        """The first two octets of every address."""
        return f"{127 if self.loopback else 10}.{64 + self.slot}"

    @property
    def host(self) -> str:
        """The control plane's address."""
        return f"{self.prefix}.0.1"

    @property
    def api_url(self) -> str:
        """Where the API server answers."""
        return f"https://{self.host}:{self.api_port}"

    def node_ip(self, index: int) -> str:
        """The address of node `index` (1 is the first)."""
        return f"{self.prefix}.{index}.1"

    def pod_network(self, index: int) -> str:
        """The network of the pods of node `index`; its first address is the node's own."""
        return f"{self.prefix}.{index}.0/24"

    @property
    def node_ports(self) -> tuple[int, int]:
        """First and last node port: forwarded on 127.0.0.1, so no two clusters share one."""
        first = 30000 + NODE_PORTS_PER_SLOT * (self.slot - 1)
        return first, first + NODE_PORTS_PER_SLOT - 1


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that was started: what was asked for, and where it lives."""

    spec: ClusterSpec
    network: Network

    def to_json(self) -> str:
        """The contents of `ClusterDir.cluster`."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Cluster:
        """The inverse of `to_json`."""
        data: dict[str, Any] = json.loads(text)
        timings = NodeTimings(**data["spec"].pop("timings"))
        return cls(ClusterSpec(**data["spec"], timings=timings), Network(**data["network"]))
