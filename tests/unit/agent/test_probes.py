from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tandem.agent.probes import Probe, ProbeKind, ProbeState, observe, probes


def make(kind: ProbeKind = ProbeKind.READINESS, **spec: int) -> Probe:
    return Probe.from_spec(kind, {"httpGet": {"port": 80}, **spec})


def verdicts(probe: Probe, results: str) -> list[bool | None]:
    """The verdict after each result of a string of `+` and `-`."""
    state = ProbeState.initial(probe.kind)
    seen = []
    for result in results:
        state = observe(probe, state, result == "+")
        seen.append(state.verdict)
    return seen


def test_defaults_are_a_kubelets() -> None:
    probe = make()
    assert (probe.period_s, probe.timeout_s, probe.initial_delay_s) == (10, 1, 0)
    assert (probe.success_threshold, probe.failure_threshold, probe.grace_s) == (1, 3, None)


def test_readiness_begins_false_and_needs_three_failures_to_fall() -> None:
    assert verdicts(make(), "-+--+---") == [False, True, True, True, True, True, True, False]


def test_success_threshold() -> None:
    probe = make(successThreshold=2)
    assert verdicts(probe, "+-++") == [False, False, False, True]


def test_liveness_begins_true() -> None:
    assert verdicts(make(ProbeKind.LIVENESS, failureThreshold=2), "--") == [True, False]


def test_startup_is_undecided_until_a_threshold() -> None:
    probe = make(ProbeKind.STARTUP, failureThreshold=3)
    assert verdicts(probe, "--+") == [None, None, True]
    assert verdicts(probe, "---") == [None, None, False]


def test_probes_of_a_container() -> None:
    spec = {"livenessProbe": {"exec": {"command": ["true"]}}, "readinessProbe": {}}
    assert list(probes(spec)) == [ProbeKind.LIVENESS]


@given(st.text("+-", min_size=1), st.integers(1, 4), st.integers(1, 4))
def test_the_verdict_follows_the_last_decisive_streak(
    results: str, successes: int, failures: int
) -> None:
    probe = make(successThreshold=successes, failureThreshold=failures)
    expected = False
    for end in range(1, len(results) + 1):
        if results[:end].endswith("+" * successes):
            expected = True
        elif results[:end].endswith("-" * failures):
            expected = False
    assert verdicts(probe, results)[-1] is expected
