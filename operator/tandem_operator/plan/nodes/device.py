"""Whether a pod's device is slow by itself: its micro-benchmark beside that of its peers.

What a pod measures between its steps (`ProbeSums`) is the same work on every pod, so no model of
it is needed: the rate of one over the median of all. It sees the device alone, not the host, the
links to other devices or the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tandem_runtime.device_report import ProbeSums

LEAST, MOST = 1e-9, 1e30
"""Of what devices can have done, and seconds: whoever may make pods chooses what they say."""


@dataclass(frozen=True)
class Probed:
    """What a device did in one window."""

    copy_bytes_per_s: float
    matmul_flop_per_s: float


@dataclass(frozen=True)
class DeviceRatio:
    """One device's rates over the median of its peers and itself."""

    copy: float
    matmul: float

    @property
    def least(self) -> float:
        return min(self.copy, self.matmul)

    @property
    def sentence(self) -> str:
        return f"copy bandwidth {self.copy:.2f}x, matmul rate {self.matmul:.2f}x"


def probed_since(now: ProbeSums, past: ProbeSums) -> Probed | None:
    """What a pod measured between two looks; None: nothing, or nothing that can be."""
    spent = (now.copy_s - past.copy_s, now.matmul_s - past.matmul_s)
    done = (now.copied_bytes - past.copied_bytes, now.flop - past.flop)
    if now.runs <= past.runs or not all(LEAST <= value <= MOST for value in (*spent, *done)):
        return None
    return Probed(done[0] / spent[0], done[1] / spent[1])


def device_ratio(
    windows: Mapping[str, Sequence[Probed | None]], uid: str, least_pods: int
) -> DeviceRatio | None:
    """The rates of a pod over the median of its group, each pod's own the median of its windows.

    `windows`: by uid, the last ones. None where too few have measured, or it has not.
    """
    rates = {pod: found for pod, seen in windows.items() if (found := _middle(seen)) is not None}
    if uid not in rates or len(rates) < least_pods:
        return None
    copy = median(rate.copy_bytes_per_s for rate in rates.values())
    matmul = median(rate.matmul_flop_per_s for rate in rates.values())
    own = rates[uid]
    return DeviceRatio(own.copy_bytes_per_s / copy, own.matmul_flop_per_s / matmul)


def _middle(seen: Sequence[Probed | None]) -> Probed | None:
    there = [probed for probed in seen if probed is not None]
    if 2 * len(there) < len(seen) or not there:
        return None
    return Probed(
        median(probed.copy_bytes_per_s for probed in there),
        median(probed.matmul_flop_per_s for probed in there),
    )
