"""Replacing pods by those of a new revision: a pure function of what is observed.

`next_step` sees every pool of a fleet at once, since a revision serves only with a Ready prefill
and a Ready decode pod. No step counter is stored: the step follows from the pods, so a restarted
operator continues.

Words. A pool of `size` pods moves to revision `target`; `serving` is the revision that was last
rolled out completely. A pod is *leaving* once it drains. A revision is *routable* when the gateway
would use it (docs/design/request-path.md); a Ready pod counts as *available* only in a routable
revision.

Invariants, each tested:
1. No step makes the available pods of a pool fewer than size - maxUnavailable. Where a new pod
   waits for resources that only an old pod can give up, and size > 1, the floor is size - 1.
2. Pods of a pool never exceed size + maxSurge while two revisions exist.
3. Until the target is routable (*unproven*), lost pods come back in the serving revision, and at
   most maxSurge + maxUnavailable (at least one) pods of the target exist.
4. A broken pod of the target halts: nothing more leaves or is made of the target, and the serving
   revision is refilled.
5. The last prefill pod of a revision stays until its decode pods are gone.
6. A Ready pod whose node is to be drained (*displaced*) leaves only when size - maxUnavailable
   others are available, room or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Member:
    """A pod of a pool as the rollout sees it; terminating and finished pods are not members."""

    name: str
    revision: str
    ready: bool = False
    leaving: bool = False
    broken: bool = False
    starved: bool = False
    """No node has the resources that it wants."""
    alone: bool = False
    """It needs no prefill partner (role both)."""
    in_flight: int = 0
    slot: int = 0
    displaced: bool = False
    """Its node is to be drained: it serves until another pod has taken its place."""


@dataclass(frozen=True)
class PoolState:
    """One pool before a step."""

    role: str
    size: int
    target: str
    serving: str | None
    max_surge: int
    max_unavailable: int
    members: tuple[Member, ...] = ()

    @property
    def active(self) -> list[Member]:
        return [m for m in self.members if not m.leaving]

    @property
    def new(self) -> list[Member]:
        """Those that are to stay."""
        return [m for m in self.active if m.revision == self.target and not m.displaced]

    @property
    def old(self) -> list[Member]:
        return [m for m in self.active if m.revision != self.target]


@dataclass(frozen=True)
class PoolStep:
    """What happens to one pool now."""

    create: tuple[str, ...] = ()
    """The revision of each pod to make."""
    leave: tuple[str, ...] = ()
    """Names of pods that have to go."""
    stay: tuple[str, ...] = ()
    """Names of leaving pods that are wanted again."""
    displaced: tuple[str, ...] = ()
    """Of those that leave, the ones whose node is to be drained."""


@dataclass(frozen=True)
class Step:
    """What happens to a fleet now."""

    pools: tuple[PoolStep, ...]
    rolling: bool
    """Two revisions exist, or the target is not the one that was last rolled out."""
    halted: bool
    proven: bool
    """The target is routable."""

    @property
    def idle(self) -> bool:
        return all(step == PoolStep() for step in self.pools)


def routable(pools: Sequence[PoolState]) -> frozenset[str]:
    """The revisions that the gateway uses, by Ready pods that admit.

    Those with a Ready decode pod and, unless that does both, a Ready prefill pod; if there is
    none, every one with a Ready decode pod (it prefills for itself).
    """
    prefill = {m.revision for p in pools if p.role == "prefill" for m in p.active if m.ready}
    decode = [m for p in pools if p.role != "prefill" for m in p.active if m.ready]
    paired = frozenset(m.revision for m in decode if m.alone or m.revision in prefill)
    return paired or frozenset(m.revision for m in decode)


def _proven(pools: Sequence[PoolState]) -> bool:
    """Whether every pool that should have pods has a Ready one of the target."""
    return all(
        any(m.ready and m.revision == p.target for m in p.active) for p in pools if p.size > 0
    )


def _rolling(pools: Sequence[PoolState]) -> bool:
    return any(
        p.serving not in (None, p.target) or any(m.revision != p.target for m in p.members)
        for p in pools
    )


def complete(pools: Sequence[PoolState]) -> bool:
    """Whether the target alone serves, at full size. While all pools sleep nothing is known of it:
    what served before is what comes back, should the target turn out not to."""
    return (
        any(p.size > 0 for p in pools)
        and all(
            all(m.revision == p.target for m in p.members)
            and sum(m.ready for m in p.new) >= p.size - p.max_unavailable
            for p in pools
        )
        and _proven(pools)
    )


def next_step(pools: Sequence[PoolState]) -> Step:
    """The next step of a fleet whose pools are given in any order."""
    pools = _with_serving(pools)
    rolling, proven = _rolling(pools), _proven(pools)
    halted = rolling and any(m.broken for p in pools for m in p.new)
    states = list(pools)
    steps = [PoolStep()] * len(states)
    # Decode first: whether a prefill pod may go depends on the decode pods that are left.
    for i in sorted(range(len(states)), key=lambda i: states[i].role == "prefill"):
        leave = _leave(states[i], states, rolling, halted, proven)
        states[i] = _with_leaving(states[i], leave)
        stay, create = _refill(states[i], rolling, halted, proven)
        displaced = {m.name for m in states[i].members if m.displaced}
        steps[i] = PoolStep(create, tuple(leave), stay, tuple(n for n in leave if n in displaced))
    return Step(tuple(steps), rolling, halted, proven)


def _with_serving(pools: Sequence[PoolState]) -> list[PoolState]:
    """Where nothing was ever rolled out completely, what serves most is kept serving.

    Else several unfinished revisions could hold each other: each with pods that the others' floors
    need, and together all the room there is.
    """
    served = routable(pools) - {p.target for p in pools}
    if not served or any(p.serving is not None for p in pools):
        return list(pools)
    pods = Counter(m.revision for p in pools for m in p.active if m.ready)
    most = max(served, key=lambda revision: (pods[revision], revision))
    return [replace(p, serving=most) for p in pools]


def _with_leaving(pool: PoolState, names: Sequence[str]) -> PoolState:
    members = tuple(replace(m, leaving=m.leaving or m.name in names) for m in pool.members)
    return replace(pool, members=members)


# -- who goes --------------------------------------------------------------------------------------


def _departure_order(pool: PoolState, members: Sequence[Member]) -> list[Member]:
    """Who goes first: not Ready, then neither serving nor target, then the least to lose."""
    return sorted(
        members,
        key=lambda m: (
            m.ready,
            m.revision in (pool.serving, pool.target),
            m.revision == pool.target,
            m.in_flight,
            -m.slot,
        ),
    )


def _leave(
    pool: PoolState, pools: Sequence[PoolState], rolling: bool, halted: bool, proven: bool
) -> list[str]:
    """Names of the pods that go now, in order."""
    surplus = len(pool.new) - pool.size
    leaving = [m.name for m in _departure_order(pool, pool.new)[: max(0, surplus)]]
    others = [p for p in pools if p is not pool]
    displaced = [m for m in pool.active if m.displaced and m.revision == pool.target]
    for member in _departure_order(pool, displaced):
        if _has_made_way(_with_leaving(pool, leaving), member, others):
            leaving.append(member.name)
    if not rolling:
        return leaving
    for member in _departure_order(pool, pool.old):
        now = _with_leaving(pool, leaving)
        if _may_leave(now, member, others, halted, proven):
            leaving.append(member.name)
    return leaving


def _has_made_way(pool: PoolState, member: Member, others: Sequence[PoolState]) -> bool:
    """Whether a displaced pod of the target may go: others serve in its stead, or none is to."""
    if not member.ready or pool.size == 0:
        return True
    after_pool = _with_leaving(pool, [member.name])
    after = routable([after_pool, *others])
    enough = _available(after_pool, after) >= pool.size - pool.max_unavailable
    return enough and _partner_stays(pool, member, others) and _covered(pool, others, after)


def _may_leave(
    pool: PoolState, member: Member, others: Sequence[PoolState], halted: bool, proven: bool
) -> bool:
    """Whether an old pod may go in this step, after those that already do."""
    abandoned = member.revision != pool.serving
    if abandoned and not member.ready:
        return True
    retired = pool.role == "prefill" and any(other.role == "both" for other in others)
    if retired and not _partner_stays(pool, member, others):
        return False
    before = routable([pool, *others])
    after_pool = _with_leaving(pool, [member.name])
    after = routable([after_pool, *others])
    in_place = _replaces_in_place(pool, others)
    if not (proven or abandoned or in_place) or halted:
        # Nothing of the target serves: the serving revision only shrinks to the pool's size.
        # Displaced pods will go: others of it that took their place do not count as too many.
        kept = sum(
            m.revision == pool.serving and (member.displaced or not m.displaced)
            for m in after_pool.active
        )
        if member.revision == pool.serving and kept < pool.size:
            return False  # Not Ready yet, it may be a pod that was made to take another's place.
        return _available(after_pool, after) >= pool.size and _covered(pool, others, after)
    if not in_place and not _partner_stays(pool, member, others):
        return False
    if not member.ready:
        return True
    if member.revision not in before and not abandoned:
        # The first prefill pod of the target may just have woken. Where the old revision's own does
        # not follow, its pods are replaced one by one all the same.
        return sum(m.ready for m in after_pool.active) >= _floor(pool)
    if member.revision not in before:
        return True
    return _available(after_pool, after) >= _floor(pool) and _covered(pool, others, after)


def _available(pool: PoolState, revisions: frozenset[str]) -> int:
    return sum(m.ready and m.revision in revisions for m in pool.active)


def _floor(pool: PoolState) -> int:
    """How many pods have to be available at least."""
    slack = 1 if _starved(pool) and pool.size > 1 else 0
    return pool.size - max(pool.max_unavailable, slack)


def _covered(pool: PoolState, others: Sequence[PoolState], after: frozenset[str]) -> bool:
    """Whether the other pools keep their floor when `after` are the routable revisions.

    Taking the last decode pod of a revision takes its prefill pods out of routing too. Where the
    decode pool's own floor lets it serve nothing for a while, prefill has nothing to keep up.
    """
    if pool.role == "prefill" or not after:
        return True
    before = routable([pool, *others])
    return all(
        _available(other, after) >= min(_floor(other), _available(other, before))
        for other in others
    )


def _starved(pool: PoolState) -> bool:
    return any(m.starved for m in pool.new)


def _replaces_in_place(pool: PoolState, others: Sequence[PoolState]) -> bool:
    """Whether an old pod has to go before a new one can come.

    Either maxSurge leaves no room, or no node has room and the pool has more than one pod. A pool
    whose partner waits for room that it cannot make itself waits too.
    """
    room = pool.size + pool.max_surge - len(pool.members)
    if not pool.new and room <= 0 and pool.max_surge == 0:
        return True
    stuck = any(_starved(other) and other.size <= 1 for other in others)
    return _starved(pool) and pool.size > 1 and not stuck


def _partner_stays(pool: PoolState, member: Member, others: Sequence[PoolState]) -> bool:
    """Whether a prefill pod may go without leaving its revision's decode pods too few partners.

    Old prefill pods go in proportion to old decode pods, at most one share ahead, and the last
    only after them.
    """
    if pool.role != "prefill":
        return True
    decode = next((p for p in others if p.role != "prefill"), None)
    if decode is None:
        return True
    partners = sum(m.revision == member.revision for m in decode.members)
    if not partners:
        return True
    mates = sum(m.revision == member.revision for m in pool.active)
    size = max(pool.size, 1)
    return mates > max(1, (partners - 1) * size // max(decode.size, 1))


# -- who comes -------------------------------------------------------------------------------------


def _refill(
    pool: PoolState, rolling: bool, halted: bool, proven: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names that stay after all, and the revisions of pods to make."""
    guarded = rolling and not proven and pool.serving not in (None, pool.target)
    kept_back = halted and pool.serving not in (None, pool.target)
    wanted = max(0, pool.size - len(pool.new))
    if kept_back:
        wanted = 0
    elif guarded:
        wanted = min(wanted, max(1, pool.max_surge + pool.max_unavailable) - len(pool.new))
    room = _room(pool) if rolling else wanted
    # What serves comes first: without it, the pods of other revisions may not leave either.
    back = max(0, min(_missing(pool, halted), room)) if guarded or kept_back else 0
    count = max(0, min(wanted, room - back))
    stay: tuple[str, ...] = ()
    create: tuple[str, ...] = ()
    for revision, number in ((pool.target, count), (pool.serving or "", back)):
        returning = _returning(pool, revision, number)
        stay += returning
        create += (revision,) * (number - len(returning))
    return stay, create


def _room(pool: PoolState) -> int:
    """How many more pods may exist while two revisions do.

    Pods of the target that leave (a scale-in) do not count: a long drain must not keep a lost pod
    from being replaced.
    """
    leaving = sum(m.leaving and m.revision != pool.target for m in pool.members)
    return pool.size + pool.max_surge - len(pool.active) - leaving


def _missing(pool: PoolState, halted: bool) -> int:
    """Pods of the serving revision that have to come back while the target is unproven."""
    serving = sum(m.revision == pool.serving and not m.displaced for m in pool.active)
    ready_new = sum(m.ready for m in pool.new)
    allowance = 0 if halted else pool.max_unavailable + (_starved(pool) and pool.size > 1)
    return pool.size - serving - ready_new - allowance


def _returning(pool: PoolState, revision: str, count: int) -> tuple[str, ...]:
    """Leaving pods of a revision that serve again instead of making new ones."""
    gone = [m for m in pool.members if m.leaving and m.ready and not m.displaced]
    able = [m for m in gone if m.revision == revision]
    return tuple(m.name for m in sorted(able, key=lambda m: m.slot)[:count])
