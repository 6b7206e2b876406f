"""`python -m tandem_operator`: settings -> probes -> lease -> watch and act."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from typing import NoReturn

from tandem_operator.handlers.lifecycle import Leader
from tandem_operator.kube.client import ConfigException, connect
from tandem_operator.kube.lease import LeaderLease, LeaseLost
from tandem_operator.logs import configure_logging
from tandem_operator.metrics import Metrics
from tandem_operator.probes import Pulse, serve
from tandem_operator.runtime_pods import RuntimePods
from tandem_operator.settings import Settings, from_environment

log = logging.getLogger("tandem_operator")
LEASE = "tandem-operator"
EXIT_FAILED = 1
EXIT_BAD_SETTINGS = 2


async def run(settings: Settings) -> None:
    """Run until the process is told to end; with the lease lost, end it here."""
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
        on_attempt=lambda answered: _attempted(pulse, answered),
    )
    async with serve(pulse, metrics, settings.pod_ip, settings.http_port), RuntimePods() as pods:
        try:
            await lease.acquire()
            await Leader(settings, kube, pods, lease, metrics, pulse).run()
        except LeaseLost as error:
            log.error("%s; ending", error)
            _end()
        except Exception:
            log.exception("ending")
            _end()
        finally:
            await lease.release()
            await kube.close()


def _end() -> NoReturn:
    """End without any clean-up: another process may act already, or this one cannot be trusted.

    Nothing is lost by it. An operator that is killed at any moment goes on from what is observed.
    """
    logging.shutdown()
    os._exit(EXIT_FAILED)


def _attempted(pulse: Pulse, answered: bool) -> None:
    """The election's loop turned. That the API server is away is no reason to be restarted, but one
    not to be ready."""
    pulse.beat("lease")
    if answered:
        pulse.answered()


def main() -> int:
    """Entry point; 2 when the settings are wrong."""
    configure_logging()
    try:
        settings = from_environment(os.environ)
    except ValueError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_SETTINGS
    # Until Kopf takes the signals over, a standby just ends.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        asyncio.run(run(settings))
    except ConfigException as error:
        print(f"no cluster to connect to: {error}", file=sys.stderr)
        return EXIT_BAD_SETTINGS
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
