"""What a user says about a model file, against what the file says itself."""

from __future__ import annotations

import pytest

from rprune.cli.app import main
from rprune.errors import InputError, UsageError
from rprune.files import partial_folder
from rprune.pipeline.artifact import save_artifact
from rprune.pipeline.bench import Silent, pick_device
from rprune.pipeline.environment import named_code, referenced_files
from rprune.pipeline.finish import publish
from rprune.pipeline.single import Request, open_model
from rprune.pipeline.stages import PruneStage, prune


@pytest.fixture
def model(trained, tmp_path):
    path = tmp_path / "m.pt"
    save_artifact(trained, path)
    return path


def test_another_architecture_than_the_file_says_is_refused(model):
    with pytest.raises(UsageError, match="is a cnn-small, not a vgg16"):
        open_model(model, Request(arch="vgg16"), Silent())


def test_another_norm_needs_its_own_radius(model):
    with pytest.raises(UsageError, match="needs its own radius"):
        open_model(model, Request(norm="l2"), Silent())
    bench, _ = open_model(model, Request(norm="l2", eps="0.5"), Silent())
    assert str(bench.threat) == "l2 0.5"


def test_pruning_below_what_is_left_is_refused(bench, trained):
    pruned = prune(bench, trained, PruneStage(method="lwm", sparsity=0.99))
    with pytest.raises(InputError, match="222 non-zero weights"):
        prune(bench, pruned, PruneStage(method="lwm", sparsity=0.5))
    again = prune(bench, pruned, PruneStage(method="lwm", sparsity=0.99))
    assert all((again.masks[name] == mask).all() for name, mask in pruned.masks.items())


def test_a_search_that_misses_its_target_says_so(bench, trained):
    missed = prune(bench, trained, PruneStage(method={"name": "harp", "gamma_step": 1e-9}, sparsity=0.95, epochs=1))
    assert missed.metadata.lineage[-1].metrics["target_met"] is False
    assert sum(int(mask.sum()) for mask in missed.masks.values()) == missed.metadata.budget


def test_folders_of_others_are_never_deleted(tmp_path):
    mine, partial = tmp_path / "mine", partial_folder(tmp_path / "mine", "key")
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="did not write"):
        publish(partial, mine)
    assert (mine / "thesis.txt").exists()
    (mine / "report.json").write_text("{}")
    publish(partial, mine)
    assert [path.name for path in mine.iterdir()] == ["key.json"]
    assert not partial.exists()


def test_export_with_force_spares_a_folder_of_others(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(SystemExit) as done:
        main(
            [
                "export",
                str(model),
                "-o",
                str(tmp_path / "out"),
                "--suite",
                "fgsm",
                "--limit",
                "10",
                "--no-health",
                "-q",
                "--force",
            ]
        )
    assert done.value.code == 2
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_content_of_named_files_is_part_of_a_specification(tmp_path):
    path = tmp_path / "m.py"
    path.write_text("a")
    spec = {"method": {"name": f"{path}:X", "allocation": "erk"}, "n": 3}
    first = referenced_files(spec)
    path.write_text("b")
    assert set(first) == {str(path)}
    assert referenced_files(spec) != first
    assert referenced_files([f"file:{path}", "digits", "npz:x.npz"]).keys() == {str(path)}
    assert named_code(spec) == {f"{path}:X"}


def test_devices_carry_their_index_and_kind():
    assert str(pick_device("cpu")) == "cpu"
    for name in ("meta", "gpu", "cuda:99"):
        with pytest.raises(UsageError):
            pick_device(name)


def test_normalisation_and_arguments_reach_the_architecture(tmp_path):
    out = tmp_path / "m.pt"
    options = ["--mean", "0.3", "--std", "0.5", "--arch", "lenet", "--arch-arg", "width=2", "--epochs", "1"]
    with pytest.raises(SystemExit) as done:
        main(["train", "--data", "digits", "--objective", "benign", *options, "-o", str(out), "-q"])
    assert done.value.code == 0
    _, artifact = open_model(out, Request(), Silent())
    arch = artifact.metadata.arch
    assert (arch.mean, arch.std, arch.kwargs) == ((0.3,), (0.5,), {"width": 2})
    with pytest.raises(SystemExit) as done:
        main(["train", "--data", "digits", "--mean", "a,b", "--std", "1", "-o", str(tmp_path / "n.pt"), "-q"])
    assert done.value.code == 2


def test_a_model_of_one_class_is_called_that(bench, trained, tmp_path):
    from rprune.pipeline.artifact import Artifact
    from rprune.pipeline.bundle import Source, export
    from rprune.pipeline.recipe import ExportStage

    state = {name: tensor.clone() for name, tensor in trained.state.items()}
    last = [name for name in state if name.endswith("bias")][-1]
    state[last][3] = 1e6
    report = export(
        bench,
        Artifact(trained.metadata, state),
        ExportStage(suite="fgsm", limit=20, health=False),
        tmp_path,
        Source("x", {}),
    )
    assert any("one class for every sample" in line for line in report.warnings)
    assert "one class for every sample" in (tmp_path / "report.html").read_text()


def test_a_run_into_a_folder_of_others_stops_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine.py").write_text("x")
    monkeypatch.setattr("rprune.pipeline.run.run_stage", lambda *_: pytest.fail("work was done"))
    with pytest.raises(SystemExit) as done:
        main(["run", "digits", "-o", str(tmp_path), "-q"])
    assert done.value.code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export"]
