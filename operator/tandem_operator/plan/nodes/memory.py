"""Since when a node shows a signal: our own times, since the node's own are reset by flapping.

A signal that comes and goes keeps its first time and adds up how long it was there, until it was
away for `clear_s` without a break. It is *ripe* once it is there and was there for long enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tandem_operator.api.node_health import SeenSignal
from tandem_operator.plan.nodes.signs import Sign
from tandem_operator.plan.times import to_text, to_unix_s

MOST_SIGNALS = 16
MOST_TEXT = 1024


def advance(
    seen: Sequence[SeenSignal], signs: Iterable[Sign], clear_s: float, now_s: float
) -> tuple[SeenSignal, ...]:
    """What is remembered after one look; unchanged while nothing comes or goes."""
    before = {signal.signal: signal for signal in seen}
    present = {sign.signal: sign for sign in signs}
    after = [_there(before.get(name), sign, now_s) for name, sign in present.items()]
    after += [
        kept
        for name, signal in before.items()
        if name not in present and (kept := _away(signal, clear_s, now_s)) is not None
    ]
    # Those that are there first, should there be too many.
    ordered = sorted(after, key=lambda s: (s.since is None, s.signal))[:MOST_SIGNALS]
    return tuple(sorted(ordered, key=lambda s: s.signal))


def _there(signal: SeenSignal | None, sign: Sign, now_s: float) -> SeenSignal:
    now = to_text(now_s)
    if signal is None:
        evidence = sign.evidence[:MOST_TEXT]
        return SeenSignal(signal=sign.signal, evidence=evidence, first_seen=now, since=now)
    if signal.since is not None:
        return signal
    return signal.model_copy(
        update={"since": now, "gone": None, "evidence": sign.evidence[:MOST_TEXT]}
    )


def _away(signal: SeenSignal, clear_s: float, now_s: float) -> SeenSignal | None:
    if signal.since is not None:
        seconds = signal.seconds + int(_passed(signal.since, now_s))
        return signal.model_copy(update={"since": None, "gone": to_text(now_s), "seconds": seconds})
    if signal.gone is None or _passed(signal.gone, now_s) >= clear_s:
        return None
    return signal


def _passed(since: str, now_s: float) -> float:
    """Not below 0: a clock may be set back."""
    return max(0.0, now_s - to_unix_s(since))


def present_s(signal: SeenSignal, now_s: float) -> float:
    """How long a signal was there, in all."""
    return signal.seconds + (_passed(signal.since, now_s) if signal.since else 0.0)


def ripe(seen: Sequence[SeenSignal], signs: Iterable[Sign], now_s: float) -> list[Sign]:
    """The signs that have been there for long enough."""
    before = {signal.signal: signal for signal in seen}
    return [
        sign
        for sign in signs
        if (signal := before.get(sign.signal)) is not None
        and present_s(signal, now_s) >= sign.for_s
    ]


def next_change_s(
    seen: Sequence[SeenSignal], signs: Iterable[Sign], clear_s: float, now_s: float
) -> list[float]:
    """In how many seconds something ripens or is forgotten although nothing happens."""
    wanted = {sign.signal: sign.for_s for sign in signs}
    waits = []
    for signal in seen:
        if signal.since is not None:
            waits.append(wanted.get(signal.signal, 0.0) - present_s(signal, now_s))
        elif signal.gone is not None:
            waits.append(clear_s - _passed(signal.gone, now_s))
    return [wait for wait in waits if wait > 0.0]
