"""`plan_model`: a Model is read by a short resolver pod in its own namespace.

The pod writes one JSON object to its termination message. The operator never reads the users'
Secrets or volumes. Pods are named after what they were asked and the number of failures before, so
that an answer is counted once however often it is seen.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from tandem_operator.api.meta import Judgement, find_condition, set_conditions
from tandem_operator.api.model import (
    ModelSpec,
    ModelStatus,
    Quantization,
    Resolution,
    ResolvedModel,
    secret_name,
    served_names,
)
from tandem_operator.names import Condition, Reason
from tandem_operator.plan.actions import Action, Create, Delete, Notify, Plan, WriteStatus
from tandem_operator.plan.merge import refusal
from tandem_operator.plan.resolver import PATIENCE_S, ResolverView, resolver_manifest
from tandem_operator.plan.revision import digest
from tandem_operator.plan.times import to_text, to_unix_s
from tandem_operator.plan.views import ModelView
from tandem_operator.settings import Settings

FIRST_RETRY_S = 10.0
LAST_RETRY_S = 300.0
REPORT = 3
"""Counts up with what resolvers report, so that Models are read again after an upgrade."""


@dataclass(frozen=True)
class ModelSnapshot:
    """Everything that a plan for one Model is made of."""

    now_s: float
    model: ModelView | None
    resolvers: tuple[ResolverView, ...] = ()
    refused: str | None = None
    """Why the last plan could not make the resolver pod."""


@dataclass(frozen=True)
class Answer:
    """What a resolver found: the model, or a reason and a sentence."""

    resolved: ResolvedModel | None
    reason: str
    sentence: str


def inputs(spec: ModelSpec) -> str:
    """Hash of what decides the resolver's answer."""
    asked = {
        "report": REPORT,
        "uri": spec.source.uri,
        "dtype": spec.dtype,
        "maxContextTokens": spec.max_context_tokens,
        "template": spec.template,
    }
    secret = secret_name(spec)
    if spec.quantization not in (None, Quantization()):
        asked["quantization"] = spec.quantization.model_dump()
    return digest(asked | ({"secret": secret} if secret else {}))


def retry_after_s(failures: int) -> float:
    """10 s, doubling to 5 min."""
    return float(min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** (failures - 1)))


def plan_model(snapshot: ModelSnapshot, settings: Settings) -> Plan:
    """What to do for one Model now."""
    model = snapshot.model
    if model is None:
        return Plan()
    asked = inputs(model.spec)
    past = model.status.resolution
    if past is None or past.inputs != asked:
        past = Resolution(inputs=asked)
    elif model.status.resolved is not None and past.failures == 0:
        return _done(snapshot, model, past, model.status.resolved)
    name = f"{model.name}-resolve-{asked}-{past.failures}"
    stale = _cleanup(snapshot, keep=name)
    pod = next((r for r in snapshot.resolvers if r.name == name and not r.terminating), None)
    if pod is None:
        plan = _ask(snapshot, model, past, name, settings)
    else:
        answer = _answer(pod, model.spec, snapshot.now_s)
        if answer is None:
            plan = _waiting(snapshot, model, past, pod)
        else:
            plan = _answered(snapshot, model, past, answer)
    return replace(plan, actions=(*stale, *plan.actions))


def _cleanup(snapshot: ModelSnapshot, keep: str | None) -> list[Action]:
    return [
        Delete(pod.ref, Reason.RESOLVER_FINISHED if pod.ended else Reason.RESOLVER_STALE)
        for pod in snapshot.resolvers
        if pod.name != keep and not pod.terminating
    ]


def _done(
    snapshot: ModelSnapshot, model: ModelView, past: Resolution, resolved: ResolvedModel
) -> Plan:
    sentence = (
        f"{resolved.architecture} with {resolved.parameters:,} parameters from {resolved.uri}"
    )
    found = [
        Judgement(Condition.MODEL_RESOLVED, True, Reason.RESOLVED, sentence),
        Judgement(Condition.READY, True, Reason.RESOLVED, sentence),
    ]
    write = _status(snapshot, model, past, resolved, found)
    return Plan((*write, *_cleanup(snapshot, keep=None)))


def _ask(
    snapshot: ModelSnapshot, model: ModelView, past: Resolution, name: str, settings: Settings
) -> Plan:
    """Start the resolver, or wait for the next attempt."""
    next_s = to_unix_s(past.next_time) if past.next_time else 0.0
    if next_s > snapshot.now_s:
        return Plan(_unchanged(snapshot, model, past), next_s - snapshot.now_s + 0.05)
    refused = refusal(model.spec.template or {}, "template")
    if refused:
        return Plan(_failed(snapshot, model, past, Reason.TEMPLATE_REFUSED, refused))
    manifest = resolver_manifest(model, name, settings)
    create = Create(manifest, Reason.RESOLVING, model.uid)
    told = f": the resolver pod cannot be made: {snapshot.refused}" if snapshot.refused else ""
    sentence = f"the weights are being read{told}"
    return Plan((create, *_resolving(snapshot, model, past, sentence)))


