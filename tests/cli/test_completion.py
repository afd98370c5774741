"""Names that the shell completes: all there are, and without torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rprune.cli import completion

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["torchvision"] = None
from rprune.cli.app import main
main()
"""


def complete(tmp_path, line: str) -> list[str]:
    """What bash would offer behind ``line``."""
    words = line.split(" ")
    environment = {"_RPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH.replace("main()", "sys.argv = ['rprune']; main()")],
        cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("rprune prune model.pt --method ha", ["harp", "harp-r", "harp-s"]),
        ("rprune prune model.pt -m robust", ["robust-admm"]),
        ("rprune train --objective mart", ["mart"]),
        ("rprune train --arch vgg", ["vgg16", "vgg4"]),
        ("rprune attack model.pt --suite aa-l", ["aa-lite"]),
        ("rprune evaluate model.pt --suite apgd-ce,sq", ["apgd-ce,square"]),
        ("rprune train --data dig", ["digits"]),
        ("rprune list sch", ["schedules"]),
        ("rprune init --from hid", ["hidden"]),
    ],
)
def test_names_are_completed_without_torch(tmp_path, line, wanted):
    assert complete(tmp_path, line) == wanted


def test_every_registered_name_is_found_in_the_source():
    from rprune.attacks.base import ATTACKS
    from rprune.objectives.base import OBJECTIVES
    from rprune.pruning.base import METHODS

    assert completion.methods("") == sorted(METHODS.all())
    assert completion.objectives("") == sorted(OBJECTIVES.all())
    assert set(ATTACKS.all()) <= set(completion.suites(""))


def test_every_suite_and_format_is_offered():
    from rprune.attacks.suites import SUITES
    from rprune.pipeline.forms import FORMATS

    assert set(SUITES) <= set(completion.suites(""))
    assert completion.formats("") == sorted(FORMATS)


def test_recipes_are_names_and_files(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").touch()
    (tmp_path / "other.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "deep.toml").touch()
    monkeypatch.chdir(tmp_path)
    assert completion.recipes("") == ["digits", "folder/", "hidden", "mine.toml"]
    assert completion.recipes("folder/d") == ["folder/deep.toml"]


def test_torchvision_names_are_completed_where_it_is_asked_for():
    assert "torchvision:resnet18" in completion.architectures("torchvision:resnet1")
