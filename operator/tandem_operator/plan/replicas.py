"""Who decides a pool's size, and what it is (docs/design/replicas.md).

- `replicas` in the fleet: that number. Somebody else's write to the Pool is put back.
- `scaling`: what the policy last decided for the size that is live; else it stays as it is.
- neither: the Pool's own spec.replicas, whoever wrote it.

A write is somebody else's when the Pool's size differs from what was decided before and the
decision is the same: the API server does not record who writes a custom resource's /scale.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem_operator.api.fleet import PoolTemplate


@dataclass(frozen=True)
class Size:
    """A pool's size."""

    replicas: int
    write: bool = False
    """The Pool says another number and has to be written."""
    overwritten: bool = False
    """What the Pool says was written by somebody else."""
    owner: str | None = None
    """The field that decides; None when the Pool's own size counts."""


def decide(
    pool: PoolTemplate, field: str, live: int, decided: int | None, scaled: int | None = None
) -> Size:
    """The size of a pool whose live spec.replicas is `live`.

    `field` is "prefill" or "decode"; `decided` is the last size that was decided here, None if
    the Pool's own counted; `scaled` what the policy of an autoscaled pool says, None if nothing.
    """
    if pool.replicas is not None:
        wanted, owner = pool.replicas, f"spec.{field}.replicas"
        write = live != wanted
        return Size(wanted, write, overwritten=write and decided == wanted, owner=owner)
    if pool.scaling is not None:
        # Another's write is the autoscaler's to notice: it knows what it found at its last look.
        wanted = live if scaled is None else scaled
        return Size(wanted, write=live != wanted, owner=f"spec.{field}.scaling")
    return Size(live)


def overwritten_note(size: Size, pool: str, live: int, fleet: str) -> str:
    """What the writer who was put back has to know."""
    return (
        f"Pool {pool} was set to {live} replicas and is put back to {size.replicas}, which "
        f"{size.owner} of InferenceFleet {fleet} says: edit it there, or remove it to let others "
        "set the Pool's size"
    )
