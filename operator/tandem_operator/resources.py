"""The kinds of objects that the operator reads or writes, and where the API serves them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tandem_runtime.contract import GROUP, VERSION


@dataclass(frozen=True)
class Resource:
    """One kind."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool = True

    @property
    def path(self) -> str:
        """The API path above `namespaces/`."""
        return f"/api/{self.api_version}" if "/" not in self.api_version else self._group_path

    @property
    def _group_path(self) -> str:
        return f"/apis/{self.api_version}"


@dataclass(frozen=True)
class Ref:
    """One object. With `uid`, that very object and not a later one of the same name.

    What is the cluster's has the namespace "".
    """

    resource: Resource
    namespace: str
    name: str
    uid: str | None = None


_OWN = f"{GROUP}/{VERSION}"
MODELS: Final = Resource(_OWN, "Model", "models")
FLEETS: Final = Resource(_OWN, "InferenceFleet", "inferencefleets")
POOLS: Final = Resource(_OWN, "Pool", "pools")
SCALING_POLICIES: Final = Resource(_OWN, "ScalingPolicy", "scalingpolicies")
NODE_HEALTH_POLICIES: Final = Resource(
    _OWN, "NodeHealthPolicy", "nodehealthpolicies", namespaced=False
)
CACHED_CONTEXTS: Final = Resource(_OWN, "CachedContext", "cachedcontexts")
PODS: Final = Resource("v1", "Pod", "pods")
CONFIG_MAPS: Final = Resource("v1", "ConfigMap", "configmaps")
SECRETS: Final = Resource("v1", "Secret", "secrets")
SERVICES: Final = Resource("v1", "Service", "services")
SERVICE_ACCOUNTS: Final = Resource("v1", "ServiceAccount", "serviceaccounts")
REVISIONS: Final = Resource("apps/v1", "ControllerRevision", "controllerrevisions")
DEPLOYMENTS: Final = Resource("apps/v1", "Deployment", "deployments")
BUDGETS: Final = Resource("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
ROLE_BINDINGS: Final = Resource("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings")
LEASES: Final = Resource("coordination.k8s.io/v1", "Lease", "leases")
EVENTS: Final = Resource("events.k8s.io/v1", "Event", "events")
NODES: Final = Resource("v1", "Node", "nodes", namespaced=False)

ALL: Final = (
    MODELS,
    FLEETS,
    POOLS,
    SCALING_POLICIES,
    NODE_HEALTH_POLICIES,
    NODES,
    CACHED_CONTEXTS,
    PODS,
    SECRETS,
    SERVICES,
    SERVICE_ACCOUNTS,
    REVISIONS,
    DEPLOYMENTS,
    BUDGETS,
    ROLE_BINDINGS,
    LEASES,
    EVENTS,
)
_BY_KIND: Final = {(r.api_version, r.kind): r for r in ALL}


def resource_of(manifest: dict[str, Any]) -> Resource:
    """The Resource of a manifest. Raises KeyError for a kind that the operator does not know."""
    return _BY_KIND[manifest["apiVersion"], manifest["kind"]]


def ref_of(body: dict[str, Any]) -> Ref:
    """The Ref of a live object or a manifest."""
    meta = body["metadata"]
    return Ref(resource_of(body), meta.get("namespace", ""), meta["name"], meta.get("uid"))
