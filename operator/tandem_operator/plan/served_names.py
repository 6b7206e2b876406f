"""Which fleet serves a name: in a namespace a name belongs to the oldest fleet that wants it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tandem_operator.api.model import served_names
from tandem_operator.plan.views import FleetView, ModelView


@dataclass(frozen=True)
class Names:
    """The names of one fleet."""

    granted: tuple[str, ...]
    taken: Mapping[str, str]
    """Names that an older fleet serves: name to that fleet."""


def assign(fleets: Sequence[FleetView], models: Sequence[ModelView]) -> dict[str, Names]:
    """The names of each fleet of a namespace, by fleet.

    A fleet whose Model is gone keeps the names that it had: its pods serve on.
    """
    by_name = {model.name: model for model in models}
    holders: dict[str, str] = {}
    names = {}
    for fleet in sorted(fleets, key=lambda f: (f.created_s, f.name)):
        model = by_name.get(fleet.spec.model_ref.name)
        if fleet.deleting:
            names[fleet.name] = Names((), {})
            continue
        had = fleet.status.served_names or ()
        wanted = served_names(model.spec, model.name) if model else had
        taken = {name: holders[name] for name in wanted if name in holders}
        granted = tuple(name for name in wanted if name not in taken)
        holders |= dict.fromkeys(granted, fleet.name)
        names[fleet.name] = Names(granted, taken)
    return names
