"""What a node agent is told at its start: one JSON file, written by `tandem up`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

API_SERVER: Final = "kube-apiserver-kubelet-client"
"""The name in the certificate that the API server shows to agents."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator of the node."""

    index: int
    product: str
    """What the label nvidia.com/gpu.product says."""
    minor: int | None = None
    """The number in /dev/nvidiaN; None for a pretended one."""


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """The node that the agent is, and how it reaches the API server."""

    node: str
    node_ip: str
    pod_network: str
    """A /24 whose first address is the node's own."""
    port: int
    """Of the HTTPS server behind `kubectl logs` and `kubectl exec`."""
    labels: dict[str, str]
    gpus: tuple[Gpu, ...]
    folder: str
    """Where pods, volumes and logs are kept."""
    state_home: str
    """Hidden from containers: it holds the cluster's keys."""
    api_host: str
    api_port: int
    ca: str
    client_certificate: str
    client_key: str
    server_certificate: str
    server_key: str
    cluster: str
    kubernetes_version: str
    lease_duration_s: int = 40
    lease_renew_s: float = 10.0

    @property
    def memory_home(self) -> str:
        """Where volumes of medium Memory live: a tmpfs of the machine."""
        return f"/dev/shm/tandem/{self.cluster}"

    @property
    def api_url(self) -> str:
        """Where the API server answers."""
        return f"https://{self.api_host}:{self.api_port}"

    def to_json(self) -> str:
        """The contents of the file."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def read(cls, path: Path) -> AgentConfig:
        """The inverse of `to_json`."""
        data: dict[str, Any] = json.loads(path.read_text())
        data["gpus"] = tuple(Gpu(**gpu) for gpu in data["gpus"])
        return cls(**data)
