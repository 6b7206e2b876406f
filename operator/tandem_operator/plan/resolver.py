"""The resolver pod: reads a model's header where the weights are, and says what it found.

It has the volumes of the fleet's pods and no accelerator, and is never restarted: its answer is
the termination message of its only container.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem_runtime.contract import (
    COMPONENT_RESOLVER,
    CONTAINER,
    ENV_NAMESPACE,
    ENV_POD_NAME,
    LABEL_COMPONENT,
    LABEL_MODEL,
)

from tandem_operator.api.model import Quantization, secret_name
from tandem_operator.plan.actions import Manifest
from tandem_operator.plan.build import COMMON_LABELS, owner_reference
from tandem_operator.plan.health import Problem, pod_problem
from tandem_operator.plan.merge import merge
from tandem_operator.plan.pod import (
    MODEST_REQUESTS,
    RESTRICTED_CONTAINER,
    RESTRICTED_POD,
    field_env,
)
from tandem_operator.plan.source import (
    quantization_args,
    weights_environment,
    weights_mounts,
    weights_volumes,
)
from tandem_operator.plan.times import to_unix_s
from tandem_operator.plan.views import Body, ModelView
from tandem_operator.resources import PODS, Ref
from tandem_operator.settings import Settings

PATIENCE_S = 600.0
"""A resolver that has not answered by then has failed."""


@dataclass(frozen=True)
class ResolverView:
    """A resolver pod."""

    namespace: str
    name: str
    uid: str
    created_s: float
    terminating: bool
    ended: bool
    exit_code: int | None
    message: str
    problem: Problem | None
    unschedulable: str | None

    @property
    def ref(self) -> Ref:
        return Ref(PODS, self.namespace, self.name, self.uid)


def resolver_view(body: Body) -> ResolverView:
    """Parse a resolver pod."""
    meta, status = body["metadata"], body.get("status") or {}
    # A template may have added others, which end when they like.
    statuses = [c for c in status.get("containerStatuses", ()) if c.get("name") == CONTAINER]
    states = [c.get("state") or {} for c in statuses]
    ended = next((s["terminated"] for s in states if "terminated" in s), None)
    conditions = {c["type"]: c for c in status.get("conditions", ())}
    scheduled: dict[str, Any] = conditions.get("PodScheduled", {})
    waits = scheduled.get("status") == "False"
    return ResolverView(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        created_s=to_unix_s(meta["creationTimestamp"]),
        terminating="deletionTimestamp" in meta,
        ended=ended is not None or status.get("phase") in ("Failed", "Succeeded"),
        exit_code=ended.get("exitCode") if ended else None,
        message=str((ended or {}).get("message") or ""),
        problem=pod_problem(body),
        unschedulable=str(scheduled.get("message")) if waits else None,
    )


def resolver_manifest(model: ModelView, name: str, settings: Settings) -> Manifest:
    """The resolver pod: the volumes of the fleet's pods, no accelerator, no restart."""
    spec = model.spec
    limit = spec.max_context_tokens
    environment = weights_environment(spec.source.uri, secret_name(spec))
    base: Manifest = {
        "metadata": {
            "labels": {
                **COMMON_LABELS,
                LABEL_COMPONENT: COMPONENT_RESOLVER,
                LABEL_MODEL: model.name,
            },
        },
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 5,
            "activeDeadlineSeconds": int(PATIENCE_S),
            "securityContext": RESTRICTED_POD,
            "containers": [
                {
                    "name": CONTAINER,
                    "image": settings.runtime_image,
                    "command": ["python", "-m", "tandem_runtime.resolve"],
                    "args": [
                        *("--uri", spec.source.uri),
                        *("--dtype", spec.dtype),
                        *quantization_args(spec.quantization or Quantization()),
                        *(("--max-context-tokens", str(limit)) if limit else ()),
                    ],
                    **environment,
                    "env": [
                        *environment["env"],
                        field_env(ENV_POD_NAME, "metadata.name"),
                        field_env(ENV_NAMESPACE, "metadata.namespace"),
                    ],
                    "resources": {"requests": MODEST_REQUESTS},
                    "securityContext": RESTRICTED_CONTAINER,
                    "volumeMounts": weights_mounts(spec.source.uri),
                }
            ],
            "volumes": weights_volumes(spec.source.uri),
        },
    }
    own = {
        "metadata": {
            "name": name,
            "namespace": model.namespace,
            "ownerReferences": [owner_reference(model.ref, controller=True)],
        }
    }
    merged: Mapping[str, Any] = merge(base, spec.template or {})
    return {"apiVersion": "v1", "kind": "Pod", **merge(merged, own)}
