"""Who decides a pool's size, and what it is (docs/design/replicas.md).

- `replicas` in the fleet: that number. Somebody else's write to the Pool is put back.
- `scaling`: minReplicas, until autoscaling exists; put back likewise.
- neither: the Pool's own spec.replicas, whoever wrote it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tandem_operator.api.fleet import PoolTemplate
from tandem_operator.names import MANAGER_SCALER


@dataclass(frozen=True)
class Size:
    """A pool's size."""

    replicas: int
    write: bool
    """The Pool says another number and has to be written."""
    overwritten_by: str | None = None
    """The field manager whose number is put back."""
    owner: str = ""
    """The field that decides, for the sentence that tells the other writer."""


def decide(pool: PoolTemplate, field: str, live: int, live_manager: str | None) -> Size:
    """The size of a pool whose live spec.replicas is `live`, written by `live_manager`.

    `field` is "prefill" or "decode". `live_manager` None means the schema's default: nobody wrote.
    """
    if pool.replicas is not None:
        wanted, owner = pool.replicas, f"spec.{field}.replicas"
    elif pool.scaling is not None:
        wanted, owner = pool.scaling.min_replicas, f"spec.{field}.scaling.minReplicas"
    else:
        return Size(live, write=False)
    foreign = live_manager not in (None, MANAGER_SCALER)
    write = live != wanted
    return Size(wanted, write, live_manager if write and foreign else None, owner)


def overwritten_note(size: Size, live: int, fleet: str) -> str:
    """What the writer who was put back has to know."""
    fields: dict[str, Any] = {"by": size.overwritten_by, "live": live, "size": size.replicas}
    return (
        "{by} set {live} replicas; {owner} of InferenceFleet {fleet} says {size}, and that is put "
        "back. Edit it there, or remove it to let others set the Pool's size"
    ).format(owner=size.owner, fleet=fleet, **fields)
