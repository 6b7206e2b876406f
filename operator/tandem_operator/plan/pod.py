"""The pods of a pool: template (part of the revision) and manifest (what one pod adds to it).

A template holds everything that needs a new pod to change. Names, the revision label, served names
and the grace period are added when a pod is made, since changing them is no new revision
(docs/design/revisions.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tandem_runtime.contract import (
    ANNOTATION_RESTARTED_AT,
    ANNOTATION_SERVED_NAMES,
    COMPONENT_RUNTIME,
    CONTAINER,
    ENV_CPU_LIMIT,
    ENV_FLEET,
    ENV_MEMORY_LIMIT_BYTES,
    ENV_NAMESPACE,
    ENV_POD_IP,
    ENV_POD_NAME,
    ENV_POD_UID,
    ENV_REVISION,
    GRPC_PORT,
    HANDOFF_PORT,
    HANDOFF_SECRET_DIR,
    HANDOFF_SECRET_NAME,
    HTTP_PORT,
    LABEL_COMPONENT,
    LABEL_FLEET,
    LABEL_MODEL,
    LABEL_REVISION,
    LABEL_ROLE,
    PATH_HEALTH,
    PATH_READY,
)

from tandem_operator.api.fleet import PoolTemplate, accelerator_percent
from tandem_operator.api.model import ResolvedModel
from tandem_operator.names import (
    ANNOTATION_DEFAULT_CONTAINER,
    ANNOTATION_MODEL_DIGEST,
    ANNOTATION_MODEL_URI,
    ANNOTATION_SAFE_TO_EVICT,
)
from tandem_operator.plan.actions import Manifest
from tandem_operator.plan.build import COMMON_LABELS, owner_reference, pool_name, pool_selector
from tandem_operator.plan.merge import merge
from tandem_operator.plan.source import (
    quantization_args,
    weights_environment,
    weights_mounts,
    weights_volumes,
)
from tandem_operator.plan.tiers import (
    tier_arguments,
    tier_environment,
    tier_mounts,
    tier_requests,
    tier_volumes,
)
from tandem_operator.plan.views import FleetView, PoolView
from tandem_operator.settings import Settings

STARTUP_PERIOD_S = 2
STARTUP_FAILURES = 900
"""Loading weights may take half an hour; the fleet's progress deadline is what judges it."""
HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Weights in transparent huge pages where the node allows them: on CPUs a decode step reads all of
them, and took a fifth less time (docs/design/engine.md)."""
SPREAD_OVER = ("kubernetes.io/hostname", "tandem.dev/rack", "topology.kubernetes.io/zone")
GRACE_AFTER_DRAIN_S = 30

SHARED_MEMORY_VOLUMES: tuple[Manifest, ...] = (
    {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
)
"""Ranks without a direct path between their devices exchange through it; a container's own is
64 MiB, with which NCCL ends in the middle of a step."""
SHARED_MEMORY_MOUNTS: tuple[Manifest, ...] = ({"name": "shared-memory", "mountPath": "/dev/shm"},)

MODEST_REQUESTS: Manifest = {"cpu": "100m", "memory": "256Mi"}
"""Of pods that hold no weights: a quota on requests refuses pods that have none."""
RESTRICTED_POD: Manifest = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
RESTRICTED_CONTAINER: Manifest = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
}


def pod_template(
    fleet: FleetView,
    role: str,
    pool: PoolTemplate,
    model_name: str,
    model: ResolvedModel,
    model_template: Manifest | None,
    settings: Settings,
) -> Manifest:
    """The pod template of one pool: ours, then the Model's template, then the pool's."""
    template: Manifest = {
        "metadata": {
            "labels": _labels(fleet, role, model_name),
            "annotations": _annotations(fleet, model),
        },
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": RESTRICTED_POD,
            "topologySpreadConstraints": _spread(fleet.name, role),
            "containers": [_container(fleet, role, pool, model_name, model, settings)],
            "volumes": [
                {"name": "handoff", "secret": {"secretName": HANDOFF_SECRET_NAME}},
                *weights_volumes(model.uri),
                *tier_volumes(fleet.spec),
                *(SHARED_MEMORY_VOLUMES if ranks(pool) > 1 else ()),
            ],
        },
    }
    for partial in (model_template, pool.template):
        template = merge(template, partial or {})
    return _with_limits(template)


def _labels(fleet: FleetView, role: str, model_name: str) -> dict[str, str]:
    return {
        **COMMON_LABELS,
        **pool_selector(fleet.name, pool_name(fleet.name, role)),
        LABEL_ROLE: role,
        LABEL_MODEL: model_name,
    }


def _annotations(fleet: FleetView, model: ResolvedModel) -> dict[str, str]:
    annotations = {
        ANNOTATION_DEFAULT_CONTAINER: CONTAINER,
        ANNOTATION_MODEL_URI: model.uri,
        ANNOTATION_MODEL_DIGEST: model.digest,
    }
    restarted_at = fleet.annotations.get(ANNOTATION_RESTARTED_AT)
    return annotations | ({ANNOTATION_RESTARTED_AT: restarted_at} if restarted_at else {})


def _spread(fleet: str, role: str) -> list[Manifest]:
    """Spread each revision by itself: else a rollout's new pods avoid the old ones' nodes."""
    selector = {"matchLabels": pool_selector(fleet, pool_name(fleet, role))}
    return [
        {
            "maxSkew": 1,
            "topologyKey": key,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": selector,
            "matchLabelKeys": [LABEL_REVISION],
        }
        for key in SPREAD_OVER
    ]


def _container(
    fleet: FleetView,
    role: str,
    pool: PoolTemplate,
    model_name: str,
    model: ResolvedModel,
    settings: Settings,
) -> Manifest:
    accelerator = pool.accelerator
    environment = weights_environment(model.uri, model.secret_name)
    sources = [*environment.get("envFrom", ()), *tier_environment(fleet.spec)]
    resources = {"limits": {accelerator.resource: str(accelerator.count)}} if accelerator else {}
    return {
        "name": CONTAINER,
        "image": settings.runtime_image,
        "command": ["python", "-m", "tandem_runtime.serve"],
        "args": [
            *("--role", role),
            *("--model-name", model_name),
            *("--model-uri", model.uri),
            *("--dtype", model.dtype),
            *quantization_args(model.quantization),
            *("--device", "cuda" if accelerator else "cpu"),
            *("--max-context-tokens", str(model.context_tokens)),
            *("--kv-cache-percent", str(accelerator_percent(fleet.spec))),
            *tier_arguments(fleet.spec),
            *(("--tensor-parallel", str(ranks(pool))) if ranks(pool) > 1 else ()),
        ],
        **({"envFrom": sources} if sources else {}),
        "env": [
            *environment["env"],
            {"name": "GLIBC_TUNABLES", "value": HUGE_PAGES},
            field_env(ENV_POD_NAME, "metadata.name"),
            field_env(ENV_POD_UID, "metadata.uid"),
            field_env(ENV_POD_IP, "status.podIP"),
            field_env(ENV_NAMESPACE, "metadata.namespace"),
            field_env(ENV_FLEET, f"metadata.labels['{LABEL_FLEET}']"),
            field_env(ENV_REVISION, f"metadata.labels['{LABEL_REVISION}']"),
        ],
        "ports": [
            {"name": "http", "containerPort": HTTP_PORT},
            {"name": "grpc", "containerPort": GRPC_PORT},
            {"name": "handoff", "containerPort": HANDOFF_PORT},
        ],
        "resources": resources | tier_requests(fleet.spec),
        "startupProbe": probe(PATH_HEALTH, STARTUP_PERIOD_S, STARTUP_FAILURES, timeout_s=2),
        "readinessProbe": probe(PATH_READY, 1, 2, timeout_s=2),
        "livenessProbe": probe(PATH_HEALTH, 10, 10, timeout_s=5),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": RESTRICTED_CONTAINER,
        "volumeMounts": [
            {"name": "handoff", "mountPath": HANDOFF_SECRET_DIR, "readOnly": True},
            *weights_mounts(model.uri),
            *tier_mounts(fleet.spec),
            *(SHARED_MEMORY_MOUNTS if ranks(pool) > 1 else ()),
        ],
    }


def ranks(pool: PoolTemplate) -> int:
    """Processes that share the model in each of a pool's pods: one for each accelerator."""
    return pool.accelerator.count if pool.accelerator else 1


