"""`plan_context`: a CachedContext is told to the gateways, which see to it that pods keep it.

A gateway is told for a day at a time and again long before that is over: a context whose object
was deleted while nobody looked ends by itself, and no finalizer is needed. Gateways learn of it
from pods, too, so each is asked what it knows and told only what it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final

import msgspec
from tandem_runtime.protocol import Context, ContextCopy, ContextState

from tandem_operator.api.cached_context import (
    CachedContextSpec,
    CachedContextStatus,
    Content,
)
from tandem_operator.api.meta import Judgement, find_condition, set_conditions
from tandem_operator.api.model import served_names
from tandem_operator.names import Condition, Reason
from tandem_operator.plan.actions import Action, Notify, Plan, PutContext, WriteStatus
from tandem_operator.plan.gateway import GatewayPod
from tandem_operator.plan.times import to_text, to_unix_s
from tandem_operator.plan.views import FleetView, ModelView
from tandem_operator.resources import CACHED_CONTEXTS, PODS, Ref

ORIGIN: Final = "CachedContext"
LEASE_S: Final = 86_400.0
"""How long a context is kept without the operator."""
_RENEW_S: Final = LEASE_S / 2
KEPT_S: Final = 60.0
"""When to look again at one that is kept."""
MEASURED_S: Final = 30.0
"""How often what requests had of it is written at most."""
BUILDING_S: Final = 3.0
FAILED_S: Final = 15.0


@dataclass(frozen=True)
class CachedContextView:
    """A CachedContext."""

    namespace: str
    name: str
    uid: str
    generation: int
    created_s: float
    spec: CachedContextSpec
    status: CachedContextStatus

    @property
    def ref(self) -> Ref:
        return Ref(CACHED_CONTEXTS, self.namespace, self.name, self.uid)


def cached_context_view(body: Mapping[str, Any]) -> CachedContextView:
    """Parse a CachedContext."""
    meta = body["metadata"]
    return CachedContextView(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        generation=meta["generation"],
        created_s=to_unix_s(meta["creationTimestamp"]),
        spec=CachedContextSpec.model_validate(body["spec"]),
        status=CachedContextStatus.model_validate(body.get("status") or {}),
    )


@dataclass(frozen=True)
class ContextSnapshot:
    """Everything that a plan for one CachedContext is made of."""

    now_s: float
    name: str
    context: CachedContextView | None
    fleets: tuple[FleetView, ...] = ()
    models: tuple[ModelView, ...] = ()
    content: str | None = None
    """None: it could not be read."""
    trouble: str = ""
    """Why, a sentence."""
    states: Mapping[GatewayPod, ContextState | None] = field(default_factory=dict)
    """What each gateway that answers knows of it."""


@dataclass(frozen=True)
class _Verdict:
    ready: bool
    reason: Reason
    sentence: str
    stalled: bool = False
    """It needs somebody's help."""
    again_s: float = FAILED_S


def plan_context(snapshot: ContextSnapshot) -> Plan:
    """What to do for one CachedContext now."""
    context = snapshot.context
    if context is None:
        return Plan(tuple(_ended(snapshot)))
    expires_s = _hard_expiry(context)
    if expires_s is not None and expires_s <= snapshot.now_s:
        told = _Verdict(
            False, Reason.EXPIRED, f"it was kept until {to_text(expires_s)}", again_s=KEPT_S * 60
        )
        return Plan((*_ended(snapshot), *_status(snapshot, context, None, told)), told.again_s)
    found = _fleet(snapshot, context)
    if isinstance(found, _Verdict):
        return Plan(_status(snapshot, context, None, found), found.again_s)
    fleet, served = found
    if snapshot.content is None:
        told = _Verdict(False, Reason.CONTENT_NOT_FOUND, snapshot.trouble, stalled=True)
        return Plan(_status(snapshot, context, fleet, told), told.again_s)
    content = _content(snapshot, context, snapshot.content)
    wanted = _wanted(snapshot, context, fleet, served, content)
    puts = [
        _put(pod, wanted)
        for pod, state in snapshot.states.items()
        if state is None or not _same(state.context, wanted, snapshot.now_s)
    ]
    told = _verdict(snapshot, context, wanted)
    again_s = BUILDING_S if puts else told.again_s
    return Plan((*puts, *_status(snapshot, context, fleet, told, content)), again_s)


def _put(pod: GatewayPod, context: Context) -> PutContext:
    reason = Reason.CONTEXT_DELETED if context.deleted else Reason.CONTEXT_WANTED
    return PutContext(Ref(PODS, pod.namespace, pod.name, pod.uid), pod.host, context, reason)


