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
    """The names of each fleet of a namespace, by fleet. A fleet without a Model has none."""
    by_name = {model.name: model for model in models}
    holders: dict[str, str] = {}
    names = {}
    for fleet in sorted(fleets, key=lambda f: (f.created_s, f.name)):
        model = by_name.get(fleet.spec.model_ref.name)
        if model is None or fleet.deleting:
            names[fleet.name] = Names((), {})
            continue
        wanted = served_names(model.spec, model.name)
        taken = {name: holders[name] for name in wanted if name in holders}
        granted = tuple(name for name in wanted if name not in taken)
        holders |= dict.fromkeys(granted, fleet.name)
        names[fleet.name] = Names(granted, taken)
    return names
