"""What a Model's source asks of a pod that reads it: volumes, mounts, environment, flags."""

from __future__ import annotations

from typing import Any

from tandem_runtime.contract import ENV_MODEL_CACHE, MODEL_CACHE_DIR, PVC_DIR

from tandem_operator.api.model import FETCHED_SCHEMES, Quantization
from tandem_operator.plan.actions import Manifest


def is_fetched(uri: str) -> bool:
    """Whether the pod itself fetches the weights from elsewhere."""
    return uri.split("://", 1)[0] in FETCHED_SCHEMES


def quantization_args(quantization: Quantization) -> list[str]:
    """Flags of the runtime; none where nothing is quantised."""
    asked: dict[str, str] = {
        "--weights": quantization.weights,
        "--kv-cache": quantization.kv_cache,
    }
    usual = (Quantization().weights, Quantization().kv_cache)
    pairs = [(flag, value) for flag, value in asked.items() if value not in usual]
    pairs += [("--weights-exclude", kind) for kind in quantization.exclude]
    return [word for pair in pairs for word in pair]


def weights_volumes(uri: str) -> list[Manifest]:
    """The volume that holds the weights, or will."""
    if is_fetched(uri):
        return [{"name": "weights", "emptyDir": {}}]
    claim = _claim(uri)
    source = {"claimName": claim, "readOnly": True}
    return [{"name": "weights", "persistentVolumeClaim": source}] if claim else []


def weights_mounts(uri: str) -> list[Manifest]:
    """Where the runtime looks for them."""
    if is_fetched(uri):
        return [{"name": "weights", "mountPath": MODEL_CACHE_DIR}]
    claim = _claim(uri)
    path = f"{PVC_DIR}/{claim}"
    return [{"name": "weights", "mountPath": path, "readOnly": True}] if claim else []


def weights_environment(uri: str, secret: str | None) -> dict[str, Any]:
    """`env` entries, and `envFrom` of the Secret: fields of a container that start with these."""
    if not is_fetched(uri):
        return {"env": []}
    # The Hub's library keeps notes of its own, by default in a home that may not be writable.
    places = {ENV_MODEL_CACHE: MODEL_CACHE_DIR, "HF_HOME": f"{MODEL_CACHE_DIR}/home"}
    environment: dict[str, Any] = {"env": [{"name": n, "value": v} for n, v in places.items()]}
    return environment | ({"envFrom": [{"secretRef": {"name": secret}}]} if secret else {})


def _claim(uri: str) -> str | None:
    """CLAIM of pvc://CLAIM/PATH."""
    return uri.removeprefix("pvc://").split("/", 1)[0] if uri.startswith("pvc://") else None
