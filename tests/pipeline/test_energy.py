"""Energy of a stage: counters that wrap, fail or are not there, and the sum over processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from rprune.files import atomic
from rprune.pipeline import energy as energy_module
from rprune.pipeline.artifact import load_artifact
from rprune.pipeline.bench import architecture
from rprune.pipeline.energy import Meter
from rprune.pipeline.recipe import ModelSection, PruneStage, TrainStage
from rprune.pipeline.single import run_single
from rprune.reports.schema import LineageEntry

RANGE = 262_143_328_850  # microjoules
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
PROCESS = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from rprune.pipeline.energy import Meter
from rprune.training.world import world

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
counter = folder / "rapl" / "intel-rapl:0" / "energy_uj"
with Meter(torch.device("cpu"), folder / "rapl") as meter:
    world().wait()
    if rank == 0:
        counter.write_text(str(int(counter.read_text()) + 90_000_000))
    world().wait()
meter._gpu_joules = 5.0 if rank else None  # as if this process alone had a GPU
found = meter.energy(world())
(folder / f"{rank}.json").write_text(found.model_dump_json())
"""


@pytest.fixture
def rapl(tmp_path: Path) -> Path:
    """Two packages with a part each, and the platform around them."""
    for zone, name in (
        ("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:1", "package-1"),
        ("intel-rapl:1:0", "dram"), ("intel-rapl:2", "psys"), ("intel-rapl-mmio:0", "package-0"),
    ):  # fmt: skip
        folder = tmp_path / "rapl" / zone
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
        (folder / "energy_uj").write_text("1000000\n")
    return tmp_path / "rapl"


def draw(rapl: Path, zone: str, joules: float) -> None:
    """At once: a reader finds the old number or the new one, as in sysfs."""
    counter = rapl / zone / "energy_uj"
    with atomic(counter) as temporary:
        temporary.write_text(f"{(int(counter.read_text()) + round(joules * 1e6)) % RANGE}\n")


class NVMLError(Exception): ...


@pytest.fixture
def nvml(monkeypatch) -> ModuleType:
    """pynvml with one GPU, whose counter is ``millijoules``."""
    fake = ModuleType("pynvml")
    fake.NVMLError, fake.millijoules, fake.asked = NVMLError, 7_000, []

    def handle(uuid: str) -> str:
        fake.asked.append(uuid)
        return "handle"

    def consumption(found: str) -> int:
        assert found == "handle"
        if fake.millijoules is None:
            raise NVMLError
        return fake.millijoules

    fake.nvmlInit, fake.nvmlDeviceGetHandleByUUID = lambda: None, handle
    fake.nvmlDeviceGetTotalEnergyConsumption = consumption
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0a1b-2c3d"))
    return fake


def test_packages_are_summed_and_their_parts_are_not(rapl: Path) -> None:
    with Meter(CPU, rapl) as meter:
        for zone in ("intel-rapl:0:0", "intel-rapl:1:0", "intel-rapl:2", "intel-rapl-mmio:0"):
            draw(rapl, zone, 400)
        draw(rapl, "intel-rapl:0", 30)
        draw(rapl, "intel-rapl:1", 12.5)
    found = meter.energy()
    assert found is not None
    assert (found.cpus, found.cpu_joules, found.gpus, found.gpu_joules) == (2, 42.5, 0, 0)
    assert found.joules == 42.5
    assert not found.resumed
    assert not meter._reader.is_alive()


def test_a_counter_that_begins_anew(rapl: Path) -> None:
    (rapl / "intel-rapl:0" / "energy_uj").write_text(str(RANGE - 40_000_000))
    with Meter(CPU, rapl) as meter:
        draw(rapl, "intel-rapl:0", 100)
    found = meter.energy()
    assert found is not None
    assert found.cpu_joules == pytest.approx(100)


def test_a_long_stage_is_read_in_between(rapl: Path, monkeypatch) -> None:
    """Two rounds of the counter, which its ends alone would not show."""
    clock = [0.0]
    monkeypatch.setattr(energy_module.time, "monotonic", lambda: clock[0])
    with Meter(CPU, rapl) as meter:
        meter._over.set()  # the test is the reader
        for _ in range(30):
            clock[0] += 100
            draw(rapl, "intel-rapl:0", 20_000)
            meter._read()
    found = meter.energy()
    assert found is not None
    assert found.cpu_joules == pytest.approx(600_000)
    assert found.seconds == 3000


def test_the_reader_reads_by_itself(rapl: Path, monkeypatch) -> None:
    monkeypatch.setattr(energy_module, "EVERY", 0.001)
    with Meter(CPU, rapl) as meter:
        package = meter._packages[0]
        for drawn in (900, 1800, 2700):  # together more than one reading may find after so short a time
            draw(rapl, "intel-rapl:0", 900)
            for _ in range(2000):
                if package.joules == drawn:
                    break
                time.sleep(0.001)
    found = meter.energy()
    assert found is not None
    assert (found.cpus, found.cpu_joules) == (2, 2700)


