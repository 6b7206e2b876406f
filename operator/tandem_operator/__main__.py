"""`python -m tandem_operator`: settings -> probes -> lease -> watch and act."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time

from tandem_operator.handlers.lifecycle import Leader
from tandem_operator.kube.client import connect
from tandem_operator.kube.lease import LeaderLease, LeaseLost
from tandem_operator.logs import configure_logging
from tandem_operator.metrics import Metrics
from tandem_operator.probes import Pulse, serve
from tandem_operator.runtime_pods import RuntimePods
from tandem_operator.settings import Settings, from_environment

log = logging.getLogger("tandem_operator")
LEASE = "tandem-operator"


async def run(settings: Settings) -> None:
    """Run until the process is told to end. Raises LeaseLost."""
    metrics, pulse = Metrics(), Pulse(time.monotonic)
    identity = f"{settings.pod_name}_{settings.pod_uid or os.getpid()}"
    kube = await connect()
    lease = LeaderLease(
        kube,
        settings.namespace,
        LEASE,
        identity,
        settings.lease_duration_s,
        settings.lease_renew_s,
        time.monotonic,
        on_answer=lambda: _answered(pulse),
    )
    async with serve(pulse, metrics, settings.pod_ip, settings.http_port), RuntimePods() as pods:
        try:
            await lease.acquire()
            await Leader(settings, kube, pods, lease, metrics, pulse).run()
        finally:
            await lease.release()
            await kube.close()


def _answered(pulse: Pulse) -> None:
    """The API server answered: this process can act."""
    pulse.ready = True
    pulse.beat("lease")


def main() -> int:
    """Entry point. 1: the lease was lost, another process leads; 2: the settings are wrong."""
    configure_logging()
    try:
        settings = from_environment(os.environ)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    # Until Kopf takes the signals over, a standby just ends.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        asyncio.run(run(settings))
    except LeaseLost as error:
        log.error("%s; ending", error)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
