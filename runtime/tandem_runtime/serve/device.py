"""What NVML says of the health of this pod's devices, for `PodState.device`.

A thread of its own: NVML's calls block. Error codes are counted as they come, since the driver
keeps only the last one; of memory errors those count that came since the pod started. Clocks that
are held down count while they are, and only for what a healthy device does not do under load: heat
and power supply, not its power limit.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tandem_runtime.device_report import DeviceReport
from tandem_runtime.engine.flight import Probe

log = logging.getLogger(__name__)

_LABELS = ("model_name", "engine")
WAIT_MS = 2000
"""For the next error code; between two looks at the memory's counts."""
HELD_DOWN = {
    0x20: "too hot, for the driver",
    0x40: "too hot, for the hardware",
    0x80: "the power supply asks for it",
}
"""NVML's nvmlClocksEventReason SwThermalSlowdown, HwThermalSlowdown and HwPowerBrakeSlowdown."""


def load_nvml() -> Any:
    """NVIDIA's binding, initialised. Raises ImportError where it is not installed, and its own
    NVMLError without a driver."""
    nvml = import_module("pynvml")
    nvml.nvmlInit()
    return nvml


class DeviceWatch:
    """Counts from `start` to `stop`. Without NVML it reports nothing."""

    def __init__(self, probe: Probe | None = None, load: Callable[[], Any] = load_nvml) -> None:
        """`probe`: the engine's own measurements, for the report."""
        self._probe = probe
        self._load = load
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._xids: Counter[str] = Counter()
        self._failing: str | None = None
        self._watching = False

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="devices", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def report(self) -> DeviceReport | None:
        """None: nobody looks."""
        probe = self._probe
        if probe is None:
            return DeviceReport(dict(self._xids.copy()), self._failing) if self._watching else None
        return DeviceReport(
            dict(self._xids.copy()),
            "; ".join(filter(None, (self._failing, probe.failing))) or None,
            probe.copy_bytes_per_s,
            probe.matmul_flop_per_s,
            probe.sums,
        )

    def _run(self) -> None:
        try:
            nvml = self._load()
        except Exception as error:  # not only NVML's: a library of another driver fails anyhow
            log.info("devices are not watched: %s", error)
            return
        try:
            self._watch(nvml)
        except nvml.NVMLError as error:
            log.warning("devices are not watched any more: %s", error)
            self._watching = self._failing is not None
        finally:
            nvml.nvmlShutdown()

    def _watch(self, nvml: Any) -> None:
        events = nvml.nvmlEventSetCreate()
        count = nvml.nvmlDeviceGetCount()
        devices = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        for device in devices:
            nvml.nvmlDeviceRegisterEvents(device, nvml.nvmlEventTypeXidCriticalError, events)
        first = [_uncorrected(nvml, device) for device in devices]
        self._watching = True
        while not self._stopped.is_set():
            try:
                event = nvml.nvmlEventSetWait_v2(events, WAIT_MS)
                self._xids[str(int(event.eventData))] += 1
            except nvml.NVMLError_Timeout:
                pass
            except nvml.NVMLError_GpuIsLost:
                self._failing = "the driver has lost a GPU"
                return
            new = sum(_uncorrected(nvml, d) - n for d, n in zip(devices, first, strict=True))
            found = [f"{new} memory errors that cannot be corrected"] if new > 0 else []
            self._failing = "; ".join([*found, *_held_down(nvml, devices)]) or None


def _held_down(nvml: Any, devices: Iterable[Any]) -> Iterator[str]:
    """Why clocks are below what the load asks for, each reason once."""
    reasons = 0
    for device in devices:
        try:
            reasons |= int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device))
        except nvml.NVMLError_NotSupported:
            continue
    for bit, reason in HELD_DOWN.items():
        if reasons & bit:
            yield f"its clocks are held down: {reason}"


def _uncorrected(nvml: Any, device: Any) -> int:
    """Memory errors since the driver was loaded; 0 of a device that does not count them."""
    kind, since = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    try:
        return int(nvml.nvmlDeviceGetTotalEccErrors(device, kind, since))
    except nvml.NVMLError_NotSupported:
        return 0


class DeviceCollector(Collector):
    """What `DeviceWatch` reports, as of the scrape."""

    def __init__(self, model: str, watch: DeviceWatch) -> None:
        self._values = [model, "0"]
        self._watch = watch

    def collect(self) -> Iterable[Metric]:
        report = self._watch.report()
        if report is None:
            return
        failing = GaugeMetricFamily(
            "tandem_device_failing", "1 while a device fails.", labels=_LABELS
        )
        failing.add_metric(self._values, float(report.failing is not None))
        yield failing
        xids = CounterMetricFamily(
            "tandem_device_xids", "NVIDIA's error codes that came.", labels=[*_LABELS, "xid"]
        )
        for code, count in report.xids.items():
            xids.add_metric([*self._values, code], count)
        yield xids
        if report.copy_bytes_per_s:
            yield from self._speed(report)

    def _speed(self, report: DeviceReport) -> Iterator[Metric]:
        probes = report.probes
        tested = GaugeMetricFamily(
            "tandem_device_self_test_rate",
            "Of the self-test: bytes (copy) or FLOP (matmul) per second.",
            labels=[*_LABELS, "kind"],
        )
        work = CounterMetricFamily(
            "tandem_device_probe_work",
            "Of the runs between steps: bytes (copy) or FLOP (matmul).",
            labels=[*_LABELS, "kind"],
        )
        seconds = CounterMetricFamily(
            "tandem_device_probe_seconds", "What they took.", labels=[*_LABELS, "kind"]
        )
        for kind, rate, done, took_s in (
            ("copy", report.copy_bytes_per_s, probes.copied_bytes, probes.copy_s),
            ("matmul", report.matmul_flop_per_s, probes.flop, probes.matmul_s),
        ):
            tested.add_metric([*self._values, kind], rate)
            work.add_metric([*self._values, kind], done)
            seconds.add_metric([*self._values, kind], took_s)
        yield from (tested, work, seconds)
