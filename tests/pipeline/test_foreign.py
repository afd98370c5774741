"""Weights out of files of every kind, and what runs on the way: nothing, unless the user says so."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import pickle
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rprune.errors import InputError, UsageError
from rprune.pipeline.artifact import load_any, save_artifact
from rprune.pipeline.bench import Silent
from rprune.pipeline.importing import imported
from rprune.pipeline.recipe import ModelSection
from rprune.pipeline.single import Request, open_model
from rprune.pipeline.stages import PruneStage, prune


class Evil:
    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Told(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def same(found, state) -> bool:
    return set(found) == set(state) and all(torch.equal(found[name], state[name]) for name in state)


HARMLESS = {
    "args": argparse.Namespace(lr=0.1, out=pathlib.Path("runs")),
    "more": types.SimpleNamespace(a=1),
    "best": np.float64(93.5),
    "count": np.int64(3),
    "flag": np.bool_(True),
    "type": np.dtype("float32"),
    "history": collections.defaultdict(list, {"loss": [0.5]}),
    "ordered": collections.OrderedDict(a=1),
    "counter": collections.Counter("aab"),
    "path": pathlib.PurePosixPath("a/b"),
    "windows": pathlib.PureWindowsPath("c:/x"),
    "names": {"a", "b"},
    "rng": torch.get_rng_state(),
    "dtype": torch.float16,
    "size": torch.Size([1, 2]),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_training_scripts_put_beside_the_weights_is_read(trained, tmp_path, zipped):
    content = HARMLESS | {"state_dict": trained.state, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    found = load_any(tmp_path / "x.pt")
    assert same(found.state, trained.state)
    assert (found.found.part, found.ran) == ("state_dict", ())


def test_halves_become_floats_and_missing_counters_zeros(tmp_path):
    state = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).half().state_dict()
    del state["1.num_batches_tracked"]
    torch.save(state, tmp_path / "x.pt")
    found = load_any(tmp_path / "x.pt").state
    assert found["0.weight"].dtype == torch.float32
    assert found["1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, 2).to_sparse(), torch.zeros(2, dtype=torch.complex64), torch.empty(2, device="meta")],
    ids=["sparse", "complex", "meta"],
)  # fmt: skip
def test_what_is_no_plain_tensor_is_refused(tmp_path, tensor):
    torch.save({"a": tensor}, tmp_path / "x.pt")
    with pytest.raises(InputError):
        load_any(tmp_path / "x.pt")


def write(form, path, content):
    if form == "bare":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_code_is_named_refused_and_never_run(tmp_path, form):
    trap = tmp_path / "trap"
    write(form, tmp_path / "x.pt", {"state_dict": {"a": torch.zeros(1)}, "x": Evil(trap)})
    with pytest.raises(InputError, match=r"system.*never run") as refused:
        load_any(tmp_path / "x.pt")
    assert "--trust-pickle" in refused.value.hint
    assert not trap.exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_trusted_code_runs_after_it_was_told(trained, tmp_path, form):
    trap = tmp_path / "trap"
    write(form, tmp_path / "x.pt", {"state_dict": trained.state, "x": Evil(trap)})
    told: list[str] = []

    def trust(text: str) -> None:
        assert not trap.exists()
        told.append(text)

    found = load_any(tmp_path / "x.pt", trust=trust)
    assert trap.exists()
    assert same(found.state, trained.state)
    assert found.record["loaded_unsafely"] is True
    assert f"{os.system.__module__}.system" in found.record["globals"]
    assert len(told) == 1
    assert found.record["sha256"] in told[0]
    assert f"{os.system.__module__}.system" in told[0]


def test_trust_changes_nothing_where_nothing_would_run(trained, tmp_path):
    torch.save(trained.state, tmp_path / "x.pt")
    found = load_any(tmp_path / "x.pt", trust=lambda text: pytest.fail(text))
    assert "loaded_unsafely" not in found.record


def test_code_in_a_file_that_says_it_is_ours_is_refused_even_if_trusted(trained, tmp_path):
    save_artifact(trained, tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    torch.save(content | {"extra": nn.ReLU()}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="holds code"):
        load_any(tmp_path / "x.pt", trust=lambda text: None)


def test_trusted_code_that_fails_is_one_line(tmp_path):
    class Gone(Evil):
        def __reduce__(self):
            return os.stat, ("/nowhere/at/all",)

    torch.save({"a": Gone("")}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="FileNotFoundError"):
        load_any(tmp_path / "x.pt", trust=lambda text: None)


def test_weights_of_a_module_that_was_pickled_whole(trained, tmp_path):
    for content in (trained.model(), {"model": trained.model(), "epoch": 3}):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(InputError, match=r"rprune\.models\.cnn\.CNNSmall"):
            load_any(tmp_path / "x.pt")
        assert same(load_any(tmp_path / "x.pt", trust=lambda text: None).state, trained.state)


def test_weights_of_safetensors_and_programs(trained, tmp_path):
    save_file({f"module.{name}": tensor for name, tensor in trained.state.items()}, tmp_path / "x.safetensors")
    found = load_any(tmp_path / "x.safetensors")
    assert same(found.state, trained.state)
    assert found.found.prefix == "module."
    program = torch.export.export(trained.model(), (torch.rand(2, 1, 8, 8),))
    torch.export.save(program, tmp_path / "x.pt2")
    assert same(load_any(tmp_path / "x.pt2").state, trained.state)


def test_the_architecture_is_told_by_the_weights_and_recorded(trained, tmp_path):
    torch.save({"ema": {f"module.{n}": t for n, t in trained.state.items()}}, tmp_path / "x.pt")
    reporter = Told()
    _, artifact = open_model(tmp_path / "x.pt", Request(data="digits"), reporter)
    assert artifact.metadata.arch == trained.metadata.arch
    assert same(artifact.state, trained.state)
    config = artifact.metadata.lineage[0].config
    assert (config["part"], config["prefix"], config["guessed"]) == ("ema", "module.", "cnn-small")
    assert config["kind"] == "checkpoint"
    (note,) = reporter.notes
    assert "'ema' of it, without the prefix module." in note
    assert "as cnn-small with 10 classes, by names and shapes" in note


def test_normalisation_is_the_users_also_for_a_guessed_architecture(trained, tmp_path):
    torch.save(trained.state, tmp_path / "x.pt")
    _, artifact = open_model(tmp_path / "x.pt", Request(data="digits", mean=(0.3,), std=(0.5,)), Silent())
    assert (artifact.metadata.arch.mean, artifact.metadata.arch.std) == ((0.3,), (0.5,))


def test_what_cannot_be_guessed_has_to_be_said(trained, tmp_path):
    torch.save({f"enc.{name}": tensor for name, tensor in trained.state.items()}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="of no architecture"):
        open_model(tmp_path / "x.pt", Request(data="digits"), Silent())
    torch.save(trained.state, tmp_path / "y.pt")
    with pytest.raises(UsageError, match="weights alone"):
        open_model(tmp_path / "y.pt", Request(), Silent())
    with pytest.raises(UsageError, match="not named"):
        open_model(tmp_path / "y.pt", Request(data="digits", kwargs={"width": 3}), Silent())
    seven = {n: t[:7] if n.startswith("classifier.2") else t for n, t in trained.state.items()}
    torch.save(seven, tmp_path / "z.pt")
    with pytest.raises(InputError, match="7 classes, digits has 10"):
        open_model(tmp_path / "z.pt", Request(data="digits"), Silent())


@pytest.mark.parametrize("prefix", ["model.", "module.model."])
def test_a_prefix_that_the_users_own_class_has_is_put_back(bench, tmp_path, prefix):
    own = tmp_path / "own.py"
    own.write_text(
        "from torch import nn\n"
        "class Own(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
        "    def forward(self, x):\n"
        "        return self.model(x)\n"
    )
    state = {f"{prefix}1.weight": torch.zeros(10, 64), f"{prefix}1.bias": torch.zeros(10)}
    torch.save(state, tmp_path / "x.pt")
    found = load_any(tmp_path / "x.pt")
    artifact = imported(found, ModelSection(arch=f"{own}:Own"), bench)
    assert set(artifact.state) == {"model.1.weight", "model.1.bias"}
    assert artifact.metadata.lineage[0].config.get("prefix", "") == prefix.removesuffix("model.")


def test_an_unsafe_origin_stays_in_the_lineage(bench, trained, tmp_path):
    torch.save(trained.model(), tmp_path / "x.pt")
    reporter = Told()
    _, artifact = open_model(tmp_path / "x.pt", Request(data="digits", trust_pickle=True), reporter)
    assert len(reporter.warnings) == 1
    pruned = prune(bench, artifact, PruneStage(method="lwm", sparsity=0.5))
    assert pruned.loaded_unsafely
    assert pruned.metadata.lineage[0].config["loaded_unsafely"] is True
    assert not trained.loaded_unsafely
