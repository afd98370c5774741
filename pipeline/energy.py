"""What a stage draws, where the machine's own counters tell it.

Of NVIDIA's GPUs the one that a process computes on (NVML's total energy, Volta and later, by the package nvidia-ml-py);
of CPUs the packages of Linux RAPL, where they may be read. A counter is that of a whole device, whoever uses it.
Memory, disks, cooling and the rest of the machine have none here, and are not counted.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import torch

from rprune.reports.schema import Energy
from rprune.training.world import World, world

RAPL = Path("/sys/class/powercap")
EVERY = 20.0  # seconds between readings: the smallest ranges, 65 kJ, last for minutes
MOST = 1000.0  # watts, more than a CPU package draws


class Package:
    """The counter of one CPU package: microjoules, which begin anew at the end of their range.

    Raises OSError or ValueError where it cannot be read.
    """

    def __init__(self, zone: Path) -> None:
        self._counter = zone / "energy_uj"
        self._range = int((zone / "max_energy_range_uj").read_text())
        self._last, self._at = int(self._counter.read_text()), time.monotonic()
        self.joules = 0.0

    def read(self) -> None:
        """Add what was drawn since the last reading.

        Raises ValueError, too, where that is not known: so long ago that the counter may have begun anew twice, or more
        than a package can draw, after the counter was set back (the machine slept).
        """
        now, at = int(self._counter.read_text()), time.monotonic()
        drawn = (now - self._last + (self._range if now < self._last else 0)) / 1e6
        most = MOST * (at - self._at + 1)
        if drawn > most or most > self._range / 1e6:
            raise ValueError(f"{self._counter} was read too late")
        self.joules += drawn
        self._last, self._at = now, at


class Gpu:
    """The counter of the GPU that a device is, in millijoules since the driver was loaded.

    Raises ``nvml``'s NVMLError, or AttributeError of a module too old, where no energy is told.
    """

    def __init__(self, nvml: Any, device: torch.device) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        # by UUID: NVML numbers all GPUs of the machine, CUDA those that it is let see
        self._handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        self._first = self._now()

    def joules(self) -> float | None:
        """Drawn so far; None where the counter cannot be read any more, or was set back."""
        try:
            drawn = (self._now() - self._first) / 1e3
        except self._nvml.NVMLError:
            return None
        return drawn if drawn >= 0 else None

    def _now(self) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))


class Meter:
    """Reads the counters of this process's GPU and, in one process a machine, of its CPU packages, in a ``with`` block.

    What cannot be read at the beginning, in between or at the end is not counted. ``rapl``: where the zones lie.
    """

    def __init__(self, device: torch.device, rapl: Path | None = None) -> None:
        self.seconds = 0.0
        self._device, self._rapl = device, rapl or RAPL
        self._gpu: Gpu | None = None
        self._packages: list[Package] = []
        self._gpu_joules: float | None = None
        self._over = threading.Event()
        self._reader = threading.Thread(target=self._keep_reading, daemon=True)

    def __enter__(self) -> Meter:
        self._started = time.monotonic()
        self._gpu = _gpu(self._device)
        if int(os.environ.get("LOCAL_RANK") or world().rank) == 0:
            self._packages = _packages(self._rapl)
        if self._packages:
            self._reader.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._over.set()
        if self._reader.is_alive():
            self._reader.join()
        self._read()
        self._gpu_joules = None if self._gpu is None else self._gpu.joules()
        self.seconds = time.monotonic() - self._started

    def energy(self, here: World | None = None, *, resumed: bool = False) -> Energy | None:
        """What was drawn inside the block, in all processes of ``here``, which then all have to call this.

        None: no counter of any process could be read. ``resumed``: an interrupted process did the beginning.
        """
        gpu = self._gpu_joules
        found = [float(gpu is not None), gpu or 0.0, float(len(self._packages)), sum(p.joules for p in self._packages)]
        sums = torch.tensor(found, dtype=torch.float64)
        (here or World()).sum_([sums])
        gpus, gpu_joules, packages, cpu_joules = sums.tolist()
        if not gpus and not packages:
            return None
        return Energy(
            seconds=round(self.seconds, 3), gpus=int(gpus), gpu_joules=round(gpu_joules, 3), cpus=int(packages),
            cpu_joules=round(cpu_joules, 3), resumed=resumed,
        )  # fmt: skip

    def _keep_reading(self) -> None:
        while not self._over.wait(EVERY):
            self._read()

    def _read(self) -> None:
        for package in list(self._packages):
            try:
                package.read()
            except (OSError, ValueError):
                self._packages.remove(package)


def _gpu(device: torch.device) -> Gpu | None:
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        return Gpu(pynvml, device)
    except (pynvml.NVMLError, AttributeError):
        return None


def _packages(rapl: Path) -> list[Package]:
    """Those that may be read; zones beside them are parts of a package (core, dram), or hold it (psys)."""
    found = []
    for zone in sorted(rapl.glob("intel-rapl:*")):
        try:
            if (zone / "name").read_text().startswith("package"):
                found.append(Package(zone))
        except (OSError, ValueError):
            continue
    return found