def _ended(snapshot: ContextSnapshot) -> list[Action]:
    """Gateways that know a context of this name, and of ours, are told that it is none any more."""
    actions: list[Action] = []
    for pod, state in snapshot.states.items():
        if state is None or state.context.deleted or state.context.origin != ORIGIN:
            continue
        deleted = msgspec.structs.replace(
            state.context,
            deleted=True,
            version=_version(snapshot.now_s, state.context.version),
            updated_unix_s=snapshot.now_s,
        )
        actions.append(_put(pod, deleted))
    return actions


def _version(now_s: float, known: int = 0) -> int:
    return max(known + 1, int(now_s * 1000))


def _hard_expiry(context: CachedContextView) -> float | None:
    ttl_s = context.spec.ttl_seconds
    return None if ttl_s is None else context.created_s + ttl_s


def _fleet(
    snapshot: ContextSnapshot, context: CachedContextView
) -> tuple[FleetView, str] | _Verdict:
    """The fleet, and a name that it serves."""
    spec = context.spec
    alive = sorted((f for f in snapshot.fleets if not f.deleting), key=lambda f: f.created_s)
    if spec.fleet_ref is not None:
        chosen = [f for f in alive if f.name == spec.fleet_ref.name]
        missing = f"there is no InferenceFleet '{spec.fleet_ref.name}' in this namespace"
    else:
        model_name = spec.model_ref.name if spec.model_ref else ""
        chosen = [f for f in alive if f.spec.model_ref.name == model_name]
        missing = f"no InferenceFleet of this namespace serves the Model '{model_name}'"
    if not chosen:
        return _Verdict(False, Reason.FLEET_NOT_FOUND, missing, stalled=True)
    fleet = chosen[0]
    model = next((m for m in snapshot.models if m.name == fleet.spec.model_ref.name), None)
    if model is None:
        sentence = f"fleet '{fleet.name}' has no Model '{fleet.spec.model_ref.name}'"
        return _Verdict(False, Reason.MODEL_NOT_FOUND, sentence, stalled=True)
    return fleet, served_names(model.spec, model.name)[0]


def _content(snapshot: ContextSnapshot, context: CachedContextView, text: str) -> Content:
    """What is kept: as it was known, or from now on."""
    what = f"{context.spec.role}\0{source_uri(context.spec)}\0{text}"
    digest = blake2b(what.encode(), digest_size=16).hexdigest()
    known = context.status.content
    if known is not None and known.digest == digest:
        return known
    # The newer of two of one name counts, in whole seconds.
    last_s = to_unix_s(known.loaded_time) if known is not None else 0.0
    return Content(digest=digest, loaded_time=to_text(max(snapshot.now_s, last_s + 1)))


def source_uri(spec: CachedContextSpec) -> str:
    """Where a gateway finds the text; empty: it is here."""
    if spec.file is not None:
        return f"pvc://{spec.file.claim_name}/{spec.file.path}"
    return spec.url or ""


def _wanted(
    snapshot: ContextSnapshot,
    context: CachedContextView,
    fleet: FleetView,
    served: str,
    content: Content,
) -> Context:
    spec, text, uri = context.spec, snapshot.content or "", source_uri(context.spec)
    hard_s = _hard_expiry(context)
    lease_s = snapshot.now_s + LEASE_S
    known = [s.context.version for s in snapshot.states.values() if s is not None]
    return Context(
        id=context.name,
        model=served,
        fleet=fleet.name,
        tenant=spec.tenant,
        created_unix_s=to_unix_s(content.loaded_time),
        expires_unix_s=lease_s if hard_s is None else min(lease_s, hard_s),
        prompt=text if spec.role == "prompt" else "",
        messages=[] if uri or spec.role == "prompt" else [{"role": spec.role, "content": text}],
        uri=uri,
        role=spec.role if uri and spec.role != "prompt" else "",
        tier=(spec.tier or "").lower(),
        copies=spec.copies,
        version=_version(snapshot.now_s, max(known, default=0)),
        updated_unix_s=snapshot.now_s,
        origin=ORIGIN,
    )


def _same(known: Context, wanted: Context, now_s: float) -> bool:
    """Whether a gateway that knows this needs to be told nothing."""
    fields = ("model", "fleet", "tenant", "created_unix_s", "tier", "copies", "deleted", "origin")
    if any(getattr(known, name) != getattr(wanted, name) for name in fields):
        return False
    # A lease is renewed in time; an end that the user set is met.
    return (
        min(wanted.expires_unix_s, now_s + _RENEW_S)
        <= known.expires_unix_s
        <= max(wanted.expires_unix_s, now_s + _RENEW_S)
    )