@pytest.mark.parametrize(("seconds", "joules"), [(400, 1), (10, 20_000)])
def test_what_is_not_known_is_not_counted(rapl: Path, monkeypatch, seconds: float, joules: float) -> None:
    """Read so late that the counter may have gone round; more than a package draws."""
    clock = [0.0]
    monkeypatch.setattr(energy_module.time, "monotonic", lambda: clock[0])
    with Meter(CPU, rapl) as meter:
        clock[0] += seconds
        draw(rapl, "intel-rapl:0", joules)
    found = meter.energy()
    assert found is None or found.cpus == (1 if seconds < 100 else 0)
    assert found is None or found.cpu_joules == 0


def test_unreadable_counters_are_left_out(rapl: Path, monkeypatch) -> None:
    """At the beginning one, later the other; a folder of another make is none of ours."""
    (rapl / "intel-rapl:3").mkdir()
    denied = {rapl / "intel-rapl:0" / "energy_uj"}
    read = Path.read_text

    def guarded(path: Path, *arguments: str) -> str:
        if path in denied:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *arguments)

    monkeypatch.setattr(Path, "read_text", guarded)
    with Meter(CPU, rapl) as meter:
        (rapl / "intel-rapl:1" / "energy_uj").write_text("21000000")
    found = meter.energy()
    assert found is not None
    assert (found.cpus, found.cpu_joules) == (1, 20)
    with Meter(CPU, rapl) as meter:
        denied.add(rapl / "intel-rapl:1" / "energy_uj")
    assert meter.energy() is None


def test_no_counters_no_energy(tmp_path: Path) -> None:
    with Meter(CPU, tmp_path / "nothing") as meter:
        pass
    assert meter.energy() is None
    assert meter.seconds > 0


def test_a_gpu_is_found_by_its_uuid(nvml: ModuleType, tmp_path: Path) -> None:
    with Meter(CUDA, tmp_path) as meter:
        nvml.millijoules = 19_500
    found = meter.energy(resumed=True)
    assert found is not None
    assert (found.gpus, found.gpu_joules, found.cpus, found.resumed) == (1, 12.5, 0, True)
    assert nvml.asked == ["GPU-0a1b-2c3d"]
    with Meter(CPU, tmp_path) as meter:
        pass
    assert meter.energy() is None


@pytest.mark.parametrize("fault", ["first", "last", "back", "old", "absent"])
def test_a_gpu_that_tells_nothing(nvml: ModuleType, tmp_path: Path, monkeypatch, fault: str) -> None:
    if fault == "first":
        nvml.millijoules = None
    if fault == "old":
        del nvml.nvmlDeviceGetTotalEnergyConsumption
    if fault == "absent":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    with Meter(CUDA, tmp_path) as meter:
        nvml.millijoules = {"last": None, "back": 5}.get(fault, nvml.millijoules)
    assert meter.energy() is None


@pytest.mark.slow
@pytest.mark.usefixtures("rapl")
def test_two_processes_add_up_and_a_package_counts_once(tmp_path: Path) -> None:
    (tmp_path / "process.py").write_text(PROCESS)
    environment = {k: v for k, v in os.environ.items() if k != "LOCAL_RANK"} | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, str(tmp_path / "process.py"), str(rank), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=100) for process in running] == [0, 0]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (found["gpus"], found["gpu_joules"], found["cpus"], found["cpu_joules"]) == (1, 5.0, 2, 90.0)


def test_a_stage_keeps_what_it_drew(bench, trained, rapl: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(energy_module, "RAPL", rapl)
    stage = PruneStage(method="lwm", sparsity=0.5)
    made = run_single(bench, stage, trained, tmp_path / "pruned.safetensors")
    entry = load_artifact(tmp_path / "pruned.safetensors").metadata.lineage[-1]
    assert entry.energy == made.metadata.lineage[-1].energy
    assert entry.energy is not None
    assert (entry.energy.cpus, entry.energy.cpu_joules, entry.energy.resumed) == (2, 0, False)
    assert 0 < entry.seconds <= entry.energy.seconds


def test_a_stage_that_goes_on_says_so(bench, rapl: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(energy_module, "RAPL", rapl)
    arch = architecture(ModelSection(arch="cnn-small"), bench.data)
    stage = TrainStage(objective="benign", epochs=2, batch_size=64)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bench.reporter, "epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            run_single(bench, stage, None, tmp_path / "model.pt", arch=arch)
    made = run_single(bench, stage, None, tmp_path / "model.pt", arch=arch)
    energy = made.metadata.lineage[-1].energy
    assert energy is not None
    assert energy.resumed


def test_a_stage_without_counters_is_written_as_before(bench, trained, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(energy_module, "RAPL", tmp_path / "nothing")
    made = run_single(bench, PruneStage(method="lwm", sparsity=0.5), trained, tmp_path / "pruned")
    assert made.metadata.lineage[-1].energy is None
    record = json.loads((tmp_path / "pruned" / "stage.json").read_text())
    assert "energy" not in record["metadata"]["lineage"][-1]
    assert LineageEntry.model_validate(record["metadata"]["lineage"][-1]) == made.metadata.lineage[-1]
