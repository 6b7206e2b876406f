"""Carries out a plan's actions in order, and says how each went.

An action fails alone: the others are independent or will be planned again. Only what follows on
the same object is skipped, since it was planned to come after.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from tandem_runtime.protocol import Context, ContextState, DrainRequest, PodState

from tandem_operator.kube.client import ApiError, Kube
from tandem_operator.names import MANAGER, MANAGER_SCALER, MANAGER_STATUS, Reason
from tandem_operator.plan.actions import (
    Action,
    Annotate,
    Apply,
    CheckTemplate,
    Create,
    CreateSecret,
    Delete,
    Evict,
    Notify,
    PatchNode,
    Plan,
    PostDrain,
    PutContext,
    Renumber,
    Scale,
    WriteStatus,
)
from tandem_operator.plan.views import TemplateCheck, controller_uid
from tandem_operator.resources import Ref, ref_of

SECRET_BYTES = 32


class Drainer(Protocol):
    """Talks to runtime pods."""

    async def drain(self, host: str, uid: str, request: DrainRequest) -> PodState:
        """POST to the drain hook of the pod of this uid. Raises OSError when it does not answer."""

    async def put_context(self, host: str, uid: str, context: Context) -> ContextState:
        """Tell the gateway of this uid of a context. Raises OSError when it does not answer."""


class Recorder(Protocol):
    """Publishes Events."""

    async def record(self, event: Notify) -> None:
        """Publish, or drop a repetition. Never raises."""


@dataclass(frozen=True)
class Outcome:
    """How one action went."""

    action: Action
    error: str | None = None
    """A sentence; None when it was carried out, or had been already."""
    refusal: str | None = None
    """Why an eviction is not allowed now, which is no error."""
    check: TemplateCheck | None = None
    """The API server's answer to a CheckTemplate."""


