"""The accelerator and the model that a paced pod pretends: `h100`, `h100:llama-3.1-70b`."""

from __future__ import annotations

from typing import Final

from tandem_runtime.roofline.errors import RooflineError
from tandem_runtime.roofline.gpus import find_gpu
from tandem_runtime.roofline.known import find_model
from tandem_runtime.roofline.model import ServedModel
from tandem_runtime.roofline.replica import Replica

DEFAULT_MODEL: Final = "llama-3.1-8b"
_WEIGHTS: Final = {"none": "bf16"}
_KV_CACHE: Final = {"auto": "bf16"}


def stated_replica(
    text: str, *, gpus: int, weights: str = "none", kv_cache: str = "auto"
) -> Replica:
    """The replica that `ACCELERATOR[:MODEL]` names.

    Args:
        text: an accelerator of the catalogue and a known model, or the path of a config.json.
        gpus: that share it.
        weights: of an engine's configuration: none for bf16.
        kv_cache: likewise: auto for bf16.

    Raises:
        RooflineError: unknown names, or a model that does not fit.
    """
    accelerator, _, model = text.partition(":")
    served = ServedModel(
        find_model(model or DEFAULT_MODEL),
        _WEIGHTS.get(weights, weights),
        _KV_CACHE.get(kv_cache, kv_cache),
    )
    replica = Replica(served, find_gpu(accelerator), gpus)
    if replica.kv_capacity_tokens < 1:
        raise RooflineError(
            f"{served.shape.name} leaves no room for KV on {gpus} {replica.gpu.name}: state a "
            "smaller model, or more accelerators a pod"
        )
    return replica
