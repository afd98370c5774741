from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rprune.cli.console import ProgressLines
from rprune.errors import UsageError
from rprune.reports.events import event_files


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sample_report", Path(__file__).with_name("sample_report.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sample = _load()


@pytest.fixture
def read() -> Any:
    """``read(folder)``: {tag: [(step, value), ...]} as tensorboard itself reads it. Skips without tensorboard."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {}
        for path in sorted(folder.iterdir()):
            events = list(LegacyEventFileLoader(str(path)).Load())
            assert events[0].file_version == "brain.Event:2"
            for event in events[1:]:
                for value in event.summary.value:
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
        return found

    return scalars


def test_every_figure_of_every_stage_is_there(tmp_path: Path, read: Any) -> None:
    report = sample.sample_report()
    files = event_files(report)
    assert event_files(report) == files
    assert sorted(name.split("/")[0] for name in files) == ["finetune", "prune", "train"]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    for entry in report.lineage[:3]:
        found = read(tmp_path / entry.stage)
        assert set(found) == set(entry.history[0]) - {"epoch"}
        for tag, points in found.items():
            assert points == [(int(row["epoch"]), pytest.approx(row[tag], rel=1e-6)) for row in entry.history]


def test_times_lie_within_the_stage(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    report = sample.sample_report()
    (tmp_path / "events.out.tfevents.x").write_bytes(event_files(report)["prune/events.out.tfevents.report"])
    times = [event.wall_time for event in LegacyEventFileLoader(str(tmp_path / "events.out.tfevents.x")).Load()][1:]
    assert times == sorted(times)
    assert times[-1] - times[0] == pytest.approx(report.lineage[1].seconds * 19 / 20)


def test_stages_of_one_kind_are_runs_of_their_own() -> None:
    pytest.importorskip("tensorboard")
    lineage = sample.sample_report().lineage
    files = event_files(sample.sample_report(lineage=[*lineage, lineage[2], lineage[1]]))
    assert [name.split("/")[0] for name in files] == ["train", "prune", "finetune", "finetune-2", "prune-2"]


def test_no_stage_name_leaves_the_folder() -> None:
    pytest.importorskip("tensorboard")
    lineage = [entry.model_copy(update={"stage": "../../x"}) for entry in sample.sample_report().lineage[:1]]
    assert list(event_files(sample.sample_report(lineage=lineage, created="?"))) == ["-x/events.out.tfevents.report"]


def test_training_is_followed_live(tmp_path: Path, read: Any) -> None:
    with ProgressLines(True, tmp_path / "logs") as reporter:
        assert not (tmp_path / "logs").exists()
        for epoch in (1, 2):
            reporter.epoch("train", SimpleNamespace(epoch=epoch, epochs=2, values={"loss": epoch / 2}))  # type: ignore[arg-type]
            assert read(tmp_path / "logs" / "train")["loss"][-1] == (epoch, epoch / 2)  # before the end
        reporter.epoch("prune", SimpleNamespace(epoch=1, epochs=1, values={"gamma": 0.5}))  # type: ignore[arg-type]
    assert read(tmp_path / "logs" / "prune") == {"gamma": [(1, 0.5)]}


def test_without_tensorboard_there_is_a_hint_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with pytest.raises(UsageError) as caught:
        event_files(sample.sample_report())
    assert "pip install 'rprune[tensorboard]'" in caught.value.hint
    with pytest.raises(UsageError):
        ProgressLines(True, tmp_path)


def test_command_writes_a_run_for_each_stage(tmp_path: Path, read: Any) -> None:
    import json

    from rprune.cli.app import main

    (tmp_path / "report.json").write_text(json.dumps(sample.sample_report().to_json()))
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path), "--tensorboard", str(tmp_path / "logs")])
    assert not end.value.code
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["finetune", "prune", "train"]
    assert len(read(tmp_path / "logs" / "prune")["gamma"]) == 20


def test_a_smoke_run_says_so_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    written = SimpleNamespace(write=lambda stream, *_: stream.write(b"."))
    monkeypatch.setattr("rprune.reports.events._Records", lambda: written)
    assert "train-smoke/events.out.tfevents.report" in event_files(sample.sample_report(None, smoke=True))
    assert "train/events.out.tfevents.report" in event_files(sample.sample_report(None))
