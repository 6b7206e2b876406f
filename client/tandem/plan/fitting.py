"""On how many GPUs of a node a model fits, and what it would take where it fits on none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tandem_runtime.roofline.replica import Replica

from tandem.plan.errors import PlanError
from tandem.plan.load import Load, Targets


def sizes_of_node(replica: Replica) -> list[int]:
    """Numbers of GPUs of one node that can share the model: what tensor parallelism allows."""
    most = replica.gpu.gpus_per_node
    return [size for size in replica.model.shape.tensor_parallel_sizes if size <= most]


def fitting_replicas(replica: Replica, load: Load) -> list[Replica]:
    """The replica at each size that holds the weights and at least one stream. Raises PlanError."""
    sizes = sizes_of_node(replica)
    candidates = [replace(replica, gpus=size) for size in sizes]
    fitting = [c for c in candidates if c.kv_capacity_tokens >= load.stream_tokens]
    if fitting:
        return fitting
    model, gpu = replica.model, replica.gpu
    weights = f"{model.weight_bytes / 1e9:,.0f} GB of {model.weights} weights"
    holds = (gpu.memory_bytes - replica.memory.reserve_bytes) / 1e9
    least = least_gpus(replica, load)
    raise PlanError(
        f"{model.shape.name} does not fit a node of {gpu.gpus_per_node} {gpu.name}: {weights} and "
        f"the KV of one stream of {load.stream_tokens:,} tokens need {least} GPUs of "
        f"{holds:.0f} GB usable each, which is {math.ceil(least / gpu.gpus_per_node)} nodes; "
        f"sizes that can share it within a node: {_listed(sizes)}. Use smaller weights "
        "(--weights fp8 or int4), a GPU with more memory, or --gpus-per-node for a larger "
        "NVLink domain"
    )


def least_gpus(replica: Replica, load: Load) -> int:
    """GPUs whose memory holds the weights and one stream's KV, however they share it."""
    model, memory = replica.model, replica.memory
    kv = load.stream_tokens * model.kv_token_bytes / memory.kv_share
    usable = replica.gpu.memory_bytes - memory.reserve_bytes
    return math.ceil((model.weight_bytes + kv) / usable)


def bandwidth_gpus(replica: Replica, targets: Targets) -> int:
    """GPUs whose data-sheet bandwidth streams the weights once for each token of one stream."""
    needed = replica.model.read_bytes(1) / targets.output_token_s
    return math.ceil(needed / replica.gpu.memory_bytes_per_s)


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes)) or "none"
