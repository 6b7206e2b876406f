"""What NVML says of the health of this pod's devices, for `PodState.device`.

A thread of its own: NVML's calls block. Error codes are counted as they come, since the driver
keeps only the last one; of memory errors those count that came since the pod started.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

from tandem_runtime.protocol import DeviceReport

log = logging.getLogger(__name__)
WAIT_MS = 2000
"""For the next error code; between two looks at the memory's counts."""


def load_nvml() -> Any:
    """NVIDIA's binding, initialised. Raises ImportError where it is not installed, and its own
    NVMLError without a driver."""
    nvml = import_module("pynvml")
    nvml.nvmlInit()
    return nvml


class DeviceWatch:
    """Counts from `start` to `stop`. Without NVML it reports nothing."""

    def __init__(self, load: Callable[[], Any] = load_nvml) -> None:
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
        if not self._watching:
            return None
        return DeviceReport(dict(self._xids.copy()), self._failing)

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
            if new > 0:
                self._failing = f"{new} memory errors that cannot be corrected"


def _uncorrected(nvml: Any, device: Any) -> int:
    """Memory errors since the driver was loaded; 0 of a device that does not count them."""
    kind, since = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    try:
        return int(nvml.nvmlDeviceGetTotalEccErrors(device, kind, since))
    except nvml.NVMLError_NotSupported:
        return 0
