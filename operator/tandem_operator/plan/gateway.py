"""The gateway of a namespace that has fleets: one Deployment, its Service and what they need.

All of it is owned, not controlled, by every fleet of the namespace, so that the garbage collector
removes it with the last one. The handoff secret belongs to the ServiceAccount: it is created once
and can never be patched (the operator may not read or write Secrets).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tandem_runtime.contract import (
    COMPONENT_GATEWAY,
    ENV_NAMESPACE,
    ENV_POD_IP,
    ENV_POD_NAME,
    ENV_POD_UID,
    GATEWAY_NAME,
    GRPC_PORT,
    HANDOFF_SECRET_DIR,
    HANDOFF_SECRET_KEY,
    HANDOFF_SECRET_NAME,
    HTTP_PORT,
    LABEL_COMPONENT,
    PATH_HEALTH,
    PATH_READY,
)

from tandem_operator.names import Reason
from tandem_operator.plan.actions import Action, CreateSecret, Manifest, Plan
from tandem_operator.plan.apply import apply_if_needed
from tandem_operator.plan.build import COMMON_LABELS, owner_reference
from tandem_operator.plan.pod import (
    MODEST_REQUESTS,
    RESTRICTED_CONTAINER,
    RESTRICTED_POD,
    field_env,
    probe,
)
from tandem_operator.plan.views import Body, FleetView
from tandem_operator.resources import (
    BUDGETS,
    DEPLOYMENTS,
    ROLE_BINDINGS,
    SERVICE_ACCOUNTS,
    SERVICES,
    Resource,
    ref_of,
)
from tandem_operator.settings import Settings

LABELS = {**COMMON_LABELS, LABEL_COMPONENT: COMPONENT_GATEWAY}
SECRET_RETRY_S = 60.0


@dataclass(frozen=True)
class GatewayPod:
    """A gateway pod that can be asked."""

    namespace: str
    name: str
    uid: str
    host: str


def gateway_pods(pods: Iterable[Body]) -> tuple[GatewayPod, ...]:
    """Those of these pods, by name."""
    found = []
    for pod in pods:
        meta, status = pod["metadata"], pod.get("status") or {}
        component = (meta.get("labels") or {}).get(LABEL_COMPONENT)
        if (
            component == COMPONENT_GATEWAY
            and status.get("podIP")
            and status.get("phase") == "Running"
        ):
            uid, namespace = meta.get("uid", ""), meta.get("namespace", "")
            found.append(GatewayPod(namespace, meta.get("name", ""), uid, status["podIP"]))
    return tuple(sorted(found, key=lambda pod: pod.name))


@dataclass(frozen=True)
class GatewaySnapshot:
    """Everything that a plan for one namespace's gateway is made of."""

    namespace: str
    now_s: float
    fleets: tuple[FleetView, ...]
    live: Mapping[str, Body] = field(default_factory=dict)
    """The gateway's objects that exist, by kind."""
    secret_ensured_s: float | None = None
    """When this process last saw the handoff secret created or present."""
    secret_missing: bool = False
    """Some pod of the namespace has been waiting for its volumes suspiciously long."""


def plan_gateway(snapshot: GatewaySnapshot, settings: Settings) -> Plan:
    """What to do for a namespace's gateway; without fleets the garbage collector does it all."""
    fleets = [fleet for fleet in snapshot.fleets if not fleet.deleting]
    if not fleets:
        return Plan()
    owners = [
        owner_reference(fleet.ref, controller=False)
        for fleet in sorted(fleets, key=lambda f: (f.created_s, f.name))
    ]
    actions: list[Action] = []
    for manifest in manifests(snapshot.namespace, owners, settings):
        live = snapshot.live.get(manifest["kind"])
        if manifest["kind"] == DEPLOYMENTS.kind and not live and snapshot.secret_ensured_s is None:
            continue  # Its pods mount the secret.
        actions += apply_if_needed(manifest, live)
    return Plan((*actions, *_secret(snapshot)))


