"""What the operator, the gateway, the pods and the local cluster have to agree on.

Standard library only: the operator imports this module and nothing else of the runtime.
docs/design/contract.md explains each group of names.
"""

from __future__ import annotations

import hashlib
import hmac
from enum import StrEnum
from typing import Final

GROUP: Final = "tandem.dev"
VERSION: Final = "v1alpha1"


class Role(StrEnum):
    """What a runtime pod does with a request."""

    PREFILL = "prefill"
    """Computes prompts and hands their KV cache over."""
    DECODE = "decode"
    """Receives KV cache and generates; computes a prompt itself when no prefill pod is named."""
    BOTH = "both"
    """Aggregated serving: one pool, no handoff."""


# -- labels and annotations on pods ---------------------------------------------------------
LABEL_FLEET: Final = "tandem.dev/fleet"
LABEL_POOL: Final = "tandem.dev/pool"
LABEL_ROLE: Final = "tandem.dev/role"
LABEL_MODEL: Final = "tandem.dev/model"
LABEL_REVISION: Final = "tandem.dev/revision"
"""Fleet-wide: prefill and decode pods pair only when this label is equal."""
LABEL_COMPONENT: Final = "app.kubernetes.io/component"
COMPONENT_RUNTIME: Final = "runtime"
COMPONENT_GATEWAY: Final = "gateway"
COMPONENT_RESOLVER: Final = "resolver"

ANNOTATION_SERVED_NAMES: Final = "tandem.dev/served-names"
"""Comma-separated names that clients put into "model"; patched in place, never a rollout."""
ANNOTATION_DRAINING: Final = "tandem.dev/draining"
"""Why the operator empties this pod; the gateway admits nothing new to it."""
ANNOTATION_SLOWER_PERCENT: Final = "tandem.dev/slower-percent"
"""By how much the operator suspects this pod to be slower than its peers; the gateway counts work
on it as so much more."""
ANNOTATION_RESTARTED_AT: Final = "tandem.dev/restartedAt"
ANNOTATION_EXTERNAL_URL: Final = "tandem.dev/external-url"
"""On a gateway's Service: where clients outside the cluster reach it (host:port of its HTTP)."""

ANNOTATION_XID_COUNTS: Final = "tandem.dev/xid-counts"
"""On a node, by whoever reads the driver's log: {"79": 3}, how often each of NVIDIA's error codes
came since some moment. What counts is that a number rises."""

CONTAINER: Final = "runtime"
"""The container of a runtime pod that is ours; a template may add others."""

# -- ports ----------------------------------------------------------------------------------
HTTP_PORT: Final = 8000
GRPC_PORT: Final = 8001
HANDOFF_PORT: Final = 7600

# -- HTTP paths of a runtime pod ---------------------------------------------------------------
PATH_HEALTH: Final = "/healthz"
PATH_READY: Final = "/readyz"
PATH_METRICS: Final = "/metrics"
PATH_STATE: Final = "/tandem/v1/state"
"""GET: one JSON object, `protocol.PodState` (pods) or `protocol.GatewayState` (gateways)."""
PATH_DRAIN: Final = "/tandem/v1/drain"
"""POST `protocol.DrainRequest`; idempotent; answers `protocol.PodState`.

The bearer token is the pod's uid. Whoever may read pods knows it, as the operator does without
reading Secrets, and whoever only reaches the address does not; and it is not another pod's, should
the address be.
"""
PATH_GENERATE: Final = "/tandem/v1/generate"
"""POST `protocol.GenerateRequest`; streams JSON lines of `protocol.GenerateEvent`."""
PATH_STREAMS: Final = "/tandem/v1/streams"
"""Below it `/ID` of an answer, GET: `protocol.HeldStreams`. `/ID` of a stream with `?epoch=`,
DELETE: its client wants no more of it; attempts newer than that go on."""
PATH_WAKEABLE: Final = "/tandem/v1/wakeable"
"""POST `protocol.Wakeable` to a gateway; answers `protocol.GatewayState`. The bearer token is the
gateway pod's uid, as for `PATH_DRAIN`."""
PATH_PAGES: Final = "/tandem/v1/pages"
"""GET `?log=&seq=`: what changed of the pages of prefixes that a pod holds, a moment after it did
(`PageEvents`). With the token of `pod_token`."""
PATH_PEER_PAGES: Final = "/tandem/v1/pages/read"
"""POST `kv.tiers.peer.WantedPages` to a pod, by a pod of its revision, with the token of
`pod_token`: the leading ones of these pages that it holds, as records (kv/tiers/record.py)."""
PATH_CONTEXTS: Final = "/tandem/v1/contexts"
"""PUT `protocol.Context` to a pod (answers `protocol.ContextCopy`) or, with its uid as the bearer
token, to a gateway (answers `protocol.ContextState`): keep it, or that version of it. GET: all of
them, `protocol.ContextCopies` and `protocol.ContextStates`; below it `/ID`: a pod's
`protocol.Context`, a gateway's `protocol.ContextState` or null."""
PATH_FILE: Final = "/tandem/v1/file"
"""GET with `uri=pvc://CLAIM/PATH`: a text on a volume that the pod mounts, `protocol.FileText`."""
MAX_CONTEXT_BYTES: Final = 32 << 20
"""Of a text that is read for a context."""
PATH_TOKENIZER: Final = "/tandem/v1/tokenizer"
"""GET: `protocol.TokenizerBundle`, so that a gateway needs no access to weights."""

