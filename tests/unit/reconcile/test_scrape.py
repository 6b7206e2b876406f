"""Gateways are asked, and a silent one is left out."""

from __future__ import annotations

import asyncio
from typing import Any

from tandem_operator.scrape import gateway_hosts, scrape, scrape_all
from tandem_runtime.protocol import FleetLatency, GatewayState


def pod(component: str, ip: str | None, phase: str = "Running") -> dict[str, Any]:
    status = {"phase": phase} | ({"podIP": ip} if ip else {})
    return {
        "metadata": {"labels": {"app.kubernetes.io/component": component}},
        "status": status,
    }


def test_only_running_gateways_are_asked() -> None:
    pods = [
        pod("gateway", "127.0.0.2"),
        pod("gateway", "127.0.0.1"),
        pod("gateway", None),
        pod("gateway", "127.0.0.3", phase="Failed"),
        pod("runtime", "127.0.0.4"),
    ]
    assert gateway_hosts(pods) == ["127.0.0.1", "127.0.0.2"]


class Gateways:
    """Three gateways, of which one is silent."""

    async def gateway(self, host: str) -> GatewayState:
        if host == "silent":
            raise OSError("refused")
        latency = FleetLatency(1, 0.1, 0.2, 0.01, 0.02)
        return GatewayState(host, True, 0, 0.0, {"chat": latency, host: latency})


async def test_reports_are_collected_by_fleet() -> None:
    reports = await scrape(Gateways(), ["a", "silent", "b"])
    assert {fleet: len(found) for fleet, found in reports.items()} == {"chat": 2, "a": 1, "b": 1}


async def test_silent_gateways_of_many_namespaces_do_not_add_up() -> None:
    """Else a few dozen of them make the loop look dead, and the operator is restarted."""

    class Slow(Gateways):
        async def gateway(self, host: str) -> GatewayState:
            await asyncio.sleep(0.3)
            return await super().gateway(host)

    hosts = {f"team-{i}": ["silent"] for i in range(100)} | {"good": ["a"]}
    reports = await asyncio.wait_for(scrape_all(Slow(), hosts), 15)
    assert reports["team-7"] == {}
    assert set(reports["good"]) == {"chat", "a"}