def field_env(name: str, path: str) -> Manifest:
    """An environment variable from the downward API."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def probe(path: str, period_s: int, failures: int, timeout_s: int) -> Manifest:
    """An HTTP probe of the port named http."""
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": period_s,
        "failureThreshold": failures,
        "timeoutSeconds": timeout_s,
    }


def _with_limits(template: Manifest) -> Manifest:
    """Tells the runtime its limits, where the merged template sets them.

    Without a limit a resourceFieldRef would say the node's capacity, which the pod does not own.
    """
    containers = [
        merge(c, {"env": _limit_env(c)}) if c["name"] == CONTAINER else c
        for c in template["spec"]["containers"]
    ]
    return merge(template, {"spec": {"containers": containers}})


def _limit_env(container: Manifest) -> list[Manifest]:
    limits: dict[str, Any] = (container.get("resources") or {}).get("limits") or {}
    wanted = ((ENV_CPU_LIMIT, "cpu"), (ENV_MEMORY_LIMIT_BYTES, "memory"))
    return [
        {"name": name, "valueFrom": {"resourceFieldRef": {"resource": f"limits.{resource}"}}}
        for name, resource in wanted
        if resource in limits
    ]


def pod_manifest(
    fleet: FleetView,
    pool: PoolView,
    revision: str,
    slot: int,
    template: Manifest,
    names: str,
    avoid: Sequence[str] = (),
) -> Manifest:
    """One pod of a pool, POOL-REVISION-SLOT; `names` as `served_names_text` writes them, `avoid`
    the nodes that it must not come to."""
    own: Manifest = {
        "metadata": {
            "name": f"{pool.name}-{revision}-{slot}",
            "namespace": pool.namespace,
            "labels": {LABEL_COMPONENT: COMPONENT_RUNTIME, LABEL_REVISION: revision},
            "annotations": {
                ANNOTATION_SERVED_NAMES: names,
                **evictable(fleet, template, leaves=False),
            },
            "ownerReferences": [owner_reference(pool.ref, controller=True)],
        },
        "spec": {"terminationGracePeriodSeconds": _grace_s(fleet)},
    }
    body = merge(template, own)
    if avoid:
        body["spec"] = {**body["spec"], "affinity": _away_from(avoid, body["spec"])}
    return {"apiVersion": "v1", "kind": "Pod", **body}


def evictable(fleet: FleetView, template: Manifest, *, leaves: bool) -> dict[str, str]:
    """Whether the cluster autoscaler may remove the pod's node: once the pod leaves, or where the
    fleet's budget lets pods go. Empty where a template says so itself."""
    if ANNOTATION_SAFE_TO_EVICT in ((template.get("metadata") or {}).get("annotations") or {}):
        return {}
    may = leaves or fleet.spec.disruption.max_unavailable > 0
    return {ANNOTATION_SAFE_TO_EVICT: str(may).lower()}


