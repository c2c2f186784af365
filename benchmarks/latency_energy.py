"""Joules that a GPU has used and the clock that it ran at, as NVML has them, where it does."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

__all__ = ["EnergyMeter"]

LEAST_S = 1.0  # the counter moves in steps of some tens of milliseconds


class EnergyMeter:
    """Of the first visible GPU, all of its work and idling included. why: of a meter that measures nothing, the reason."""

    def __init__(self, bus_id: str | None, *, nvml: Any = None) -> None:
        """bus_id: the GPU's PCI address as CUDA gives it, "0000:1b:00.0"; None without a GPU. nvml: a module in pynvml's place."""
        self.why, self._handle, self._clocks = "", None, False
        if bus_id is None:
            self.why = "not measured: there is no GPU"
            return
        try:
            self._nvml = nvml or importlib.import_module("pynvml")
        except ImportError:
            self.why = "not measured: the package nvidia-ml-py (pynvml) is not installed"
            return
        try:
            self._nvml.nvmlInit()
            self._device = self._nvml.nvmlDeviceGetHandleByPciBusId(bus_id.encode())
            self._clocks = True
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)
            self._handle = self._device
        except self._nvml.NVMLError as error:
            self.why = f"not measured: NVML says {error}"

    def clock_mhz(self) -> float | None:
        """Of the multiprocessors, now. None if NVML does not say."""
        if not self._clocks:
            return None
        try:
            return float(self._nvml.nvmlDeviceGetClockInfo(self._device, self._nvml.NVML_CLOCK_SM))
        except self._nvml.NVMLError:
            self._clocks = False
            return None

    def joules(self, call: Callable[[], object], *, least_s: float = LEAST_S) -> float | None:
        """Of one call, which must wait for its own work: the mean over as many as take `least_s`. None if NVML does not say."""
        if self._handle is None:
            return None
        count, began = 0, time.perf_counter()
        before = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)  # mJ since the driver was loaded
        while count == 0 or time.perf_counter() - began < least_s:
            call()
            count += 1
        used = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) - before
        return used / 1000 / count if used > 0 else None
