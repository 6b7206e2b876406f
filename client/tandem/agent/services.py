"""What all pods of a node share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tandem.agent.api import Api
from tandem.agent.cgroups import CpuCgroups
from tandem.agent.config import AgentConfig
from tandem.agent.events import EventRecorder
from tandem.agent.fields import Host
from tandem.agent.objects import ObjectReader
from tandem.agent.store import Store


@dataclass(frozen=True, slots=True)
class Services:
    """The node's connections and records."""

    api: Api
    config: AgentConfig
    host: Host
    store: Store
    events: EventRecorder
    objects: ObjectReader
    cgroups: CpuCgroups | None
    """None where the machine does not let us limit CPU."""
    clock: Callable[[], float]
    """Unix time in seconds."""
