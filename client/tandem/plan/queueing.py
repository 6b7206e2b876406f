"""How long a request waits where several replicas share one queue.

Erlang's C formula is exact for Poisson arrivals and exponential service times; other service times
scale the wait by (1 + cv^2) / 2, cv being their coefficient of variation (Lee and Longton, 1959):
1 for exponential ones, 1/2 for prompts of one length.
"""

from __future__ import annotations

import math


def erlang_c(servers: int, offered: float) -> float:
    """The chance that an arrival waits; `offered` load in busy servers, below `servers`."""
    if offered <= 0:
        return 0.0
    blocked = 1.0
    for count in range(1, servers + 1):
        blocked = offered * blocked / (count + offered * blocked)
    busy = offered / servers
    return blocked / (1.0 - busy * (1.0 - blocked))


def wait_quantile_s(
    servers: int, arrivals_per_s: float, service_s: float, cv: float, quantile: float
) -> float:
    """The wait that a `quantile` of arrivals stays within; infinite where the queue only grows.

    W = (1 + cv^2) / 2 x service / (servers x (1 - busy)) x ln(C / (1 - quantile))
    """
    offered = arrivals_per_s * service_s
    if offered >= servers:
        return math.inf
    waits = erlang_c(servers, offered)
    if waits <= 1.0 - quantile:
        return 0.0
    mean_s = service_s / (servers - offered)
    return (1.0 + cv * cv) / 2.0 * mean_s * math.log(waits / (1.0 - quantile))
