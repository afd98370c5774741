"""kill -9 at random moments: the same command again ends with what it would have written if left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rprune.files import partial_folder, stored_key, write_json, write_text
from rprune.pipeline.finish import OLD, STATE, publish, tidy

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "faults.py"
RESULT = BENCHMARK.with_name("results") / "faults.json"


def killed(tmp_path: Path, points: int, *more: str) -> dict[str, object]:
    command = [sys.executable, BENCHMARK, "--points", str(points), "--seed", "11", "--output", tmp_path / "r.json"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "r.json").read_text())


def test_a_few_kills_of_training_lose_nothing(tmp_path):
    found = killed(tmp_path, 4, "--only", "train")
    assert (found["points"], found["losses"]) == (4, 0), found


@pytest.mark.slow
def test_kills_of_every_command_lose_nothing(tmp_path):
    found = killed(tmp_path, 12)
    assert found["points"] >= 12
    assert found["losses"] == 0, found


def test_the_committed_count_is_of_many_points_and_without_a_loss():
    found = json.loads(RESULT.read_text())
    assert found["points"] >= 30
    assert found["losses"] == 0


class Killed(BaseException):
    """What nothing catches: the process is gone."""


@pytest.mark.parametrize("at", range(4))
def test_a_result_gives_way_to_another_without_ever_being_there_by_half(tmp_path, monkeypatch, at):
    """Ended before each rename and each deletion: what is in the place is whole, and going on finds all it needs."""
    place = tmp_path / "stage"
    for name in ("key.json", "model", "stage.json"):
        write_json(place / name, {"key": "old"})
    partial = partial_folder(place, "new")
    for name in (STATE, "model", "stage.json"):
        write_text(partial / name, '{"key": "new"}')
    steps = []

    def counted(work):
        def step(*arguments, **options):
            steps.append(work)
            if len(steps) == at + 1:
                raise Killed
            return work(*arguments, **options)

        return step

    with monkeypatch.context() as patch:
        for name in ("pathlib.Path.replace", "shutil.rmtree", "pathlib.Path.unlink"):
            owner, _, attribute = name.rpartition(".")
            target = Path if owner == "pathlib.Path" else __import__(owner)
            patch.setattr(target, attribute, counted(getattr(target, attribute)))
        with pytest.raises(Killed):
            publish(partial, place)
    there = {path.name: json.loads(path.read_text())["key"] for path in place.glob("*") if path.suffix != ".pt"}
    assert set(there.values()) in ({"old"}, {"new"}, set())
    if there:
        assert set(there) == {"key.json", "model", "stage.json"}
    if stored_key(place) != "new":
        assert stored_key(partial) == "new"
        assert (partial / STATE).exists()  # all epochs are still known
        publish(partial, place)
    tidy(place)
    assert sorted(path.name for path in place.iterdir()) == ["key.json", "model", "stage.json"]
    assert not partial.exists()
    assert not (place / OLD).exists()
