from __future__ import annotations

from tandem.agent.backoff import FORGIVEN_AFTER_S, delay_s, effective_strikes, image_delay_s


def test_delays_of_a_container_that_never_works() -> None:
    assert [delay_s(n) for n in range(9)] == [0, 10, 20, 40, 80, 160, 300, 300, 300]
    assert delay_s(10_000) == 300


def test_a_long_run_wipes_the_slate() -> None:
    assert effective_strikes(7, FORGIVEN_AFTER_S) == 0
    assert effective_strikes(7, FORGIVEN_AFTER_S - 1) == 7


def test_image_tries_wait_from_the_first() -> None:
    assert [image_delay_s(n) for n in range(7)] == [10, 20, 40, 80, 160, 300, 300]
