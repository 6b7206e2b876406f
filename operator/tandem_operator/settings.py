"""What the operator's Deployment sets: environment variables, read once at start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tandem_operator import __version__

SHORTEST_S = 0.1
SERVICE_TYPES = ("ClusterIP", "NodePort", "LoadBalancer")
DRAIN_TAINTS = (
    "node.kubernetes.io/unschedulable",
    "ToBeDeletedByClusterAutoscaler",
    "karpenter.sh/disrupted",
)
"""`kubectl cordon` and `kubectl drain`, and the two usual autoscalers."""


@dataclass(frozen=True)
class Settings:
    """The operator's settings; every field is the variable TANDEM_<FIELD>, upper case."""

    namespace: str = "tandem-system"
    """Of the Lease."""
    pod_name: str = "tandem-operator"
    pod_uid: str = ""
    """Together with the name: who holds the Lease. A restarted container of the same pod takes
    its own Lease over at once."""
    pod_ip: str = "0.0.0.0"
    http_port: int = 8080
    runtime_image: str = f"tandem.dev/runtime:{__version__}"
    gateway_replicas: int = 2
    gateway_service_type: str = "ClusterIP"
    gateway_grace_s: int = 3600
    """The longest stream that a leaving gateway waits for."""
    watch_namespaces: tuple[str, ...] = ()
    """Comma-separated; empty: all namespaces."""
    drain_taints: tuple[str, ...] = DRAIN_TAINTS
    """Comma-separated keys of the taints that say that a node is to be drained."""
    node_repair: bool = False
    """Whether the operator may write to nodes: it has the role tandem-node-repair."""
    workers: int = 8
    """Reconciles at a time, of different keys."""
    resync_s: float = 300.0
    scrape_interval_s: float = 10.0
    scaling_interval_s: float = 5.0
    """Between two looks at the load of autoscaled fleets."""
    prometheus_url: str = ""
    """Where the load of autoscaled fleets is read; empty: pods and gateways are asked."""
    prometheus_token_file: str = ""
    """A file with the bearer token for it, mounted from a Secret."""
    lease_duration_s: float = 15.0
    lease_renew_s: float = 5.0

    def __post_init__(self) -> None:
        """Raises ValueError with a sentence for a value that cannot work."""
        if self.gateway_service_type not in SERVICE_TYPES:
            raise ValueError(
                f"TANDEM_GATEWAY_SERVICE_TYPE is {self.gateway_service_type!r}; "
                f"use one of {', '.join(SERVICE_TYPES)}"
            )
        if self.prometheus_url and not self.prometheus_url.startswith(("http://", "https://")):
            raise ValueError(
                f"TANDEM_PROMETHEUS_URL is {self.prometheus_url!r}; write http://HOST:PORT or "
                "https://HOST"
            )
        for name in ("gateway_replicas", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"TANDEM_{name.upper()} must be at least 1")
        for name in ("resync_s", "scrape_interval_s", "scaling_interval_s", "lease_renew_s"):
            if not SHORTEST_S <= getattr(self, name) < float("inf"):
                raise ValueError(f"TANDEM_{name.upper()} must be at least {SHORTEST_S:g} seconds")
        if self.gateway_grace_s < 0:
            raise ValueError("TANDEM_GATEWAY_GRACE_S must not be negative")
        if self.lease_duration_s < 2 * self.lease_renew_s:
            raise ValueError(
                f"TANDEM_LEASE_DURATION_S ({self.lease_duration_s:g}) must be at least twice "
                f"TANDEM_LEASE_RENEW_S ({self.lease_renew_s:g})"
            )


def from_environment(environment: Mapping[str, str]) -> Settings:
    """Settings from TANDEM_* variables. Raises ValueError with a sentence for an unreadable one."""
    values: dict[str, object] = {}
    for name, field in Settings.__dataclass_fields__.items():
        variable = f"TANDEM_{name.upper()}"
        text = environment.get(variable, "").strip()
        if not text:
            continue
        default: object = field.default
        kind = type(default)
        if kind is bool:
            values[name] = _boolean(variable, text)
            continue
        if kind is tuple:
            values[name] = tuple(part.strip() for part in text.split(",") if part.strip())
            continue
        try:
            values[name] = text if kind is str else _number(kind is int, text)
        except ValueError:
            raise ValueError(f"{variable} is {text!r}; write a number") from None
    return Settings(**values)  # type: ignore[arg-type]


def _boolean(variable: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{variable} is {text!r}; write true or false")
    return text.lower() == "true"


def _number(whole: bool, text: str) -> float:
    return int(text) if whole else float(text)
