"""A pool of replicas: they start, serve, drain, fail, and cost money from creation to deletion."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from tandem_operator.plan.scaling.window import NO_STEPS

from tandem.simulate.engine import Engine
from tandem.simulate.engine_spec import EngineSpec
from tandem.simulate.requests import Requests

Role = Literal["prefill", "decode", "both"]


class Phase(StrEnum):
    """Of a replica."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


class PrefixCache:
    """Blocks of prompts that a replica has computed; the least recently used make room."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def leading(self, blocks: Sequence[int]) -> int:
        """How many blocks of the prompt's beginning are here."""
        count = 0
        for block in blocks:
            if block not in self._blocks:
                break
            count += 1
        return count

    def store(self, blocks: Sequence[int], most: int) -> None:
        """Keeps a prompt's blocks, at most `most` of all."""
        kept = self._blocks
        for block in blocks:
            kept[block] = None
            kept.move_to_end(block)
        while len(kept) > most:
            kept.popitem(last=False)


@dataclass
class ReplicaState:
    """One pod."""

    pool: str
    number: int
    engine: Engine
    created_s: float
    ready_s: float
    phase: Phase = Phase.STARTING
    gone_s: float | None = None
    cache: PrefixCache = field(default_factory=PrefixCache)
    startup_seen: bool = False


@dataclass(frozen=True)
class PoolSpec:
    """A pool as it is set up."""

    name: str
    role: Role
    engine: EngineSpec
    replicas: int
    """At the beginning, ready at once."""
    startup_s: float
    expiry_s: float


class PoolState:
    """The replicas of one pool."""

    def __init__(self, spec: PoolSpec, requests: Requests) -> None:
        self.spec = spec
        self._requests = requests
        self.size = spec.replicas
        """What the pool is asked to have."""
        self.replicas: list[ReplicaState] = []
        """That are not gone."""
        self.gone_replica_s = 0.0
        """Replica-seconds of those that are."""
        self._count = 0
        self.scale_events = 0
        self.sums = NO_STEPS
        """Steps since the last look, of replicas that are gone."""
        self.output_tokens = 0
        self.busy_s = 0.0
        for _ in range(spec.replicas):
            first = self.create(0.0, startup_s=0.0)
            first.phase, first.startup_seen = Phase.READY, True

    def create(self, now_s: float, startup_s: float) -> ReplicaState:
        """A new pod, which serves after its start-up."""
        replica = ReplicaState(
            pool=self.spec.name,
            number=self._count,
            engine=Engine(self.spec.engine, self._requests, self.spec.expiry_s),
            created_s=now_s,
            ready_s=now_s + startup_s,
        )
        self._count += 1
        self.replicas.append(replica)
        return replica

    def of_phase(self, phase: Phase) -> list[ReplicaState]:
        return [replica for replica in self.replicas if replica.phase is phase]

    @property
    def live(self) -> list[ReplicaState]:
        """That count towards the size."""
        return [r for r in self.replicas if r.phase is not Phase.DRAINING]

    def victims(self, count: int) -> list[ReplicaState]:
        """Who leaves: the youngest that do not serve yet, then those with the least to lose."""

        def loss(replica: ReplicaState) -> tuple[int, int, int]:
            if replica.phase is Phase.STARTING:
                return 0, -replica.number, 0
            return 1, replica.engine.streams, replica.engine.outstanding_tokens

        return sorted(self.live, key=loss)[:count]

    def end(self, replica: ReplicaState, now_s: float) -> None:
        """The pod is deleted."""
        replica.phase, replica.gone_s = Phase.GONE, now_s
        self.gone_replica_s += now_s - replica.created_s
        self.replicas.remove(replica)
        self.collect(replica)

    def collect(self, replica: ReplicaState) -> None:
        """Moves what a replica's engine has counted to the pool."""
        engine = replica.engine
        self.sums += engine.sums
        self.output_tokens += engine.output_tokens
        self.busy_s += engine.busy_s
        engine.sums, engine.output_tokens, engine.busy_s = NO_STEPS, 0, 0.0

    def replica_s(self, now_s: float) -> float:
        """Replica-seconds until now, start-ups and drains included."""
        return self.gone_replica_s + sum(now_s - replica.created_s for replica in self.replicas)

    def cache_blocks(self, replica: ReplicaState, block_tokens: int) -> int:
        """How many blocks fit beside what runs."""
        engine = replica.engine
        free = engine.spec.capacity_tokens - engine.context_tokens - engine.joining_tokens
        return max(free, 0) // block_tokens
