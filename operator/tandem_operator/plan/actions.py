"""What a plan can ask for: the whole vocabulary of the operator's effects.

Actions are values. `kube.execute` carries them out in order; each names why it is done, and each
that destroys names the uid it means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tandem_runtime.protocol import Context, DrainRequest

from tandem_operator.names import Reason
from tandem_operator.resources import Ref

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Apply:
    """Server-side apply of a configuration that differs from what is live."""

    manifest: Manifest
    reason: Reason


@dataclass(frozen=True)
class Create:
    """POST once. An object of that name is success if `owner_uid` controls it and it stays."""

    manifest: Manifest
    reason: Reason
    owner_uid: str


@dataclass(frozen=True)
class CreateSecret:
    """POST of a Secret with random bytes, drawn when the action is carried out.

    It is never read: that it exists already is success.
    """

    manifest: Manifest
    key: str
    reason: Reason


@dataclass(frozen=True)
class Delete:
    """DELETE with the uid as precondition; an object that is gone already is success."""

    target: Ref
    reason: Reason
    grace_s: int | None = None
    """0: from the API alone, whatever still runs. None: the object's own."""


@dataclass(frozen=True)
class Evict:
    """Eviction of a pod, as far as the budgets that select it allow. A refusal is no failure: it is
    a fact of the next snapshot."""

    target: Ref
    reason: Reason


@dataclass(frozen=True)
class PatchNode:
    """Merge patch of a node, if its resourceVersion is still `version`."""

    target: Ref
    version: str
    change: Mapping[str, Any]
    reason: Reason


@dataclass(frozen=True)
class Annotate:
    """Merge patch of annotations; None removes one. Fails if the uid is another."""

    target: Ref
    annotations: Mapping[str, str | None]
    reason: Reason
    destructive: bool = False
    """It starts the end of the object."""


@dataclass(frozen=True)
class Renumber:
    """Sets the number of a ControllerRevision that became the newest again."""

    target: Ref
    number: int
    reason: Reason


@dataclass(frozen=True)
class Scale:
    """Writes a Pool's size through /scale."""

    target: Ref
    replicas: int
    reason: Reason


@dataclass(frozen=True)
class PostDrain:
    """Asks a runtime pod to empty itself, or to go on."""

    target: Ref
    host: str
    request: DrainRequest
    reason: Reason


@dataclass(frozen=True)
class PutContext:
    """Tells a gateway of a named context, or that one is deleted."""

    target: Ref
    host: str
    context: Context
    reason: Reason


@dataclass(frozen=True)
class CheckTemplate:
    """Dry-run create of a rendered pod; the answer is a fact of the next snapshot."""

    revision: str
    manifest: Manifest
    reason: Reason


@dataclass(frozen=True)
class WriteStatus:
    """Server-side apply of a whole status that differs from the live one."""

    target: Ref
    status: Mapping[str, Any]


@dataclass(frozen=True)
class Notify:
    """A Kubernetes Event on an object of the user's."""

    regarding: Ref
    type: Literal["Normal", "Warning"]
    reason: str
    note: str


Action = (
    Apply
    | Create
    | CreateSecret
    | Delete
    | Evict
    | PatchNode
    | Annotate
    | Renumber
    | Scale
    | PostDrain
    | PutContext
    | CheckTemplate
    | WriteStatus
    | Notify
)


@dataclass(frozen=True)
class Plan:
    """What to do now, in this order, and when to look again if nothing happens before."""

    actions: tuple[Action, ...] = ()
    requeue_after_s: float | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    """Numbers behind the decision, for the decision log."""

    @property
    def destructive(self) -> bool:
        """Whether it has to be planned again on what the API says now before it is carried out."""
        return any(is_destructive(action) for action in self.actions)


def is_destructive(action: Action) -> bool:
    """Whether the action ends something that may be serving."""
    match action:
        case Delete() | Evict() | PatchNode():
            return True
        case PostDrain(request=request):
            return request.mode != "cancel"
        case PutContext(context=context):
            return context.deleted
        case Annotate(destructive=destructive):
            return destructive
        case _:
            return False
