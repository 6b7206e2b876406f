"""`python -m tandem.agent FILE`: the agent of one node, told by FILE (`config.AgentConfig`)."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import signal
import sys
import time
from pathlib import Path

from tandem.agent.api import Api, Credentials
from tandem.agent.cgroups import CpuCgroups
from tandem.agent.config import AgentConfig
from tandem.agent.events import EventRecorder
from tandem.agent.fields import Host
from tandem.agent.lease import keep_lease
from tandem.agent.node import Machine, NodeReporter, capacity, labels
from tandem.agent.objects import ObjectReader
from tandem.agent.pods import Pods
from tandem.agent.server import NodeServer
from tandem.agent.services import Services
from tandem.agent.store import Store


async def run(config: AgentConfig) -> None:
    """Runs the node until SIGTERM. Its containers stay: the next agent adopts them."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    credentials = Credentials(
        config.api_url,
        Path(config.ca),
        Path(config.client_certificate),
        Path(config.client_key),
    )
    machine = Machine.read()
    async with Api.connect(credentials, user_agent=f"tandem-agent/{config.node}") as api:
        reporter = NodeReporter(api, config, machine, time.time)
        node_uid = await reporter.register()
        services = Services(
            api=api,
            config=config,
            host=Host(config.node, config.node_ip, machine.cpus, machine.memory_bytes),
            store=Store(Path(config.folder)),
            events=EventRecorder(api, config.node, time.time),
            objects=ObjectReader(api),
            cgroups=CpuCgroups.create(config.cluster, config.node),
            clock=time.time,
        )
        pods = Pods(services, capacity(config, machine), labels(config))
        server = await NodeServer(config, pods).start()
        tasks = [
            asyncio.create_task(keep_lease(api, config, node_uid, time.time)),
            asyncio.create_task(reporter.run()),
            asyncio.create_task(services.events.run()),
            asyncio.create_task(pods.run()),
            asyncio.create_task(stop.wait()),
        ]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        await server.cleanup()
        for task in done:
            task.result()


def main() -> None:
    """Entry point: one agent a node folder."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    config = AgentConfig.read(Path(sys.argv[1]))
    with (Path(config.folder) / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another agent of {config.node} runs already")
        asyncio.run(run(config))


if __name__ == "__main__":
    main()