def _copies(snapshot: ContextSnapshot, wanted: Context | None = None) -> dict[str, ContextCopy]:
    """By pod: what any gateway has heard of it, of this content."""
    found: dict[str, ContextCopy] = {}
    for state in snapshot.states.values():
        for name, copy in (state.pods if state is not None else {}).items():
            current = wanted is None or copy.created_unix_s == wanted.created_unix_s
            if current and (name not in found or found[name].version <= copy.version):
                found[name] = copy
    return found


def _verdict(snapshot: ContextSnapshot, context: CachedContextView, wanted: Context) -> _Verdict:
    if not snapshot.states:
        sentence = "no gateway of this namespace answers"
        return _Verdict(False, Reason.GATEWAY_NOT_READY, sentence)
    copies = _copies(snapshot, wanted)
    ready = [name for name, copy in copies.items() if copy.state == "ready"]
    count = f"{len(ready)} of {context.spec.copies} pods keep it"
    if len(ready) >= context.spec.copies:
        return _Verdict(True, Reason.CONTEXT_KEPT, count, again_s=KEPT_S)
    reasons = [copy.reason for copy in copies.values() if copy.reason]
    reasons += [s.reason for s in snapshot.states.values() if s is not None and s.reason]
    if reasons:
        return _Verdict(False, Reason.CONTEXT_NOT_KEPT, f"{count}: {reasons[0]}", stalled=True)
    if any(copy.state == "building" for copy in copies.values()):
        sentence = f"{count}, and it is being prefilled"
        return _Verdict(False, Reason.CONTEXT_BUILDING, sentence, again_s=BUILDING_S)
    sentence = f"{count}: fleet '{wanted.fleet}' has no further pod that can"
    return _Verdict(False, Reason.CONTEXT_NOT_KEPT, sentence)


def _status(
    snapshot: ContextSnapshot,
    context: CachedContextView,
    fleet: FleetView | None,
    told: _Verdict,
    content: Content | None = None,
) -> tuple[Action, ...]:
    """The write of the status where it differs, and the Event that tells of it."""
    copies = {} if told.reason == Reason.EXPIRED else _copies(snapshot)
    ready = {name: copy for name, copy in copies.items() if copy.state == "ready"}
    one = next(iter(ready.values()), None)
    hard_s = _hard_expiry(context)
    found = [Judgement(Condition.READY, told.ready, told.reason, told.sentence)]
    if told.stalled:
        found.append(Judgement(Condition.STALLED, True, told.reason, told.sentence))
    elif not told.ready and told.reason != Reason.EXPIRED:
        found.append(Judgement(Condition.RECONCILING, True, told.reason, told.sentence))
    status = CachedContextStatus(
        observed_generation=context.generation,
        conditions=set_conditions(
            context.status.conditions, found, context.generation, to_text(snapshot.now_s)
        ),
        fleet=fleet.name if fleet else None,
        content=content or context.status.content,
        copies=f"{len(ready)}/{context.spec.copies}",
        pods=tuple(sorted(ready)),
        tier=one.tier.capitalize() if one else None,
        tokens=one.tokens if one else None,
        bytes=sum(copy.bytes for copy in ready.values()) or None,
        expiration_time=None if hard_s is None else to_text(hard_s),
        **_measured(snapshot, context.status),
    )
    if status == context.status:
        return ()
    write = WriteStatus(context.ref, status.model_dump(by_alias=True, exclude_none=True))
    before = find_condition(context.status.conditions, Condition.READY)
    known = before is not None and (before.reason, before.message) == (told.reason, told.sentence)
    if known or told.reason == Reason.CONTEXT_BUILDING:
        return (write,)
    kind: Any = "Warning" if told.stalled else "Normal"
    return (Notify(context.ref, kind, told.reason, told.sentence), write)


def _measured(snapshot: ContextSnapshot, known: CachedContextStatus) -> dict[str, Any]:
    """What requests had of it; what is written, for a while, as each write is an event."""
    states = [state for state in snapshot.states.values() if state is not None]
    now = {
        "hits": _two_digits(sum(state.requests for state in states)),
        "cached_tokens": _two_digits(sum(state.cached_tokens for state in states)),
        "saved_seconds": _two_digits(sum(state.saved_s for state in states)),
    }
    before = {name: getattr(known, name) for name in now}
    last = known.measured_time
    if now == before or (last and 0 <= snapshot.now_s - to_unix_s(last) < MEASURED_S):
        return {**before, "measured_time": last}
    return {**now, "measured_time": to_text(snapshot.now_s) if any(now.values()) else None}


def _two_digits(value: float) -> int:
    """Rounded down: a status is not written for every request."""
    whole = int(value)
    step = int(10 ** max(len(str(whole)) - 2, 0))
    return whole // step * step
