"""The method of docs/adding-a-method.md works as it stands there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rprune.cli.app import main
from rprune.pipeline.artifact import load_artifact

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def file(tmp_path):
    text = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    path = tmp_path / "saliency.py"
    path.write_text(text.partition("```python\n")[2].partition("```")[0])
    return path


@pytest.mark.usefixtures("file")
def test_it_prunes_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (
        ["train", "--data", "digits", "--objective", "benign", "--epochs", "1", "-o", "model.pt"],
        ["prune", "model.pt", "-s", "0.99", "-m", "saliency.py:Saliency", "--epochs", "2", "-o", "pruned.pt"],
    ):
        with pytest.raises(SystemExit) as done:
            main([*command, "-q"])
        assert done.value.code == 0
    pruned = load_artifact(Path("pruned.pt"))
    assert sum(int(mask.sum()) for mask in pruned.masks.values()) == pruned.metadata.budget == 222


@pytest.mark.slow
def test_the_contract_suite_runs_on_it(file):
    command = [sys.executable, "-m", "pytest", "tests/pruning/test_method_contract.py", "-q", "--rprune-method"]
    done = subprocess.run([*command, f"{file}:Saliency"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    broken = file.with_name("broken.py")
    broken.write_text(file.read_text().replace("self.budget.kept", "self.budget.kept + 1"))
    done = subprocess.run([*command, f"{broken}:Saliency"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1  # the suite can fail
