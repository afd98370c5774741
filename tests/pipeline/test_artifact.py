"""One artifact, three forms, the same content."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from rprune.errors import InputError, IntegrityError, UsageError
from rprune.pipeline.artifact import Artifact, load_any, load_artifact, save_artifact, save_folder

FORMS = ("model.pt", "model.safetensors", "folder")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("form", FORMS)
def test_round_trip(quantized, tmp_path, form):
    save_artifact(quantized, tmp_path / form)
    read = load_artifact(tmp_path / form)
    assert equal(read.state, quantized.state)
    assert equal(read.masks, quantized.masks)
    assert equal(read.quantization, quantized.quantization)
    assert read.metadata == quantized.metadata
    assert read.digest == quantized.digest


@pytest.mark.parametrize("form", FORMS)
def test_round_trip_without_masks_and_integers(trained, tmp_path, form):
    save_artifact(trained, tmp_path / form)
    read = load_artifact(tmp_path / form)
    assert (read.masks, read.quantization) == ({}, {})
    assert read.digest == trained.digest


@pytest.mark.parametrize("form", FORMS[:2])
def test_written_files_are_the_same_bytes_again(quantized, tmp_path, form):
    save_artifact(quantized, tmp_path / form)
    first = (tmp_path / form).read_bytes()
    save_artifact(load_artifact(tmp_path / form), tmp_path / form)
    assert (tmp_path / form).read_bytes() == first


@pytest.mark.parametrize("form", FORMS)
def test_whoever_may_read_a_file_of_the_folder_may_read_these(quantized, tmp_path, form):
    save_artifact(quantized, tmp_path / "made" / form)
    (tmp_path / "usual").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "made").rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "usual").stat().st_mode}


def test_digest_sees_every_tensor(quantized):
    name = next(iter(quantized.state))
    changed = dict(quantized.state)
    changed[name] = changed[name] + 1
    other = Artifact(quantized.metadata, changed, quantized.masks, quantized.quantization)
    assert other.digest != quantized.digest
    assert Artifact(quantized.metadata, quantized.state, {}, quantized.quantization).digest != quantized.digest
    assert Artifact(quantized.metadata, quantized.state, quantized.masks).digest != quantized.digest
    reordered = dict(reversed(quantized.state.items()))
    assert Artifact(quantized.metadata, reordered, quantized.masks, quantized.quantization).digest == quantized.digest


@pytest.mark.parametrize("name", ["model.safetensors", "masks.safetensors", "quantization.safetensors"])
def test_changed_file_of_a_folder_is_refused(quantized, tmp_path, name):
    save_folder(quantized, tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(IntegrityError, match=name):
        load_artifact(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(IntegrityError, match=name):
        load_artifact(tmp_path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["evil_mod_of_test:factory", "evil_mod_of_test.py:factory"])
def test_untrusted_architecture_is_never_imported(trained, tmp_path, monkeypatch, form, name):
    (tmp_path / "evil_mod_of_test.py").write_text("raise SystemExit('was run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    evil = trained.with_metadata(architecture=trained.metadata.architecture | {"name": name})
    save_artifact(evil, tmp_path / form)
    with pytest.raises(InputError, match="not built in"):
        load_any(tmp_path / form)
    assert not any("evil_mod_of_test" in module for module in sys.modules)


def test_unknown_format_is_refused(trained, tmp_path):
    save_folder(trained, tmp_path)
    record = json.loads((tmp_path / "stage.json").read_text())
    record["metadata"]["surprise"] = 1
    (tmp_path / "stage.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="surprise"):
        load_artifact(tmp_path)


def test_own_architecture_is_used_when_it_is_named_again(tmp_path):
    """A file cannot name code that runs; the user who names the same code can."""
    from rprune.cli.app import main

    source = tmp_path / "net.py"
    source.write_text(
        "from torch import nn\n"
        "def small(num_classes, input_shape):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[1] * input_shape[2], num_classes))\n"
    )
    arch, model = f"{source}:small", tmp_path / "m.pt"
    with pytest.raises(SystemExit) as done:
        main(
            [
                "train",
                "--data",
                "digits",
                "--arch",
                arch,
                "--epochs",
                "1",
                "--objective",
                "benign",
                "-o",
                str(model),
                "-q",
            ]
        )
    assert done.value.code == 0
    with pytest.raises(InputError, match="not built in"):
        load_artifact(model)
    assert load_artifact(model, arch).metadata.arch.name == arch


def test_metadata_of_a_newer_format_is_refused(trained, tmp_path):
    save_artifact(trained.with_metadata(format="rprune.artifact/2"), tmp_path / "new.pt")
    with pytest.raises(InputError, match="artifact/2"):
        load_artifact(tmp_path / "new.pt")


def test_unknown_suffix(trained, tmp_path):
    with pytest.raises(UsageError, match=r"\.onnx"):
        save_artifact(trained, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_plain_file_needs_more_words(trained, tmp_path):
    torch.save(trained.state, tmp_path / "plain.pt")
    assert equal(load_any(tmp_path / "plain.pt").state, trained.state)
    with pytest.raises(InputError, match="without rprune's metadata"):
        load_artifact(tmp_path / "plain.pt")


def test_model_computes_with_the_weights(trained, bench):
    model = trained.model()
    assert not model.training
    batch = next(iter(bench.loader("test").ordered(100, 100)))
    assert float((model(batch.x).argmax(1) == batch.y).float().mean()) > 0.5
    assert equal(model.state_dict(), trained.state)


def test_an_objective_that_a_file_names_is_never_run(trained, tmp_path):
    """Like the architecture: code of users is followed where they wrote its name, not where a model file has it."""
    from rprune.cli.app import main

    source, trace = tmp_path / "evil.py", tmp_path / "ran"
    source.write_text(f"open({str(trace)!r}, 'w').close()\n")
    path = tmp_path / "m.pt"
    save_artifact(trained.with_metadata(objective={"name": f"{source}:X"}), path)
    for command in (["prune", "-s", "0.5", "-m", "lwm"], ["finetune", "--epochs", "1"], ["quantize"]):
        with pytest.raises(SystemExit) as done:
            main([command[0], str(path), *command[1:], "-o", str(tmp_path / f"{command[0]}.pt"), "-q"])
        assert done.value.code == (0 if command == ["quantize"] else 3)
        assert not trace.exists()


def test_an_objective_of_the_user_travels_by_the_name_it_was_given(tmp_path):
    from rprune.cli.app import main

    source = tmp_path / "objective.py"
    source.write_text(
        "from dataclasses import dataclass\n"
        "from rprune.objectives.benign import Benign\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(Benign):\n    '''Mine.'''\n"
    )
    name, model, pruned = f"{source}:Mine", tmp_path / "m.pt", tmp_path / "p.pt"
    arguments = {
        model: ["train", "--data", "digits", "--epochs", "1", "--objective", name],
        pruned: ["prune", str(model), "-s", "0.5", "-m", "lwm", "--objective", name],
    }
    for output, command in arguments.items():
        with pytest.raises(SystemExit) as done:
            main([*command, "-o", str(output), "-q"])
        assert done.value.code == 0
        assert load_artifact(output).metadata.objective == {"name": name, "label_smoothing": 0.0}
