"""Events are said once, and counted later."""

from __future__ import annotations

import pytest
from fake_kube import Clock, FakeKube
from tandem_operator.kube.client import ApiError
from tandem_operator.kube.events import NOTE_BYTES, WINDOW_S, EventRecorder
from tandem_operator.plan.actions import Notify
from tandem_operator.resources import EVENTS, FLEETS, Ref

CHAT = Ref(FLEETS, "team", "chat", "uid-1")
SAID = Notify(CHAT, "Warning", "RolloutHalted", "it broke")


@pytest.fixture
def kube() -> FakeKube:
    return FakeKube(Clock())


@pytest.fixture
def recorder(kube: FakeKube) -> EventRecorder:
    return EventRecorder(kube, "pod-1", kube.clock)


def events(kube: FakeKube) -> list[dict[str, object]]:
    return [body for (kind, _, _), body in kube.objects.items() if kind == EVENTS]


async def test_a_repetition_is_not_written(kube: FakeKube, recorder: EventRecorder) -> None:
    for _ in range(5):
        await recorder.record(SAID)
    assert len(kube.writes) == 1
    (event,) = events(kube)
    assert event["note"] == "it broke"
    assert event["regarding"] == {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "InferenceFleet",
        "namespace": "team",
        "name": "chat",
        "uid": "uid-1",
    }


async def test_later_repetitions_are_counted(kube: FakeKube, recorder: EventRecorder) -> None:
    for _ in range(3):
        await recorder.record(SAID)
        kube.clock.sleep(WINDOW_S + 1)
    (event,) = events(kube)
    assert event["series"]["count"] == 3  # type: ignore[index]


async def test_what_the_api_server_forgot_is_said_anew(
    kube: FakeKube, recorder: EventRecorder
) -> None:
    """Events live for an hour."""
    await recorder.record(SAID)
    for key in [key for key in kube.objects if key[0] == EVENTS]:
        del kube.objects[key]
    kube.clock.sleep(7200.0)
    await recorder.record(SAID)
    assert len(events(kube)) == 1
    await recorder.record(SAID)
    assert len([w for w in kube.writes if w.startswith("create")]) == 2, "tried again and again"


async def test_a_clock_that_is_set_back_silences_nothing(
    kube: FakeKube, recorder: EventRecorder
) -> None:
    await recorder.record(SAID)
    kube.clock.sleep(-7200.0)
    await recorder.record(SAID)
    (event,) = events(kube)
    assert event["series"]["count"] == 2  # type: ignore[index]


async def test_another_sentence_is_another_event(kube: FakeKube, recorder: EventRecorder) -> None:
    await recorder.record(SAID)
    await recorder.record(Notify(CHAT, "Warning", "RolloutHalted", "it broke differently"))
    assert len(events(kube)) == 2


async def test_a_long_note_is_cut_between_characters(
    kube: FakeKube, recorder: EventRecorder
) -> None:
    await recorder.record(Notify(CHAT, "Normal", "X", "ü" * NOTE_BYTES))
    (event,) = events(kube)
    assert event["note"] == "ü" * (NOTE_BYTES // 2)


async def test_an_event_that_is_refused_is_dropped(kube: FakeKube, recorder: EventRecorder) -> None:
    kube.refuse = {"chat": ApiError(403, "Forbidden", "the namespace is terminating")}
    await recorder.record(SAID)
    assert events(kube) == []
    kube.refuse = {}
    await recorder.record(SAID)
    assert len(events(kube)) == 1
