"""Measuring files: what is measured, the arithmetic on times, and footprints from fresh processes."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from rprune.errors import InputError, UsageError, WorkError
from rprune.export import speed
from rprune.export.c.writer import c_source
from rprune.export.compact_onnx import expanding
from rprune.export.onnx import plain_model
from rprune.export.packed import pack_int8
from rprune.export.qdq import qdq_model
from rprune.export.speed import BLOCK, core_counts, is_dense, latencies, measured, runnable, runtimes, sizes_of, to_json
from rprune.models.flat import canonical
from rprune.models.graph import trace

pytestmark = pytest.mark.usefixtures("c_cache")

FILES = ["model.c", "model.compact.onnx", "model.int8.onnx", "model.onnx", "model.packed.safetensors"]


@pytest.fixture(scope="module")
def exported(load_helper, tmp_path_factory) -> Path:
    """A small sparse network in every form, between files that cannot be run."""
    nets = load_helper("quantization/nets.py")
    folder = tmp_path_factory.mktemp("exported")
    network, integers, twin = nets.quantised(nets.make("lenet", 0.2))
    write_c(twin, nets.SHAPE, folder)
    model = qdq_model(twin, nets.SHAPE, 10)
    (folder / "model.int8.onnx").write_bytes(model.SerializeToString())
    (folder / "model.compact.onnx").write_bytes(expanding(model).SerializeToString())
    (folder / "model.onnx").write_bytes(plain_model(canonical(network), nets.SHAPE, 10).SerializeToString())
    (folder / "model.packed.safetensors").write_bytes(pack_int8(network, integers, {}))
    save_file({"weight": np.zeros(3, np.float32)}, folder / "model.safetensors")
    (folder / "report.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def floats(tmp_path_factory) -> Path:
    """A float network, dense and compact."""
    folder = tmp_path_factory.mktemp("floats")
    shape = (1, 12, 12)
    network = canonical(trace(sparse_net(), shape))
    model = plain_model(network, shape, 3)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "model.compact.onnx").write_bytes(expanding(model).SerializeToString())
    return folder


def sparse_net() -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(144, 3)
    model = nn.Sequential(*layers).eval()
    for layer in (model[0], model[4]):
        layer.weight.data *= torch.rand_like(layer.weight) < 0.1
    return model


def write_c(network: Any, shape: tuple[int, int, int], folder: Path) -> None:
    found = c_source(network, shape)
    (folder / "model.h").write_text(found.header)
    (folder / "model.c").write_text(found.source)


class Fake:
    """Takes ``costs`` seconds of a clock that it advances itself, call after call; remembers its batches."""

    def __init__(self, time: list[float], costs: list[float], shape: tuple[int, int, int] = (1, 2, 2)) -> None:
        self.time, self.costs, self.input_shape = time, costs, shape
        self.batches: list[np.ndarray] = []

    def logits(self, images: np.ndarray) -> np.ndarray:
        self.time[0] += self.costs[len(self.batches) % len(self.costs)]
        self.batches.append(images)
        return np.zeros((len(images), 3), np.float32)


@pytest.fixture
def fakes(monkeypatch):
    """``fakes(costs by file, shapes by file)``: (clock, the fake of each file); model.onnx is the dense one."""

    def patch(costs: dict[str, list[float]], shapes: dict[str, tuple[int, int, int]] | None = None):
        time = [0.0]
        made = {name: Fake(time, cost, (shapes or {}).get(name, (1, 2, 2))) for name, cost in costs.items()}

        def found(path: Path, threads: int):
            if path.suffix == ".c":
                return {"C": lambda: made[path.name]} if threads == 1 else {}
            return {"ONNX Runtime": lambda: made[path.name]}

        monkeypatch.setattr(speed, "runtimes", found)
        monkeypatch.setattr(speed, "is_dense", lambda path: path.name == "model.onnx")
        return lambda: time[0], made

    return patch


# what is measured


def test_a_folder_stands_for_its_models_and_each_file_counts_once(exported):
    everything = [exported / name for name in FILES]
    assert runnable([exported]) == everything
    assert runnable([exported / "model.onnx", exported, exported / "model.c"]) == [
        exported / "model.onnx",
        *[path for path in everything if path.name != "model.onnx"],
    ]
    assert runnable([]) == []


def test_other_things_cannot_be_run(exported, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "model.onnx.d").mkdir()
    (tmp_path / "folder.onnx").mkdir()
    for path, words in [
        (tmp_path / "none.onnx", "is not there"),
        (tmp_path / "none.txt", "is not there"),
        (tmp_path / "notes.txt", "cannot be run"),
        (exported / "model.safetensors", "cannot be run"),
        (exported / "model.h", "cannot be run"),
        (tmp_path, "holds no exported model"),
        (tmp_path / "folder.onnx", "holds no exported model"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            runnable([exported / "model.onnx", path])
        assert str(path) in caught.value.message
    with pytest.raises(InputError, match="cannot be run"):
        runtimes(exported / "model.packed.safetensors", 1)


def test_runtimes_of_a_file(exported):
    assert set(runtimes(exported / "model.c", 1)) == {"C"}
    assert runtimes(exported / "model.c", 2) == {}
    x = np.random.RandomState(0).random_sample((300, 1, 8, 8)).astype(np.float32)
    for threads in (1, 2):
        run = runtimes(exported / "model.int8.onnx", threads)["ONNX Runtime"]()
        assert np.array_equal(run.logits(x), runtimes(exported / "model.c", 1)["C"]().logits(x))
    calls: list[int] = []
    session = run._session
    run._session = type(
        "Spy", (), {"run": lambda _, out, x: (calls.append(len(*x.values())), session.run(out, x))[1]}
    )()
    run.logits(x)
    assert calls == [300], "a batch was measured in parts"


def test_openvino_gives_the_same_labels(exported):
    pytest.importorskip("openvino")
    x = np.random.RandomState(0).random_sample((32, 1, 8, 8)).astype(np.float32)
    found = runtimes(exported / "model.onnx", 1)
    assert set(found) == {"ONNX Runtime", "OpenVINO"}
    np.testing.assert_allclose(found["OpenVINO"]().logits(x), found["ONNX Runtime"]().logits(x), atol=1e-4)


def test_the_dense_file_is_the_float_one_that_is_not_to_be_expanded(exported, floats):
    assert {name: is_dense(exported / name) for name in FILES[:4]} == {
        "model.c": False, "model.compact.onnx": False, "model.int8.onnx": False, "model.onnx": True,
    }  # fmt: skip
    assert is_dense(floats / "model.onnx")
    assert not is_dense(floats / "model.compact.onnx")


# numbers of options


def test_sizes():
    assert sizes_of("1", "--batch-size") == (1,)
    assert sizes_of("64, 1,64", "--batch-size") == (64, 1, 64)


@pytest.mark.parametrize("text", ["", "0", "-1", "1,", "1,,2", "a", "1.5", "1,0", "1;2", "1e3"])
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError, match="cannot read --batch-size") as caught:
        sizes_of(text, "--batch-size")
    assert caught.value.exit_code == 2


def test_zero_threads_are_all_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5}, raising=False)
    assert core_counts("1,0") == (1, 4)
    assert core_counts("0, 4,2,4") == (4, 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7}, raising=False)
    assert core_counts("1,0") == (1,)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert core_counts("0") == (3,)
    for text in ("", "00x", "-1", "1,"):
        with pytest.raises(UsageError, match="cannot read --threads"):
            core_counts(text)


# times


def test_medians_percentiles_and_ratios(fakes):
    """By hand: each block is one call that is not timed, then five that are."""
    slow, fast = [9.0, 0.004, 0.008, 0.004, 0.002, 0.012], [7.0, 0.001, 0.001, 0.001, 0.003, 0.001]
    clock, made = fakes({"model.int8.onnx": fast, "model.onnx": slow, "model.c": [0.001]})
    files = [Path(name) for name in ("model.int8.onnx", "model.onnx", "model.c")]
    rows = {row.file: row for row in latencies(files, batches=(3,), rounds=2, clock=clock)}
    assert list(rows) == [path.name for path in files]
    assert {(r.batch, r.threads, r.calls) for r in rows.values()} == {(3, 1, 2 * BLOCK)}
    assert [rows[path.name].runtime for path in files] == ["ONNX Runtime", "ONNX Runtime", "C"]
    assert (rows["model.onnx"].p50, rows["model.onnx"].ratio) == (4.0, 1.0)
    assert rows["model.onnx"].p95 == pytest.approx(12.0)
    assert (rows["model.int8.onnx"].p50, rows["model.int8.onnx"].ratio) == (1.0, 4.0)
    assert rows["model.int8.onnx"].p95 == pytest.approx(3.0)
    assert (rows["model.c"].p50, rows["model.c"].p95, rows["model.c"].ratio) == (1.0, 1.0, 4.0)
    assert all(batch.shape == (3, 1, 2, 2) for batch in made["model.c"].batches)


def test_every_runtime_is_called_in_turns_with_the_same_images(fakes):
    clock, made = fakes({"model.onnx": [0.001], "model.c": [0.001]})
    turns: list[str] = []
    for name, fake in made.items():
        logits = fake.logits
        fake.logits = lambda x, name=name, logits=logits: (turns.append(name), logits(x))[1]
    latencies([Path("model.onnx"), Path("model.c")], batches=(2,), rounds=3, clock=clock, seed=5)
    assert turns == (["model.onnx"] * (BLOCK + 1) + ["model.c"] * (BLOCK + 1)) * 3
    first = made["model.onnx"].batches[0]
    assert first.dtype == np.float32
    assert 0 <= first.min() < first.max() <= 1
    assert all(np.array_equal(first, batch) for fake in made.values() for batch in fake.batches)
    latencies([Path("model.onnx")], batches=(2,), rounds=1, clock=clock, seed=6)
    assert not np.array_equal(made["model.onnx"].batches[-1], first)


def test_without_a_float_file_there_is_no_ratio(fakes):
    clock, _ = fakes({"model.int8.onnx": [0.002], "model.c": [0.001]})
    rows = latencies([Path("model.int8.onnx"), Path("model.c")], batches=(1,), rounds=1, clock=clock)
    assert [row.ratio for row in rows] == [None, None]


def test_batches_and_threads_are_measured_apart_and_c_on_one_thread(fakes):
    clock, _ = fakes({"model.onnx": [0.002], "model.c": [0.001]})
    seen: list[tuple[int, int]] = []
    rows = latencies(
        [Path("model.onnx"), Path("model.c")], batches=(1, 4), threads=(1, 2), rounds=2, clock=clock,
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert [(row.file, row.batch, row.threads) for row in rows] == [
        ("model.onnx", 1, 1), ("model.c", 1, 1), ("model.onnx", 4, 1), ("model.c", 4, 1),
        ("model.onnx", 1, 2), ("model.onnx", 4, 2),
    ]  # fmt: skip
    assert seen == [(done, 8) for done in range(1, 9)]
    seen.clear()
    rows = latencies(
        [Path("model.c")], batches=(1,), threads=(1, 2), rounds=2, clock=clock,
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert [(row.file, row.threads) for row in rows] == [("model.c", 1)]
    assert seen == [(1, 2), (2, 2)], "progress ends where the work ends"
    assert latencies([Path("model.c")], threads=(2,), clock=clock) == []
    assert latencies([], clock=clock) == []


def test_files_of_different_images_are_refused(fakes):
    clock, _ = fakes({"model.onnx": [1.0], "model.c": [1.0]}, {"model.c": (3, 2, 2)})
    with pytest.raises(InputError, match="images of different sizes") as caught:
        latencies([Path("model.onnx"), Path("model.c")], clock=clock)
    assert "(1, 2, 2), (3, 2, 2)" in caught.value.message


def test_real_files(exported):
    files = [exported / name for name in FILES[:4]]
    rows = latencies(files, batches=(1, 3), rounds=1)
    assert {(row.file, row.batch) for row in rows if row.runtime != "OpenVINO"} == {
        (name, batch) for name in FILES[:4] for batch in (1, 3)
    }
    assert all(0 < row.p50 <= row.p95 for row in rows)
    dense = [row for row in rows if row.file == "model.onnx" and row.runtime == "ONNX Runtime"]
    assert [row.ratio for row in dense] == [1, 1]
    for base in dense:
        for row in rows:
            if row.batch == base.batch:
                assert row.ratio == pytest.approx(base.p50 / row.p50, rel=0.05, abs=2e-3)


def test_json(fakes):
    clock, _ = fakes({"model.onnx": [0.002]})
    rows = latencies([Path("model.onnx")], batches=(1,), rounds=1, clock=clock)
    found = to_json([speed.Footprint("model.onnx", 3, 2, 1.5, 4)], rows)
    assert found == {
        "files": [{"file": "model.onnx", "bytes": 3, "zipped": 2, "load_ms": 1.5, "memory": 4}],
        "latency": [
            {"file": "model.onnx", "runtime": "ONNX Runtime", "batch": 1, "threads": 1, "calls": BLOCK, "p50": 2.0,
             "p95": 2.0, "ratio": 1.0},
        ],
    }  # fmt: skip


# fresh processes


@pytest.mark.parametrize("name", ["model.int8.onnx", "model.c", "model.packed.safetensors"])
def test_footprint(exported, name):
    found, content = measured(exported / name), (exported / name).read_bytes()
    assert (found.file, found.bytes, found.zipped) == (name, len(content), len(zlib.compress(content, 9)))
    assert found.load_ms > 0
    if Path("/proc/self/status").exists():
        assert 0 <= found.memory < 1 << 30
        assert found.memory > 1 << 20 or name != "model.int8.onnx", "ONNX Runtime alone takes megabytes"


def test_memory_is_that_of_a_fresh_process(exported):
    ballast = np.ones(64 << 17)  # 64 MiB
    found = measured(exported / "model.c")
    assert ballast.sum() == 64 << 17
    assert found.memory < 32 << 20


def test_compiling_is_not_loading(exported, monkeypatch, tmp_path):
    """The compiler runs here, before: the process finds the library in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    real, left = speed.subprocess.run, []

    def run(*arguments: Any, **more: Any) -> Any:
        if "rprune.export.speed" in arguments[0]:
            left.extend((tmp_path / "rprune").glob("*.so"))
        return real(*arguments, **more)

    monkeypatch.setattr(speed.subprocess, "run", run)
    measured(exported / "model.c")
    assert len(left) == 1


def test_files_of_the_working_folder_are_not_imported(exported, monkeypatch, tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit('this is not the json you want')")
    monkeypatch.chdir(tmp_path)
    assert measured(exported / "model.packed.safetensors").load_ms > 0


def test_files_that_cannot_be_loaded(exported, tmp_path):
    for name, words in [("model.onnx", "not a valid ONNX"), ("model.packed.safetensors", "not a sound packed file")]:
        path = tmp_path / name
        path.write_bytes((exported / name).read_bytes()[:500])
        with pytest.raises(InputError, match=words) as caught:
            measured(path)
        assert str(path) in caught.value.message
        assert "\n" not in caught.value.message
    (tmp_path / "model.c").write_text("int main(void) { return 0; }")
    with pytest.raises(InputError, match=r"model\.h"):
        measured(tmp_path / "model.c")


def test_a_process_that_fails_says_why(exported, monkeypatch):
    monkeypatch.setattr(speed.sys, "executable", "false")
    with pytest.raises(WorkError, match="it ended without a word"):
        measured(exported / "model.onnx")
