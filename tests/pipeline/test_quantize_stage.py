"""The quantize stage: modes, widths, resumption, and the options that it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rprune.cli.app import main
from rprune.errors import InputError, UsageError
from rprune.export.qdq import qdq_model
from rprune.export.session import OnnxClassifier
from rprune.models.prunable import prunable
from rprune.pipeline import quantizing
from rprune.pipeline.artifact import load_artifact, save_artifact
from rprune.pipeline.bundle import Source, export
from rprune.pipeline.forms import Deployed
from rprune.pipeline.quantizing import flattened, quantize
from rprune.pipeline.recipe import ExportStage, PruneStage, QuantizeStage, validated
from rprune.pipeline.stages import prune
from rprune.quantization.guarantees import saturating_pairs
from rprune.quantization.ptq import Quantization

QAT = {"mode": "qat", "epochs": 3, "batch_size": 256, "lr": 0.02}


def staged(**options: Any) -> QuantizeStage:
    """A stage that keeps dead channels, so that masks and weights can be compared with those before it."""
    return QuantizeStage(**{"compact": False} | options)


@pytest.fixture(scope="module")
def sparse(bench, trained):
    return prune(bench, trained, PruneStage(method="lwm", sparsity=0.8))


@pytest.fixture(scope="module")
def qat(bench, sparse):
    return quantize(bench, sparse, staged(bits=4, **QAT))


def same(a, b) -> bool:
    tables = ((a.state, b.state), (a.masks, b.masks), (a.quantization, b.quantization))
    return all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in tables)


@pytest.mark.parametrize("bits", [2, 4, 6, 8, 12])
def test_ptq_counts_what_it_keeps(bench, sparse, bits):
    made = quantize(bench, sparse, staged(bits=bits))
    found, metrics = Quantization.from_tensors(made.quantization), made.metadata.lineage[-1].metrics
    assert found.bits == bits
    assert metrics["kept"] == sum(int(weight.count_nonzero()) for weight in found.weights.values())
    assert metrics["kept"] + metrics["lost"] == sparse.metadata.budget
    assert metrics["lost"] == 0 or bits < 8
    assert metrics["macs"]["sparse"] < 0.5 * metrics["macs"]["dense"]
    assert made.state.keys() == sparse.state.keys()
    config = made.metadata.lineage[-1].config
    assert config["bits"] == bits
    assert "momentum" not in config, "nothing was trained"


@pytest.mark.parametrize("mode", [{}, QAT], ids=["ptq", "qat"])
def test_small_weights_of_a_dense_model_may_become_zero(bench, trained, tmp_path, mode) -> None:
    """+-1 in the place of many small weights would add up."""
    state = {name: tensor.clone() for name, tensor in trained.state.items()}
    for name in prunable(trained.model()):
        state[name].flatten(1)[:, 1:] *= 1e-3
    made = quantize(bench, replace(trained, state=state), staged(**mode))
    metrics = made.metadata.lineage[-1].metrics
    assert metrics["lost"] > metrics["total"] // 2
    report = export(
        bench, made, ExportStage(suite="fgsm", limit=20, health=False), tmp_path / "out", Source("x", {})
    )  # fmt: skip
    assert report.sparsity.int8_zeros_equal_float_zeros is False


def test_narrow_widths_clip_and_correct_unless_told_otherwise(bench, sparse):
    chosen = {"bits": 4, "observer": "mse", "bias_correction": True}
    assert same(quantize(bench, sparse, staged(bits=4)), quantize(bench, sparse, staged(**chosen)))
    plain = {"bits": 8, "observer": "minmax", "bias_correction": False}
    assert same(quantize(bench, sparse, staged()), quantize(bench, sparse, staged(**plain)))
    assert not same(quantize(bench, sparse, staged(bits=4)), quantize(bench, sparse, staged(**plain | {"bits": 4})))


def test_portable_is_portable(bench, sparse):
    made = quantize(bench, sparse, staged(portable=True))
    assert made.metadata.lineage[-1].metrics["saturating_pairs"] == 0
    assert sum(saturating_pairs(Quantization.from_tensors(made.quantization)).values()) == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_files_of_up_to_8_bits_are_bit_equal(bench, sparse, tmp_path, bits):
    made = quantize(bench, sparse, staged(bits=bits))
    twin, x = Deployed.of(made).twin, torch.rand(64, *bench.data.shape, generator=torch.Generator().manual_seed(0))
    (tmp_path / "m.onnx").write_bytes(qdq_model(twin, bench.data.shape, 10).SerializeToString())
    with torch.no_grad():
        assert np.array_equal(OnnxClassifier(tmp_path / "m.onnx").logits(x.numpy()), twin(x).numpy())


def test_more_bits_have_no_int8_file(bench, sparse):
    made = quantize(bench, sparse, staged(bits=10))
    with pytest.raises(InputError, match="more than 8 bits"):
        qdq_model(Deployed.of(made).twin, bench.data.shape, 10)


def test_flattened_network_is_the_same_function(bench, sparse):
    flat = flattened(sparse)
    x = torch.rand(8, *bench.data.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(flat.model()(x), sparse.model()(x), rtol=1e-4, atol=1e-5)
    assert flat.masks.keys() == sparse.masks.keys()
    assert flat.metadata.budget == sparse.metadata.budget


def test_qat_holds_the_mask_and_trains_more_than_scales(bench, sparse, qat):
    assert qat.metadata.arch.name == "flat"
    assert qat.metadata.budget == sparse.metadata.budget
    for name, mask in sparse.masks.items():
        assert torch.equal(qat.masks[name], mask)
        assert torch.equal(qat.state[name] != 0, mask)
        assert not torch.equal(qat.state[name], sparse.state[name])
    start = quantize(bench, sparse, staged(bits=4))
    assert not torch.equal(start.quantization["features.2/weights"], qat.quantization["features.2/weights"])
    entry = qat.metadata.lineage[-1]
    assert [line["epoch"] for line in entry.history] == [1.0, 2.0, 3.0]
    assert entry.config["epochs"] == 3
    assert entry.parent == sparse.digest


def test_qat_ends_with_the_scores_of_the_network_that_it_trained(qat):
    metrics = qat.metadata.lineage[-1].metrics
    chosen = qat.metadata.lineage[-1].history[metrics["selected_epoch"] - 1]
    assert metrics["validation"]["score"] == pytest.approx(chosen["score"], abs=0.03)


def test_qat_resumed_after_any_epoch_is_the_run_without_a_break(bench, sparse, qat, tmp_path, monkeypatch):
    state = tmp_path / "resume.pt"

    class Stop(Exception):
        pass

    def stop(_, log):
        if log.epoch == 2:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(bench.reporter, "epoch", stop, raising=False)
        with pytest.raises(Stop):
            quantize(bench, sparse, staged(bits=4, **QAT), state)
    again = quantize(bench, sparse, staged(bits=4, **QAT), state)
    assert same(again, qat)


@pytest.mark.parametrize("options", [{"average": "ema"}, {"awp": 0.005}, {"optimizer": "adam"}])
def test_qat_takes_the_options_of_training(bench, sparse, options):
    said = {**QAT, "epochs": 1, "lr": 0.001, "bits": 4, **options}
    made = quantize(bench, sparse, staged(**said))
    plain = quantize(bench, sparse, staged(**{**QAT, "epochs": 1, "lr": 0.001, "bits": 4}))
    assert not same(made, plain)
    assert np.isfinite(made.metadata.lineage[-1].history[0]["loss"])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codebook_has_few_values_and_no_integers(bench, sparse, bits):
    made = quantize(bench, sparse, staged(mode="codebook", bits=bits))
    assert not made.quantization
    flat, most = flattened(sparse), 0
    for name, weight in prunable(made.model()).items():
        assert torch.equal(weight != 0, sparse.masks[name])
        most = max(most, len(torch.unique(weight[weight != 0])))
        before = flat.state[name]
        assert torch.equal(torch.sign(weight.detach()), torch.sign(before))
    assert most <= 2**bits - 1
    assert made.metadata.lineage[-1].metrics["levels"] == most
    assert Deployed.of(made).twin is None


@pytest.mark.parametrize("kind", ["q.pt", "q.safetensors", "q"])
def test_every_form_of_the_artifact_holds_it(qat, tmp_path, kind):
    save_artifact(qat, tmp_path / kind)
    read = load_artifact(tmp_path / kind)
    assert same(read, qat)
    assert Quantization.from_tensors(read.quantization).bits == 4


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"epochs": 3}, "epochs has no effect in mode ptq"),
        ({"mode": "codebook", "observer": "mse"}, "observer has no effect in mode codebook"),
        ({"mode": "qat", "bias_correction": True}, "bias_correction has no effect in mode qat"),
        ({"lr": 0.1}, "lr has no effect"),
        ({"objective": "trades"}, "objective has no effect"),
        ({"batch_size": 7}, "batch_size has no effect"),
        ({"bits": 12, "portable": True}, "at most 8 bits"),
        ({"bits": 9, "mode": "codebook"}, "at most 8 bits"),
        ({"bits": 1}, "bits"),
        ({"bits": 13}, "bits"),
        ({"mode": "qta"}, "mode"),
        ({"observer": "entropy"}, "observer"),
    ],
)
def test_options_that_do_nothing_are_refused(table, message):
    with pytest.raises(UsageError, match=message) as caught:
        validated(QuantizeStage, table, "options")
    assert caught.value.hint


def test_a_stage_read_back_from_its_record_is_the_stage():
    for table in ({}, {"bits": 4}, QAT, {"mode": "codebook", "bits": 4}):
        stage = QuantizeStage(**table)
        assert validated(QuantizeStage, stage.model_dump(mode="json"), "record") == stage


def test_the_command_takes_every_mode(sparse, tmp_path):
    save_artifact(sparse, tmp_path / "m.pt")
    for words, name, bits in (
        (["--bits", "4", "--observer", "percentile", "--no-bias-correction"], "m-int4.pt", 4),
        (["--mode", "qat", "--epochs", "1", "--lr", "0.01", "--batch-size", "256", "--portable"], "m-int8.pt", 8),
        (["--mode", "codebook", "--bits", "3"], "m-codebook3.pt", None),
    ):
        with pytest.raises(SystemExit) as done:
            main(["quantize", str(tmp_path / "m.pt"), "-q", *words])
        assert done.value.code == 0
        made = load_artifact(tmp_path / name)
        assert (Quantization.from_tensors(made.quantization).bits if made.quantization else None) == bits
    with pytest.raises(SystemExit) as done:
        main(["quantize", str(tmp_path / "m.pt"), "-q", "--epochs", "2"])
    assert done.value.code == 2


@pytest.mark.parametrize("better", ["calibration", "training"])
def test_qat_keeps_the_better_of_start_and_end(bench, sparse, monkeypatch, better):
    scores = iter([1.0, 0.0] if better == "calibration" else [0.0, 1.0])
    monkeypatch.setattr(quantizing, "_score", lambda *_: next(scores))
    made = quantize(bench, sparse, staged(bits=4, **QAT))
    start = quantize(bench, sparse, staged(bits=4, bias_correction=False, calibration=512))
    same = all(
        torch.equal(tensor, Quantization.from_tensors(made.quantization).weights[name])
        for name, tensor in Quantization.from_tensors(start.quantization).weights.items()
    )
    assert same is (better == "calibration")
    assert (made.metadata.lineage[-1].metrics["selected_epoch"] == 0) is same