def _unchanged(snapshot: ModelSnapshot, model: ModelView, past: Resolution) -> tuple[Action, ...]:
    """What is known holds for the newest generation too: nothing that was asked has changed."""
    values = {"True": True, "False": False}
    found = [
        Judgement(c.type, values.get(c.status), c.reason, c.message)
        for c in model.status.conditions
    ]
    # Its first is the one that Events tell of.
    found.sort(key=lambda j: j.type != Condition.MODEL_RESOLVED)
    return _status(snapshot, model, past, model.status.resolved, found) if found else ()


def _waiting(
    snapshot: ModelSnapshot, model: ModelView, past: Resolution, pod: ResolverView
) -> Plan:
    worry = pod.problem.sentence if pod.problem else pod.unschedulable
    sentence = "the weights are being read" + (f": pod {pod.name}: {worry}" if worry else "")
    left_s = pod.created_s + PATIENCE_S - snapshot.now_s
    return Plan(_resolving(snapshot, model, past, sentence), left_s + 0.05)


def _resolving(
    snapshot: ModelSnapshot, model: ModelView, past: Resolution, sentence: str
) -> tuple[Action, ...]:
    """The status while an attempt runs; after a failure it goes on saying what failed."""
    failed = find_condition(model.status.conditions, Condition.MODEL_RESOLVED)
    if past.failures and failed and failed.status == "False":
        return _unchanged(snapshot, model, past)
    found = [
        Judgement(Condition.MODEL_RESOLVED, None, Reason.RESOLVING, sentence),
        Judgement(Condition.READY, False, Reason.RESOLVING, sentence),
        Judgement(Condition.RECONCILING, True, Reason.RESOLVING, sentence),
    ]
    return _status(snapshot, model, past, model.status.resolved, found)


def _answer(pod: ResolverView, spec: ModelSpec, now_s: float) -> Answer | None:
    """What a resolver pod says; None while it works."""
    if not pod.ended:
        if now_s - pod.created_s < PATIENCE_S:
            return None
        worry = pod.problem.sentence if pod.problem else pod.unschedulable
        told = f": {worry}" if worry else ""
        sentence = f"the resolver pod gave no answer within {PATIENCE_S:g} s{told}"
        return Answer(None, Reason.RESOLVER_TIMED_OUT, sentence)
    try:
        said = json.loads(pod.message)
        if said.get("ok"):
            known = {
                "uri": spec.source.uri,
                "secretName": secret_name(spec),
                "dtype": spec.dtype,
                "quantization": (spec.quantization or Quantization()).model_dump(by_alias=True),
            }
            resolved = ResolvedModel.model_validate(known | said)
            return Answer(resolved, Reason.RESOLVED, "")
        return Answer(None, str(said["reason"]), str(said["message"]))
    except (ValueError, ValidationError, KeyError, AttributeError):
        told = pod.message.strip() or (pod.problem.sentence if pod.problem else "no message")
        sentence = f"the resolver pod ended with exit {pod.exit_code} and no result: {told}"
        return Answer(None, Reason.RESOLVE_FAILED, sentence[:2000])


def _answered(snapshot: ModelSnapshot, model: ModelView, past: Resolution, answer: Answer) -> Plan:
    """Write the answer down; the pod goes in the next round, when its name is not wanted."""
    now = to_text(snapshot.now_s)
    if answer.resolved is not None:
        done = Resolution(inputs=past.inputs, last_time=now)
        return _done(replace(snapshot, resolvers=()), model, done, answer.resolved)
    failures = past.failures + 1
    wait_s = retry_after_s(failures)
    next_time = to_text(snapshot.now_s + wait_s)
    failed = Resolution(inputs=past.inputs, failures=failures, last_time=now, next_time=next_time)
    sentence = f"{answer.sentence} (attempt {failures}; next at {next_time})"
    return Plan(_failed(snapshot, model, failed, answer.reason, sentence), wait_s + 0.05)


def _failed(
    snapshot: ModelSnapshot, model: ModelView, resolution: Resolution, reason: str, sentence: str
) -> tuple[Action, ...]:
    found = [
        Judgement(Condition.MODEL_RESOLVED, False, reason, sentence),
        Judgement(Condition.READY, False, reason, sentence),
        Judgement(Condition.STALLED, True, reason, sentence),
    ]
    return _status(snapshot, model, resolution, None, found)


def _status(
    snapshot: ModelSnapshot,
    model: ModelView,
    resolution: Resolution,
    resolved: ResolvedModel | None,
    found: list[Judgement],
) -> tuple[Action, ...]:
    """The write of the status where it differs, and the Event that tells of it."""
    before = find_condition(model.status.conditions, Condition.MODEL_RESOLVED)
    status = ModelStatus(
        observed_generation=model.generation,
        conditions=set_conditions(
            model.status.conditions, found, model.generation, to_text(snapshot.now_s)
        ),
        architecture=resolved.architecture if resolved else None,
        parameters=_short(resolved.parameters) if resolved else None,
        served_names=served_names(model.spec, model.name),
        resolved=resolved,
        resolution=resolution,
    )
    if status == model.status:
        return ()
    write = WriteStatus(model.ref, status.model_dump(by_alias=True, exclude_none=True))
    now = found[0]
    told = now.status is None or (
        before is not None and (before.reason, before.message) == (now.reason, now.message)
    )
    kind: Any = "Warning" if now.status is False else "Normal"
    return (write,) if told else (Notify(model.ref, kind, now.reason, now.message), write)


def _short(parameters: int) -> str:
    """135M, 8.03B: three digits for people."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit}"
    return str(parameters)
