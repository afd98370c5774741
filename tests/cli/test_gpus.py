"""--gpus: several processes for one command, on the CPU here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rprune.pipeline.artifact import load_artifact

TWO = ("--gpus", 2, "--device", "cpu")
MODEL = "model-lwm-0.5-finetuned.pt"
TRAIN = ("-m", "rprune", "train", "-d", "digits", "--objective", "n-fgsm", "--set", "select=last")
RECIPE = """
rprune = 1
name = "two"
[data]
source = "digits"
[model]
arch = "cnn-small"
[[stage]]
kind = "train"
objective = "n-fgsm"
epochs = 2
[[stage]]
kind = "prune"
method = "hydra"
objective = "n-fgsm"
sparsity = 0.5
epochs = 1
[[stage]]
kind = "quantize"
[[stage]]
kind = "certify"
methods = ["ibp"]
limit = 4
[[stage]]
kind = "export"
formats = ["safetensors", "onnx-int8"]
suite = "pgd"
limit = 8
health = false
"""


@pytest.mark.slow
def test_two_processes_make_what_one_makes(python, tmp_path: Path) -> None:
    one = python(*TRAIN, "--epochs", 2, "--device", "cpu", "-o", "one.pt", cwd=tmp_path)
    assert one.code == 0, one.err
    two = python(*TRAIN, "--epochs", 2, *TWO, "-o", "two.pt", "--json", cwd=tmp_path)
    assert two.code == 0, two.err
    assert json.loads(two.out)["output"] == "two.pt"  # one document, of the first process
    first, second = (load_artifact(tmp_path / name) for name in ("one.pt", "two.pt"))
    for name, tensor in first.state.items():
        torch.testing.assert_close(second.state[name], tensor, rtol=0.02, atol=0.002)
    pruned = python("-m", "rprune", "prune", "two.pt", "-s", 0.9, "--epochs", 1, *TWO, "-o", "p.pt", cwd=tmp_path)
    assert pruned.code == 0, pruned.err
    assert pruned.err.count("prune  1/1") == 1
    made = load_artifact(tmp_path / "p.pt")
    assert sum(int(mask.sum()) for mask in made.masks.values()) == made.metadata.budget
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_a_recipe_in_two_processes(python, tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text(RECIPE)
    said = python("-m", "rprune", "run", "two.toml", "-o", "out", *TWO, cwd=tmp_path)
    assert said.code == 0, said.err
    assert said.err.count("done   export") == 1
    assert (tmp_path / "out" / "export" / "report.json").is_file()
    again = python("-m", "rprune", "run", "two.toml", "-o", "out", "--device", "cpu", cwd=tmp_path)
    assert again.code == 0, again.err
    assert again.err.count("reused") == 5


@pytest.mark.slow
def test_two_processes_attack_and_certify_as_one(python, chain, tmp_path: Path) -> None:
    one, two = ("--device", "cpu"), TWO
    for out, how in (("one", one), ("two", two)):
        options = ("--suite", "pgd,square", "-n", 12, "--no-health", "-o", f"{out}.attack", *how)
        assert python("-m", "rprune", "attack", chain / MODEL, *options, cwd=tmp_path).code == 0
        options = ("-m", "ibp,smoothing", "-n", 9, "--n", 200, "-o", f"{out}.json", *how)
        assert python("-m", "rprune", "certify", chain / MODEL, *options, cwd=tmp_path).code == 0
    for name in ("samples.jsonl", "samples.csv", "adversarial.safetensors"):
        assert (tmp_path / "one.attack" / name).read_bytes() == (tmp_path / "two.attack" / name).read_bytes()
    assert not list(tmp_path.glob("**/*of2"))
    certificates = [json.loads((tmp_path / f"{out}.json").read_text()) for out in ("one", "two")]
    margins = [[row.pop("margin") or 0.0 for row in found["bounds"]["samples"]] for found in certificates]
    assert margins[0] == pytest.approx(margins[1], rel=1e-9)
    for found in certificates:
        for changing in ("seconds", "digest"):
            del found[changing]
    assert certificates[0] == certificates[1]
    counts = []
    for how in (one, two):
        options = ("--suite", "pgd", "-n", 9, "--json", *how)
        counts.append(json.loads(python("-m", "rprune", "evaluate", chain / MODEL, *options, cwd=tmp_path).out))
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_what_a_process_left_is_taken_in(python, chain, tmp_path: Path) -> None:
    """An attack in two processes that ended early goes on in one."""
    command = ("-m", "rprune", "attack", chain / MODEL, "--suite", "pgd,square", "-n", 12, "--no-health", "-o", "a")
    assert python(*command, "--device", "cpu", cwd=tmp_path).code == 0
    wanted = (tmp_path / "a" / "samples.jsonl").read_bytes()
    head, *lines = (tmp_path / "a" / "ledger.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a" / "ledger.jsonl").write_text(head + lines[0])
    (tmp_path / "a" / "ledger.jsonl.2of4").write_text(head + "".join(lines[1:])[:-5])  # cut off
    again = python(*command, *TWO, cwd=tmp_path)
    assert again.code == 0, again.err
    assert (tmp_path / "a" / "samples.jsonl").read_bytes() == wanted
    assert not list(tmp_path.glob("**/*of*"))


def test_mistakes_are_told_once(python, tmp_path: Path) -> None:
    said = python(*TRAIN, *TWO, "-d", "nothing", cwd=tmp_path)
    assert "nothing" in said.refused(2)
    if torch.cuda.device_count() < 64:
        assert "--gpus 64" in python(*TRAIN, "--gpus", 64, cwd=tmp_path).refused(2)
    assert "contradict" in python(*TRAIN, "--gpus", 2, "--device", "cuda:0", cwd=tmp_path).refused(2)


def children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(entry.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_process_ends_the_run_which_resumes(python, tmp_path: Path) -> None:
    command = [*map(str, TRAIN), "--epochs", "30", *map(str, TWO), "-o", "k.pt"]
    with (tmp_path / "err").open("w") as err:
        running = subprocess.Popen([sys.executable, *command], cwd=tmp_path, stderr=err, stdout=subprocess.DEVNULL)
    state = tmp_path / "k.pt.partial" / "resume.pt"
    deadline = time.monotonic() + 90
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    processes = [pid for pid in children(running.pid) if b"rprune" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(processes) == 2
    os.kill(processes[1], signal.SIGKILL)
    assert running.wait(timeout=60) == 4
    text = (tmp_path / "err").read_text()
    assert "error: process 2 of 2 was ended by signal 9" in text or "another process of this run has ended" in text
    assert "the same command goes on" in text
    assert "Traceback" not in text
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)
    done = len(torch.load(state, weights_only=True)["history"])
    again = python(*command, cwd=tmp_path)
    assert again.code == 0, again.err
    assert f"train  {done + 1}/30" in again.err
    assert f"train  {done}/30" not in again.err
