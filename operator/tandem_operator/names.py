"""Every name that the operator writes into the cluster and the runtime does not share.

Names that the pods, the gateway or the local cluster also read are in `tandem_runtime.contract`.
This module imports nothing of the operator.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

# -- field managers: one for each writer, so that managedFields tell who wrote what
MANAGER: Final = "tandem-operator"
MANAGER_STATUS: Final = "tandem-status"
MANAGER_SCALER: Final = "tandem-scaler"
"""Whoever decides a pool's size writes through /scale under this name."""

# -- labels and annotations ---------------------------------------------------------------------
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
LABEL_NAME: Final = "app.kubernetes.io/name"
MANAGED_BY: Final = "tandem"

ANNOTATION_APPLIED: Final = "tandem.dev/applied"
"""Hash of the configuration last applied: a field that was dropped from it is noticed."""
ANNOTATION_DRAINING_SINCE: Final = "tandem.dev/draining-since"
ANNOTATION_MODEL_DIGEST: Final = "tandem.dev/model-digest"
ANNOTATION_MODEL_URI: Final = "tandem.dev/model-uri"
ANNOTATION_ROLLBACK: Final = "tandem.dev/rollback"
"""On a fleet: {"from": REVISION, "to": REVISION}; docs/design/revisions.md."""
ANNOTATION_CORDONED: Final = "tandem.dev/cordoned"
"""On a node: we cordoned it, and why. Only such a node is uncordoned by us."""
ANNOTATION_OUT_OF_SERVICE: Final = "tandem.dev/out-of-service"
"""On a node: we gave it the taint of Kubernetes' of that name."""
ANNOTATION_REPAIR_PAUSED: Final = "tandem.dev/repair-paused"
"""On a node or on the NodeHealthPolicy, by a person: true."""
ANNOTATION_SAFE_TO_EVICT: Final = "cluster-autoscaler.kubernetes.io/safe-to-evict"
ANNOTATION_DEFAULT_CONTAINER: Final = "kubectl.kubernetes.io/default-container"


class Condition(StrEnum):
    """Condition types of our kinds. `Reconciling` and `Stalled` are present only when True."""

    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    MODEL_RESOLVED = "ModelResolved"
    TEMPLATE_VALID = "TemplateValid"
    PREFILL_AVAILABLE = "PrefillAvailable"
    DECODE_AVAILABLE = "DecodeAvailable"
    GATEWAY_AVAILABLE = "GatewayAvailable"
    NAMES_SERVED = "NamesServed"
    SCALING_ACTIVE = "ScalingActive"
    ROLLED_BACK = "RolledBack"
    SLO_MET = "SLOMet"
    NODE_REPAIR = "NodeRepair"
    HELD = "Held"


class Reason(StrEnum):
    """Why the operator acted or an object is as it is: condition reason, Event reason, label."""

    # model
    RESOLVED = "Resolved"
    RESOLVING = "Resolving"
    RESOLVE_FAILED = "ResolveFailed"
    RESOLVER_FINISHED = "ResolverFinished"
    RESOLVER_TIMED_OUT = "ResolverTimedOut"
    RESOLVER_STALE = "ResolverStale"
    MODEL_NOT_FOUND = "ModelNotFound"
    MODEL_NOT_RESOLVED = "ModelNotResolved"
    # template
    TEMPLATE_ACCEPTED = "TemplateAccepted"
    TEMPLATE_REFUSED = "TemplateRefused"
    TEMPLATE_NOT_CHECKED = "TemplateNotChecked"
    QUOTA_EXCEEDED = "QuotaExceeded"
    # pools and their pods
    POOL_FOREIGN = "PoolForeign"
    PODS_READY = "PodsReady"
    PODS_NOT_READY = "PodsNotReady"
    PODS_STARTING = "PodsStarting"
    SCALED_TO_ZERO = "ScaledToZero"
    SCALE_OUT = "ScaleOut"
    SCALE_IN = "ScaleIn"
    REPLICAS_SET = "ReplicasSet"
    REPLICAS_OVERWRITTEN = "ReplicasOverwritten"
    NODE_DRAINING = "NodeDraining"
    POD_SUSPECTED = "PodSuspected"
    POD_CLEARED = "PodCleared"
    POD_FAILED = "PodFailed"
    POOL_REMOVED = "PoolRemoved"
    POOL_DELETED = "PoolDeleted"
    DRAINED = "Drained"
    DRAIN_TIMED_OUT = "DrainTimedOut"
    DRAIN_CANCELLED = "DrainCancelled"
    NOT_SERVING = "NotServing"
    # rollout
    ROLLING_OUT = "RollingOut"
    ROLLOUT_HALTED = "RolloutHalted"
    ROLLED_BACK = "RolledBack"
    ROLLBACK_REVISION_GONE = "RollbackRevisionGone"
    INSUFFICIENT_CAPACITY = "InsufficientCapacity"
    REVISION_RECORDED = "RevisionRecorded"
    HISTORY_LIMIT = "HistoryLimit"
    # autoscaling
    SCALED = "Scaled"
    SCALING = "Scaling"
    SHADOW = "Shadow"
    POLICY_NOT_FOUND = "PolicyNotFound"
    BUDGET_TOO_SMALL = "BudgetTooSmall"
    SCHEDULE_UNUSABLE = "ScheduleUnusable"
    NO_LOAD_DATA = "NoLoadData"
    PROMETHEUS_MISSING = "PrometheusMissing"
    PROMETHEUS_FAILED = "PrometheusFailed"
    QUERY_REFUSED = "QueryRefused"
    QUERY_UNUSABLE = "QueryUnusable"
    REPLICAS_CONTENDED = "ReplicasContended"
    # nodes
    NODE_HELD = "NodeHeld"
    NODE_DRY_RUN = "NodeDryRun"
    NODE_DRAINED = "NodeDrained"
    NODE_DEAD = "NodeDead"
    NODE_RELEASED = "NodeReleased"
    NODE_RECOVERED = "NodeRecovered"
    POLICY_OFF = "Off"
    WATCHING = "Watching"
    CONDITION_UNKNOWN = "ConditionUnknown"
    DEADLINE_TOO_SHORT = "DeadlineTooShort"
    ENABLED = "Enabled"
    DISABLED = "Disabled"
    PAUSED = "Paused"
    OUTAGE = "Outage"
    # fleet
    SERVING = "Serving"
    NAME_CONFLICT = "NameConflict"
    NAMES_UNIQUE = "NamesUnique"
    NAMES_CHANGED = "NamesChanged"
    GATEWAY_READY = "GatewayReady"
    GATEWAY_NOT_READY = "GatewayNotReady"
    OBJECTIVES_MET = "ObjectivesMet"
    OBJECTIVES_MISSED = "ObjectivesMissed"
    NO_MEASUREMENT = "NoMeasurement"
    CONFIGURED = "Configured"
    # contexts
    CONTEXT_WANTED = "Wanted"
    CONTEXT_DELETED = "Deleted"
    CONTEXT_KEPT = "Kept"
    CONTEXT_BUILDING = "Prefilling"
    CONTEXT_NOT_KEPT = "NotKept"
    CONTENT_NOT_FOUND = "ContentNotFound"
    FLEET_NOT_FOUND = "FleetNotFound"
    EXPIRED = "Expired"
    WRITE_REFUSED = "WriteRefused"