def _away_from(nodes: Sequence[str], spec: Manifest) -> Manifest:
    """The pod's affinity, with each of its alternatives confined to other nodes."""
    away = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]
    affinity: Manifest = spec.get("affinity") or {}
    of_nodes: Manifest = affinity.get("nodeAffinity") or {}
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    terms = (of_nodes.get(required) or {}).get("nodeSelectorTerms") or [{}]
    confined = [term | {"matchFields": [*(term.get("matchFields") or ()), *away]} for term in terms]
    return affinity | {"nodeAffinity": of_nodes | {required: {"nodeSelectorTerms": confined}}}


def check_manifest(fleet: FleetView, pool: str, revision: str, template: Manifest) -> Manifest:
    """A pod to be dry-run before the first of a revision is made; its pool may not exist yet."""
    own: Manifest = {
        "metadata": {
            "name": f"{pool}-{revision}-check",
            "namespace": fleet.namespace,
            "labels": {LABEL_REVISION: revision},
        },
        "spec": {"terminationGracePeriodSeconds": _grace_s(fleet)},
    }
    return {"apiVersion": "v1", "kind": "Pod", **merge(template, own)}


def _grace_s(fleet: FleetView) -> int:
    return fleet.spec.disruption.drain_timeout_seconds + GRACE_AFTER_DRAIN_S


def served_names_text(names: Sequence[str]) -> str:
    """The annotation's text."""
    return ",".join(names)
