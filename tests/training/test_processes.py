"""Several processes train as one: the same curve and masks, and what happens when one of them is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rprune.training.world import World

SCRIPT = Path(__file__).parent / "processes.py"


@pytest.fixture(scope="module")
def processes(load_helper):
    return load_helper("training/processes.py")


def together(case: str, folder: Path, size: int = 2, state: Path | None = None, **environment: str) -> list[Any]:
    """What each process wrote; None of one that wrote nothing."""
    store = folder / "store"
    store.unlink(missing_ok=True)
    outs = [folder / f"out{rank}.json" for rank in range(size)]
    for out in outs:
        out.unlink(missing_ok=True)
    running = [
        subprocess.Popen(
            [
                sys.executable,
                str(SCRIPT),
                case,
                str(rank),
                str(size),
                str(store),
                str(out),
                *([str(state)] * bool(state)),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )
        for rank, out in enumerate(outs)
    ]
    for process in running:
        process.wait(timeout=300)
    return [json.loads(out.read_text()) if out.exists() else None for out in outs]


EXACT = ["dense", "hydra", "harp", "admm", "rigl", "free", "perturbed", "accumulated"]


@pytest.mark.slow
@pytest.mark.parametrize("case", EXACT)
def test_two_processes_train_as_one(processes, tmp_path: Path, case: str) -> None:
    alone = processes.summary(*processes.train(case))
    first, second = together(case, tmp_path)
    assert first == second
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-9)
    assert first["accuracy"] == alone["accuracy"]
    assert first["norms"] == pytest.approx(alone["norms"], rel=1e-9)
    assert first["masks"] == alone["masks"]
    assert first["kept"] == alone["kept"]


@pytest.mark.slow
def test_three_processes_with_batch_norm_hold_one_model(processes, tmp_path: Path) -> None:
    """Statistics are those of each process's rows: near one process, equal among them."""
    alone = processes.summary(*processes.train("batch norm"))
    found = together("batch norm", tmp_path, 3)
    assert found[0] == found[1] == found[2]
    assert found[0]["losses"] == pytest.approx(alone["losses"], rel=0.15)


def test_parts_one_after_another_are_the_whole_batch(processes, monkeypatch) -> None:
    parts = processes.summary(*processes.train("accumulated"))
    monkeypatch.setitem(processes.CASES, "whole", (*processes.CASES["accumulated"][:4], {}))
    whole = processes.summary(*processes.train("whole"))
    assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-9)
    assert parts["masks"] == whole["masks"]
    assert parts["norms"] == pytest.approx(whole["norms"], rel=1e-9)


@pytest.mark.slow
def test_a_lost_process_ends_the_others_and_the_run_resumes(tmp_path: Path) -> None:
    whole, _ = together("killed", tmp_path)
    state = tmp_path / "state.pt"
    first, second = together("killed", tmp_path, state=state, RPRUNE_KILL="1")
    assert second is None
    assert first["code"] == 4
    assert "another process of this run has ended" in first["error"]
    assert "goes on from the last epoch" in first["hint"]
    again = together("killed", tmp_path, state=state)
    assert again == [whole, whole]


def test_alone_nothing_is_sent() -> None:
    here = World()
    tensor = torch.ones(3)
    here.sum_([tensor])
    here.mean_([tensor])
    here.need_same([tensor])
    here.wait()
    assert tensor.tolist() == [1, 1, 1]
    assert here.shared(tensor) is tensor
    assert here.parts() == [(0, 1)]
    assert World(1, 4).parts(2) == [(2, 8), (3, 8)]