class Executor:
    """Carries out plans."""

    def __init__(
        self,
        kube: Kube,
        drainer: Drainer,
        recorder: Recorder,
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._kube = kube
        self._drainer = drainer
        self._recorder = recorder
        self._random_bytes = random_bytes

    async def execute(self, plan: Plan) -> list[Outcome]:
        """Every action in order. A failed one is in its Outcome; nothing is raised.

        Ends early, and without a failure, where the namespace is being deleted.
        """
        outcomes: list[Outcome] = []
        failed: set[Ref] = set()
        for action in plan.actions:
            target = _target(action)
            if target in failed and not isinstance(action, WriteStatus):
                continue
            outcome = await self._attempt(action)
            if outcome is None:
                break
            outcomes.append(outcome)
            if outcome.error and target is not None:
                failed.add(target)
        return outcomes

    async def _attempt(self, action: Action) -> Outcome | None:
        """None: the namespace is going, and takes with it whatever there is."""
        try:
            if isinstance(action, CheckTemplate):
                return Outcome(action, check=await self._check(action))
            await self._carry_out(action)
        except ApiError as error:
            if error.namespace_terminating:
                return None
            if isinstance(action, Create) and error.status == 409:
                return await self._taken(action)
            if isinstance(action, Evict) and _is_refusal(error):
                return Outcome(action, refusal=str(error))
            if not _done_already(action, error):
                return Outcome(action, str(error))
        except (OSError, TimeoutError) as error:
            return Outcome(action, f"{type(error).__name__}: {error}")
        return Outcome(action)

    async def _carry_out(self, action: Action) -> None:
        match action:
            case Apply(manifest):
                await self._kube.apply(manifest, manager=MANAGER)
            case Create(manifest):
                await self._kube.create(manifest, manager=MANAGER)
            case CreateSecret():
                await self._kube.create(self._filled(action), manager=MANAGER)
            case Delete(target, grace_s=grace_s):
                await self._kube.delete(target, grace_s=grace_s)
            case Evict(target):
                await self._kube.evict(target)
            case PatchNode(target, version, change):
                versioned = {**change["metadata"], "resourceVersion": version}
                change = {**change, "metadata": versioned}
                await self._kube.patch(target, change, manager=MANAGER)
            case Annotate(target, annotations):
                change = {"metadata": {"annotations": dict(annotations)}}
                await self._kube.patch(target, change, manager=MANAGER)
            case Renumber(target, number):
                await self._kube.patch(target, {"revision": number}, manager=MANAGER)
            case Scale(target, replicas):
                await self._kube.scale(target, replicas, manager=MANAGER_SCALER)
            case PostDrain(target, host, request):
                await self._drainer.drain(host, target.uid or "", request)
            case PutContext(target, host, context):
                await self._drainer.put_context(host, target.uid or "", context)
            case WriteStatus(target, status):
                await self._kube.apply_status(target, status, manager=MANAGER_STATUS)
            case Notify():
                await self._recorder.record(action)

    def _filled(self, action: CreateSecret) -> dict[str, Any]:
        secret = base64.b64encode(self._random_bytes(SECRET_BYTES)).decode()
        return action.manifest | {"data": {action.key: secret}}

    async def _check(self, action: CheckTemplate) -> TemplateCheck:
        """Refusals that are about the pod itself are answers; others (the API is busy) raise."""
        try:
            await self._kube.create(action.manifest, manager=MANAGER, dry_run=True)
        except ApiError as error:
            if error.namespace_terminating or error.status not in (400, 403, 413, 422):
                raise
            quota = error.status == 403 and "exceeded quota" in str(error)
            reason = Reason.QUOTA_EXCEEDED if quota else Reason.TEMPLATE_REFUSED
            return TemplateCheck(False, reason, str(error))
        return TemplateCheck(True, Reason.TEMPLATE_ACCEPTED, "")

    async def _taken(self, action: Create) -> Outcome:
        try:
            return Outcome(action, await self._refuse_foreign(action))
        except (ApiError, OSError, TimeoutError) as error:
            return Outcome(action, str(error))

    async def _refuse_foreign(self, action: Create) -> str | None:
        """None if the object that is there already is the one that was meant."""
        wanted = ref_of(action.manifest)
        live = await self._kube.get(wanted)
        if live is None or "deletionTimestamp" in live["metadata"]:
            return f"{wanted.resource.kind} {wanted.name} is being deleted; trying again"
        if controller_uid(live) == action.owner_uid:
            await self._relabel(action.manifest, live)
            return None
        return f"{wanted.resource.kind} {wanted.name} exists and belongs to somebody else"

    async def _relabel(self, manifest: dict[str, Any], live: dict[str, Any]) -> None:
        """Give an object of ours the labels back that somebody took: without them nobody sees it,
        and its name keeps another from being made."""
        present = live["metadata"].get("labels") or {}
        wanted = manifest["metadata"].get("labels") or {}
        missing = {key: value for key, value in wanted.items() if present.get(key) != value}
        if missing:
            change = {"metadata": {"labels": missing}}
            await self._kube.patch(ref_of(live), change, manager=MANAGER)


def _done_already(action: Action, error: ApiError) -> bool:
    """Whether an error says that the action's aim is reached.

    A 409 to a Delete or an Annotate means another uid: the object that was meant is gone.
    """
    match action:
        case Delete() | Evict():
            return error.status in (404, 409)
        case PatchNode():
            return error.status == 404
        case Annotate() | WriteStatus():
            return error.status in (404, 409) and _is_gone(error)
        case CreateSecret():
            return error.status == 409
        case _:
            return False


def _is_gone(error: ApiError) -> bool:
    return error.status == 404 or "uid" in str(error).lower()


def _is_refusal(error: ApiError) -> bool:
    """Whether a budget forbids an eviction for now: it has none left (429), or two of them select
    the pod, which the API server cannot judge (500)."""
    two = error.status == 500 and "more than one PodDisruptionBudget" in str(error)
    return error.status == 429 or two


def _target(action: Action) -> Ref | None:
    match action:
        case Evict(target) | PatchNode(target):
            return target
        case Delete(target) | Annotate(target) | Renumber(target) | Scale(target):
            return target
        case PostDrain(target) | WriteStatus(target):
            return target
        case Apply(manifest) | Create(manifest):
            return replace(ref_of(manifest), uid=None)
        case _:
            return None


def failures(outcomes: list[Outcome]) -> Mapping[str, str]:
    """What failed: kind of action to the last sentence."""
    return {type(o.action).__name__: o.error for o in outcomes if o.error}
