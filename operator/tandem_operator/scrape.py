"""Polls the gateways for the latencies of the fleets that they serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tandem_runtime.protocol import FleetLatency, GatewayState

from tandem_operator.plan.gateway import gateway_pods

log = logging.getLogger(__name__)
Body = Mapping[str, Any]


class GatewaySource(Protocol):
    """Asks gateways."""

    async def gateway(self, host: str) -> GatewayState:
        """Raises OSError when it does not answer."""


def gateway_hosts(pods: Sequence[Body]) -> list[str]:
    """Addresses of the gateway pods that can be asked."""
    return sorted(gateways(pods))


def gateways(pods: Sequence[Body]) -> dict[str, str]:
    """Uids of those pods by their addresses."""
    return {pod.host: pod.uid for pod in gateway_pods(pods)}


async def scrape_all(
    source: GatewaySource, hosts: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, list[FleetLatency]]]:
    """Every namespace's reports, asked at the same time: silent gateways do not add up."""
    reports = await asyncio.gather(*(scrape(source, hosts[namespace]) for namespace in hosts))
    return dict(zip(hosts, reports, strict=True))


async def scrape(source: GatewaySource, hosts: Sequence[str]) -> dict[str, list[FleetLatency]]:
    """Every fleet's reports, one for each gateway that answered."""

    async def ask(host: str) -> Mapping[str, FleetLatency]:
        try:
            return (await source.gateway(host)).fleets
        except OSError as error:
            log.info("gateway does not answer: %s", error)
            return {}

    reports: dict[str, list[FleetLatency]] = {}
    for answer in await asyncio.gather(*(ask(host) for host in hosts)):
        for fleet, latency in answer.items():
            reports.setdefault(fleet, []).append(latency)
    return reports