# -- HTTP headers ------------------------------------------------------------------------------
HEADER_TENANT: Final = "x-tandem-tenant"
DEFAULT_TENANT: Final = "default"
HEADER_STREAM: Final = "x-tandem-stream"
"""Of a response in server-sent events: the id under which a client can go on with it
(`GET /v1/streams/ID`) when its gateway is lost."""
HEADER_TRACE: Final = "x-tandem-trace"
"""Set to 1: the response carries a `tandem` object (pods, TTFT, TPOT, handoff, cached tokens)."""

# -- environment of a runtime pod ----------------------------------------------------------------
ENV_POD_NAME: Final = "TANDEM_POD_NAME"
ENV_POD_IP: Final = "TANDEM_POD_IP"
ENV_POD_UID: Final = "TANDEM_POD_UID"
ENV_NAMESPACE: Final = "TANDEM_NAMESPACE"
ENV_FLEET: Final = "TANDEM_FLEET"
ENV_REVISION: Final = "TANDEM_REVISION"
ENV_MEMORY_LIMIT_BYTES: Final = "TANDEM_MEMORY_LIMIT_BYTES"
ENV_CPU_LIMIT: Final = "TANDEM_CPU_LIMIT"
ENV_PRETEND_ACCELERATOR: Final = "TANDEM_PRETEND_ACCELERATOR"
"""Set by a local node agent that advertises GPUs it does not have: serve on the CPU instead."""

HANDOFF_SECRET_NAME: Final = "tandem-handoff"
HANDOFF_SECRET_KEY: Final = "key"
HANDOFF_SECRET_DIR: Final = "/var/run/tandem/handoff"
"""Where that Secret is mounted in runtime and gateway pods; the file is `key`."""

PVC_DIR: Final = "/mnt/tandem/pvc"
"""A model source pvc://CLAIM/path is the file PVC_DIR/CLAIM/path; the operator mounts the claim."""

ENV_MODEL_CACHE: Final = "TANDEM_MODEL_CACHE"
"""The folder that models of hf://, s3:// and https:// are fetched into."""
MODEL_CACHE_DIR: Final = "/var/cache/tandem/models"
"""Where the operator mounts that folder, unless a template sets `ENV_MODEL_CACHE`."""

ENV_REMOTE_TIER: Final = "TANDEM_REMOTE_TIER_"
"""Begins the names of the remote tier's credentials: the keys of the Secret that a fleet names."""
DISK_TIER_DIR: Final = "/var/cache/tandem/kv"
"""Where the operator mounts the volume of a fleet's Disk tier."""

TERMINATION_LOG: Final = "/dev/termination-log"
"""Where a pod that gives up leaves one sentence (or the resolver its JSON object)."""

GATEWAY_NAME: Final = "tandem-gateway"

KV_PAGE_TOKENS: Final = 256
"""Tokens in one canonical KV page (wire, host, disk, remote)."""
BLOCK_TOKENS: Final = 16
"""Tokens in one KV block on the accelerator, and the grain of prefix keys."""

EXIT_BAD_CONFIG: Final = 64
"""Exit status of a pod whose flags, weights or secret are wrong: a restart does not help."""

# -- what the data plane reports ------------------------------------------------------------------
METRIC_TTFT: Final = "vllm:time_to_first_token_seconds"
METRIC_TPOT: Final = "vllm:request_time_per_output_token_seconds"
METRIC_ITL: Final = "vllm:inter_token_latency_seconds"
METRIC_E2E: Final = "vllm:e2e_request_latency_seconds"
METRIC_QUEUE_TIME: Final = "vllm:request_queue_time_seconds"
METRIC_RUNNING: Final = "vllm:num_requests_running"
METRIC_WAITING: Final = "vllm:num_requests_waiting"
METRIC_KV_USAGE: Final = "vllm:kv_cache_usage_perc"
METRIC_CACHE_CONFIG: Final = "vllm:cache_config_info"
METRIC_PREEMPTIONS: Final = "vllm:num_preemptions"
METRIC_PROMPT_TOKENS: Final = "vllm:prompt_tokens"
METRIC_CACHED_TOKENS: Final = "vllm:prompt_tokens_cached"
METRIC_GENERATION_TOKENS: Final = "vllm:generation_tokens"
METRIC_REQUEST_SUCCESS: Final = "vllm:request_success"
METRIC_PREFIX_QUERIES: Final = "vllm:prefix_cache_queries"
METRIC_PREFIX_HITS: Final = "vllm:prefix_cache_hits"

TTFT_BUCKETS_S: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
"""vLLM's buckets, so that its dashboards and autoscaling rules work unchanged."""
TPOT_BUCKETS_S: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip


def pod_token(handoff_secret: bytes) -> str:
    """The bearer token of pod-internal requests (`PATH_GENERATE`, `PATH_TOKENIZER`).

    Derived, so that the secret itself never travels in a header.
    """
    return hmac.new(handoff_secret, b"tandem/v1/generate", hashlib.sha256).hexdigest()
