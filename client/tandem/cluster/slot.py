"""A cluster's claim on a part of the loopback network.

The claim is a bound abstract Unix socket: those belong to a network namespace exactly as loopback
addresses do, and the kernel frees them when the last process that holds them ends, however it
ends. The socket is handed on to the supervisor, so the claim lives as long as the cluster.
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass

from tandem.cluster.spec import SLOTS, Network


class NoSlotError(RuntimeError):
    """Every slot is taken."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A claimed slot; lives until every copy of `handle` is closed."""

    network: Network
    handle: socket.socket


def claim_slot(*, loopback: bool = True) -> Claim:
    """Claims the first free slot whose addresses nobody else listens on.

    Raises:
        NoSlotError: all are taken.
    """
    for slot in SLOTS:
        handle = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            handle.bind(f"\0tandem-cluster-slot-{slot}")
        except OSError as error:
            handle.close()
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        network = Network(slot, loopback)
        if all(_is_free(network.host, port) for port in (network.api_port, network.etcd_port)):
            return Claim(network, handle)
        handle.close()
    raise NoSlotError(
        f"all {len(SLOTS)} slots for clusters on this machine are taken: "
        "end one with `tandem down --name NAME`"
    )


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
