from __future__ import annotations

import platform
from typing import Any

import pytest
from tandem.agent import runtime
from tandem.cluster.preflight import MachineError, check_machine


def test_this_machine_will_do() -> None:
    check_machine()


def test_another_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    with pytest.raises(MachineError, match="needs Linux"):
        check_machine()


def test_a_kernel_that_refuses_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: Any) -> None:
        raise runtime.StartError("unshare(0x20000000): Operation not permitted")

    monkeypatch.setattr(runtime, "start", refuse)
    with pytest.raises(MachineError) as failure:
        check_machine()
    assert "unshare(0x20000000): Operation not permitted" in str(failure.value)
    assert "Run as root" in str(failure.value)
