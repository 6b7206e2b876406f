"""The node's Lease in kube-node-lease: renewed as long as the agent lives.

When renewals stop (the agent was killed or stopped) the controller manager marks the node Unknown
after its grace period; nothing else tells it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

import aiohttp

from tandem.agent.api import Api, ApiError, Object
from tandem.agent.config import AgentConfig
from tandem.agent.node import micro_timestamp

FOLDER: Final = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
QUICK_RETRIES: Final = 5

log = logging.getLogger(__name__)


def lease(config: AgentConfig, node_uid: str, now_s: float) -> Object:
    """The Lease as a kubelet writes it, owned by its Node."""
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {
            "name": config.node,
            "namespace": "kube-node-lease",
            "ownerReferences": [
                {"apiVersion": "v1", "kind": "Node", "name": config.node, "uid": node_uid}
            ],
        },
        "spec": {
            "holderIdentity": config.node,
            "leaseDurationSeconds": config.lease_duration_s,
            "renewTime": micro_timestamp(now_s),
        },
    }


async def keep_lease(
    api: Api, config: AgentConfig, node_uid: str, clock: Callable[[], float]
) -> None:
    """Renews for ever; a failed renewal is tried again at once a few times, then next period."""
    failures = 0
    while True:
        try:
            await _renew(api, lease(config, node_uid, clock()))
            failures = 0
        except (ApiError, aiohttp.ClientError, TimeoutError) as error:
            failures += 1
            log.warning("lease: %s", error)
            if failures <= QUICK_RETRIES:
                await asyncio.sleep(min(1.0, config.lease_renew_s / 4))
                continue
        await asyncio.sleep(config.lease_renew_s)


async def _renew(api: Api, body: Object) -> None:
    path = f"{FOLDER}/{body['metadata']['name']}"
    try:
        await api.patch(path, {"spec": body["spec"]})
    except ApiError as error:
        if error.status != 404:
            raise
        await api.create(FOLDER, body)
