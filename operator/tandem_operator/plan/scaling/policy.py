"""What a pool's law may do and aims at. Defaults are those of docs/concepts/autoscaling.md."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tandem_operator.plan.scaling.schedule import Bounds, Schedule, bounds_at, lead_s
from tandem_operator.plan.scaling.window import Role

DEFAULT_TTFT_MS = 500.0
DEFAULT_TPOT_MS = 50.0


@dataclass(frozen=True)
class Policy:
    """The policy of one pool."""

    role: Role
    min_replicas: int
    max_replicas: int
    ttft_ms: float = DEFAULT_TTFT_MS
    """Target of the time to first token; the law of a decode pool does not look at it."""
    tpot_ms: float = DEFAULT_TPOT_MS
    """Target of the time per output token; the law of a prefill pool does not look at it."""
    high_percent: int = 95
    """Load over this share of what the replicas can take scales out."""
    low_percent: int = 75
    """A size is left for a smaller one only if that one's load stays under this share."""
    tolerance_percent: int = 10
    """A percentile over its target by less than this is no breach."""
    window_s: float = 60.0
    """Bursts of up to this length are provided for; also what a percentile is measured over."""
    hold_s: float | None = None
    """How long a need must be gone before the pool shrinks; None: two start-up times. A pod that is
    kept for one costs no more than one that must be started again; after two it seldom must."""
    startup_s: float = 100.0
    """Until a pod's own start-up has been measured."""
    forecast_percent: int = 90
    """What is likely a start-up time from now is provided for; at 90 work that misses its target is
    worth nine times the replicas that would have kept it. 0: only the load of now counts."""
    out_step: int = 8
    """Replicas that one decision adds at most; or out_step_percent of the size, if more."""
    out_step_percent: int = 100
    in_step: int = 1
    """Replicas that one decision removes at most; or in_step_percent of the size, if more."""
    in_step_percent: int = 25
    in_interval_s: float = 60.0
    """Between two decisions that remove replicas, at least."""
    idle_s: float | None = None
    """Without any request for that long a pool with min_replicas 0 goes to zero; None: never."""
    gpus_per_replica: int = 1
    """What the replica takes from a budget."""
    schedules: tuple[Schedule, ...] = ()
    """Windows with other bounds; the last one that is open counts."""
    min_from: str = ""
    """The schedule that min_replicas is of; "": none."""
    max_from: str = ""
    """Likewise."""

    def scheduled(self, now_s: float, startup_s: float, look_s: float) -> Policy:
        """The policy with the bounds that hold now, for a pod that takes `startup_s` to start and
        a next look in `look_s`."""
        if not self.schedules:
            return self
        own = Bounds(self.min_replicas, self.max_replicas)
        now = bounds_at(self.schedules, own, now_s, lead_s(startup_s, look_s))
        return replace(
            self,
            schedules=(),
            min_replicas=now.min_replicas,
            max_replicas=now.max_replicas,
            min_from=now.min_from,
            max_from=now.max_from,
        )

    @property
    def floor(self) -> int:
        """The size that traffic keeps."""
        return max(1, self.min_replicas)

    @property
    def target_ms(self) -> float:
        """The target that feedback watches first."""
        return self.tpot_ms if self.role == "decode" else self.ttft_ms

    def largest_out(self, size: int) -> int:
        """What one decision may add."""
        return max(self.out_step, size * self.out_step_percent // 100)

    def largest_in(self, size: int) -> int:
        """What one decision may remove."""
        return max(self.in_step, size * self.in_step_percent // 100)
