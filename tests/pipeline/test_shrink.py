"""The shrink stage: a smaller artifact with the same outputs, that every later stage takes."""

from __future__ import annotations

import pytest
import torch

from rprune.cli.app import main
from rprune.errors import InputError
from rprune.models.prunable import prunable
from rprune.pipeline.artifact import load_artifact, save_artifact
from rprune.pipeline.quantizing import quantize
from rprune.pipeline.recipe import ExportStage, FinetuneStage, PruneStage, QuantizeStage, ShrinkStage
from rprune.pipeline.stages import finetune, prune, run_stage, shrink
from rprune.reports.schema import read_report


@pytest.fixture(scope="module")
def pruned(bench, trained):
    return prune(bench, trained, PruneStage(method={"name": "lwm", "structure": "filter"}, sparsity=0.7))


@pytest.fixture(scope="module")
def small(bench, pruned):
    return shrink(bench, pruned)


def test_outputs_are_the_masked_nets(bench, pruned, small):
    x = torch.rand(16, *bench.data.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(small.model()(x), pruned.model()(x), rtol=1e-4, atol=1e-5)


def test_the_network_is_smaller_and_says_by_how_much(pruned, small):
    weights = {name: w.numel() for name, w in prunable(small.model()).items()}
    dense = sum(w.numel() for w in prunable(pruned.model()).values())
    metrics = small.metadata.lineage[-1].metrics
    assert metrics["total"] == sum(weights.values()) < 0.35 * dense
    assert small.metadata.dense_total == dense
    assert small.metadata.budget == metrics["kept"] <= pruned.metadata.budget
    assert metrics["macs"]["sparse"] <= metrics["macs"]["dense"] < 0.5 * metrics["macs"]["before"]
    assert metrics["macs"]["before"] == pruned.metadata.lineage[-1].metrics["macs"]["dense"]
    assert metrics["parameters"]["after"] < metrics["parameters"]["before"]
    assert small.metadata.arch.name == "flat"


@pytest.mark.parametrize("suffix", ["small.pt", "small.safetensors", "small"])
def test_it_is_read_back_without_naming_an_architecture(small, tmp_path, suffix):
    save_artifact(small, tmp_path / suffix)
    assert load_artifact(tmp_path / suffix).digest == small.digest


def test_it_can_be_fine_tuned_with_its_zeros_held(bench, small):
    tuned = finetune(bench, small, FinetuneStage(epochs=1, batch_size=64))
    for name, mask in small.masks.items():
        assert torch.equal(tuned.state[name] != 0, mask)
    assert tuned.metadata.dense_total == small.metadata.dense_total


def test_a_quantized_model_is_refused(bench, quantized):
    with pytest.raises(InputError, match="quantized already"):
        run_stage(bench, ShrinkStage(), quantized)


def test_an_unstructured_net_loses_its_dead_channels(bench, trained):
    sparse = prune(bench, trained, PruneStage(method="lwm", sparsity=0.99))
    less = shrink(bench, sparse)
    assert less.metadata.lineage[-1].metrics["total"] < sum(m.numel() for m in sparse.masks.values())
    x = torch.rand(16, *bench.data.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(less.model()(x), sparse.model()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_quantize_export_and_verify_take_it(bench, small, tmp_path):
    from rprune.pipeline.bundle import Source, export

    out = tmp_path / "out"
    out.mkdir()
    export(
        bench,
        quantize(bench, small, QuantizeStage()),
        ExportStage(suite="fgsm", limit=40, health=False),
        out,
        Source("s", {}),
    )
    report = read_report(out)
    assert report.sparsity.dense_total == small.metadata.dense_total
    assert report.sparsity.overall == pytest.approx(1 - report.sparsity.kept / small.metadata.dense_total)
    assert (out / "model.int8.onnx").stat().st_size < 20_000
    with pytest.raises(SystemExit) as done:
        main(["verify", str(out), "--level", "static"])
    assert done.value.code == 0