def _secret(snapshot: GatewaySnapshot) -> list[Action]:
    """Make the secret once per process, and again when pods seem to miss it."""
    account = snapshot.live.get(SERVICE_ACCOUNTS.kind)
    if account is None:
        return []
    ensured_s = snapshot.secret_ensured_s
    if ensured_s is not None and not (
        snapshot.secret_missing and snapshot.now_s - ensured_s >= SECRET_RETRY_S
    ):
        return []
    manifest: Manifest = {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": {
            "name": HANDOFF_SECRET_NAME,
            "namespace": snapshot.namespace,
            "labels": LABELS,
            "ownerReferences": [owner_reference(ref_of(dict(account)), controller=False)],
        },
    }
    return [CreateSecret(manifest, HANDOFF_SECRET_KEY, Reason.CONFIGURED)]


def manifests(
    namespace: str, owners: list[dict[str, Any]], settings: Settings
) -> tuple[Manifest, ...]:
    """The gateway's objects, what others need first."""
    metadata = {
        "name": GATEWAY_NAME,
        "namespace": namespace,
        "labels": LABELS,
        "ownerReferences": owners,
    }

    def manifest(resource: Resource, **body: Any) -> Manifest:
        head = {"apiVersion": resource.api_version, "kind": resource.kind}
        return {**head, "metadata": metadata, **body}

    return (
        manifest(SERVICE_ACCOUNTS),
        manifest(
            ROLE_BINDINGS,
            roleRef={
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": GATEWAY_NAME,
            },
            subjects=[{"kind": "ServiceAccount", "name": GATEWAY_NAME, "namespace": namespace}],
        ),
        manifest(DEPLOYMENTS, spec=_deployment(namespace, settings)),
        manifest(SERVICES, spec=_service(settings)),
        manifest(BUDGETS, spec={"maxUnavailable": 1, "selector": {"matchLabels": LABELS}}),
    )


def _service(settings: Settings) -> Manifest:
    return {
        "type": settings.gateway_service_type,
        "selector": LABELS,
        "ports": [
            {"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"},
            {"name": "grpc", "port": GRPC_PORT, "targetPort": "grpc", "protocol": "TCP"},
        ],
    }


def _deployment(namespace: str, settings: Settings) -> Manifest:
    return {
        "replicas": settings.gateway_replicas,
        "selector": {"matchLabels": LABELS},
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
        },
        "template": {
            "metadata": {"labels": LABELS},
            "spec": {
                "serviceAccountName": GATEWAY_NAME,
                "enableServiceLinks": False,
                "securityContext": RESTRICTED_POD,
                # A leaving gateway finishes its streams.
                "terminationGracePeriodSeconds": settings.gateway_grace_s,
                "topologySpreadConstraints": [
                    {
                        "maxSkew": 1,
                        "topologyKey": "kubernetes.io/hostname",
                        "whenUnsatisfiable": "ScheduleAnyway",
                        "labelSelector": {"matchLabels": LABELS},
                    }
                ],
                "containers": [_container(namespace, settings)],
                "volumes": [{"name": "handoff", "secret": {"secretName": HANDOFF_SECRET_NAME}}],
            },
        },
    }


def _container(namespace: str, settings: Settings) -> Manifest:
    return {
        "name": "gateway",
        "image": settings.runtime_image,
        "command": ["python", "-m", "tandem_runtime.gateway"],
        "args": ["--namespace", namespace],
        "env": [
            field_env(ENV_POD_NAME, "metadata.name"),
            field_env(ENV_POD_IP, "status.podIP"),
            field_env(ENV_POD_UID, "metadata.uid"),
            field_env(ENV_NAMESPACE, "metadata.namespace"),
        ],
        "ports": [
            {"name": "http", "containerPort": HTTP_PORT, "protocol": "TCP"},
            {"name": "grpc", "containerPort": GRPC_PORT, "protocol": "TCP"},
        ],
        "resources": {"requests": MODEST_REQUESTS},
        "startupProbe": probe(PATH_HEALTH, 1, 120, timeout_s=2),
        "readinessProbe": probe(PATH_READY, 1, 2, timeout_s=2),
        "livenessProbe": probe(PATH_HEALTH, 10, 6, timeout_s=5),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": RESTRICTED_CONTAINER,
        "volumeMounts": [{"name": "handoff", "mountPath": HANDOFF_SECRET_DIR, "readOnly": True}],
    }
