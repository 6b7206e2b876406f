"""What a pod knows of its devices' health, from a played NVML."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tandem_runtime.engine.probe import DeviceProbe
from tandem_runtime.model.parallel import ALONE
from tandem_runtime.serve.device import HELD_DOWN, DeviceWatch


class NVMLError(Exception):
    pass


class Timeout(NVMLError):
    pass


class GpuIsLost(NVMLError):
    pass


class NotSupported(NVMLError):
    pass


class Played:
    """One device, whose events and memory errors a test chooses."""

    NVMLError, NVMLError_Timeout = NVMLError, Timeout
    NVMLError_GpuIsLost, NVMLError_NotSupported = GpuIsLost, NotSupported
    nvmlEventTypeXidCriticalError = 8
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0

    def __init__(self) -> None:
        self.events: queue.Queue[Any] = queue.Queue()
        self.errors: int | None = 3
        self.reasons: int | None = 0
        self.closed = False

    def nvmlEventSetCreate(self) -> str:
        return "events"

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceRegisterEvents(self, device: int, kinds: int, events: str) -> None:
        assert (device, kinds, events) == (0, 8, "events")

    def nvmlEventSetWait_v2(self, events: str, wait_ms: int) -> Any:
        try:
            event = self.events.get(timeout=0.01)
        except queue.Empty:
            raise Timeout from None
        if isinstance(event, Exception):
            raise event
        return SimpleNamespace(eventData=event)

    def nvmlDeviceGetTotalEccErrors(self, device: int, kind: int, since: int) -> int:
        if self.errors is None:
            raise NotSupported
        return self.errors

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, device: int) -> int:
        if self.reasons is None:
            raise NotSupported
        return self.reasons

    def nvmlShutdown(self) -> None:
        self.closed = True


@pytest.fixture
def nvml() -> Played:
    return Played()


@pytest.fixture
def watch(nvml: Played) -> Iterator[DeviceWatch]:
    watch = DeviceWatch(load=lambda: nvml)
    watch.start()
    yield watch
    watch.stop()
    assert nvml.closed


def until(look: Callable[[], Any]) -> Any:
    deadline_s = time.monotonic() + 30
    while not (found := look()):
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    return found


def test_error_codes_are_counted(nvml: Played, watch: DeviceWatch) -> None:
    report = until(watch.report)
    assert (report.xids, report.failing) == ({}, None), "errors from before do not count"
    for code in (79, 13, 79):
        nvml.events.put(code)
    until(lambda: (r := watch.report()) and r.xids == {"79": 2, "13": 1})


def test_new_memory_errors_are_a_failure(nvml: Played, watch: DeviceWatch) -> None:
    until(watch.report)
    nvml.errors = 5
    sentence = "2 memory errors that cannot be corrected"
    until(lambda: (r := watch.report()) and r.failing == sentence)


def test_clocks_that_are_held_down_are_a_failure_while_they_are(
    nvml: Played, watch: DeviceWatch
) -> None:
    until(watch.report)
    power_cap, thermal = 0x4, 0x40
    nvml.reasons = power_cap | thermal
    hot = "its clocks are held down: too hot, for the hardware"
    until(lambda: (r := watch.report()) and r.failing == hot)
    nvml.errors = 4
    both = f"1 memory errors that cannot be corrected; {hot}"
    until(lambda: (r := watch.report()) and r.failing == both)
    nvml.reasons, nvml.errors = power_cap, 3
    until(lambda: (r := watch.report()) and r.failing is None)


def test_the_reasons_are_those_of_the_library() -> None:
    pynvml = pytest.importorskip("pynvml")
    assert set(HELD_DOWN) == {
        pynvml.nvmlClocksEventReasonSwThermalSlowdown,
        pynvml.nvmlClocksEventReasonHwThermalSlowdown,
        pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
    }
    assert pynvml.nvmlDeviceGetCurrentClocksThrottleReasons


def test_what_the_engine_measured_is_in_the_report(nvml: Played) -> None:
    probe = DeviceProbe(torch.device("cpu"), ALONE)
    probe.run_if_due()
    watch = DeviceWatch(probe, lambda: nvml)
    report = watch.report()
    assert report is not None, "it needs no NVML"
    assert report.copy_bytes_per_s == probe.copy_bytes_per_s > 0
    assert report.probes.runs == 1
    probe.failing = "it is slow"
    nvml.errors = 3
    watch.start()
    until(lambda: watch._watching)
    nvml.errors = 4
    both = "1 memory errors that cannot be corrected; it is slow"
    until(lambda: (r := watch.report()) and r.failing == both)
    watch.stop()


def test_a_lost_device_stays_reported(nvml: Played, watch: DeviceWatch) -> None:
    until(watch.report)
    nvml.events.put(GpuIsLost())
    until(lambda: (r := watch.report()) and r.failing == "the driver has lost a GPU")
    until(lambda: nvml.closed)
    assert watch.report() is not None


def test_a_device_that_counts_no_errors(nvml: Played) -> None:
    nvml.errors = nvml.reasons = None
    watch = DeviceWatch(load=lambda: nvml)
    watch.start()
    report = until(watch.report)
    watch.stop()
    assert report.failing is None


@pytest.mark.parametrize("error", [ImportError("no pynvml"), NVMLError("no driver")])
def test_without_nvml_nothing_is_reported(error: Exception) -> None:
    def load() -> Any:
        raise error

    watch = DeviceWatch(load=load)
    watch.start()
    watch.stop()
    assert watch.report() is None
