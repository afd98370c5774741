"""Training in bfloat16: float32 weights, scores and losses, near what float32 gives."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import fx

from rprune.attacks.base import at_rest
from rprune.errors import UsageError, WorkError
from rprune.models.prunable import prunable
from rprune.models.registry import Architecture
from rprune.models.running import Running
from rprune.objectives.base import OBJECTIVES
from rprune.pipeline.bench import Bench
from rprune.pipeline.quantizing import quantize
from rprune.pipeline.recipe import DataSection, PruneStage, QuantizeStage, TrainStage
from rprune.pipeline.stages import prune, train
from rprune.pruning.base import METHODS, Context, Pruner
from rprune.pruning.budget import Budget
from rprune.threat import ThreatModel
from rprune.training.loop import Settings, fit

THREAT = ThreatModel.of("linf", "8/255")


@pytest.fixture(scope="module")
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def trained(tiny, objective: str, precision: str, method: str | None = None, compiled: bool = False):
    model = tiny.net()
    pruner = Pruner(model)
    if method is not None:
        budget = Budget.of({name: weight.numel() for name, weight in prunable(model).items()}, 0.8)
        pruner = METHODS.build(method).bind(model, budget, Context(epochs=2, steps_per_epoch=3))
    settings = Settings(2, 16, 0.02, precision=precision, compile=compiled, select="last")
    found = fit(model, pruner, OBJECTIVES.build(objective, threat=THREAT), tiny.data(), settings, seed=1)
    return [log.values["loss"] for log in found.history], pruner, model


@pytest.mark.parametrize("objective", OBJECTIVES.all())
def test_losses_are_near_those_of_float32(tiny, objective: str) -> None:
    full, _, _ = trained(tiny, objective, "fp32")
    half, pruner, model = trained(tiny, objective, "bf16")
    assert half == pytest.approx(full, rel=0.05)
    assert {tensor.dtype for tensor in [*pruner.parameters(), *model.parameters()]} == {torch.float32}


@pytest.mark.parametrize("method", ["hydra", "harp", "robust-admm"])
def test_methods_meet_their_budget(tiny, method: str) -> None:
    full, _, _ = trained(tiny, "pgd-at", "fp32", method)
    half, pruner, _ = trained(tiny, "pgd-at", "bf16", method)
    assert half == pytest.approx(full, rel=0.05)
    masks = pruner.finish()
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.2 * sum(mask.numel() for mask in masks.values()))


def test_the_net_computes_in_bfloat16_and_is_folded(tiny) -> None:
    net, (x, _) = tiny.net(), tiny.batch()
    seen = []
    with at_rest(Running(net, "bf16"), x) as still:
        assert isinstance(still, Running)
        assert isinstance(still.net, fx.GraphModule)
        still.net.fc.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        logits = still(x)
    assert seen == [torch.bfloat16]
    assert logits.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(logits, net.eval()(x), rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_compiled_steps_are_the_same(tiny) -> None:
    """One compilation of the net in training and one of what is attacked serve all steps."""
    plain, _, _ = trained(tiny, "trades", "fp32", "harp")
    compiled, _, model = trained(tiny, "trades", "fp32", "harp", compiled=True)
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert not any("Running" in type(module).__name__ for module in model.modules())
    net, (x, _) = tiny.net(), tiny.batch()
    running = Running(net, "fp32", compiled=True)
    with at_rest(running, x) as first:
        first(x)
    with at_rest(running, x) as second:
        assert second is first
        with torch.no_grad():
            net.fc.weight.zero_()
            net.fc.bias.zero_()
            assert not second(x).any()  # weights are read where they lie


def test_what_cannot_be_compiled_is_told(tiny, monkeypatch) -> None:
    def broken(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    net, (x, _) = tiny.net(), tiny.batch()
    with pytest.raises(WorkError, match="cannot be compiled") as raised:
        Running(net, compiled=True)(x)
    assert "no compiler" in raised.value.message
    assert "\n" not in raised.value.message
    assert "--compile" in str(raised.value.hint)


def test_stages() -> None:
    bench = Bench.open(DataSection(source="digits"), None, 0, "cpu")
    made = train(
        bench, Architecture("cnn-small", 10, (1, 8, 8)), TrainStage(objective="benign", epochs=1, precision="bf16")
    )
    assert all(tensor.is_contiguous() for tensor in made.state.values())
    pruned = prune(bench, made, PruneStage(sparsity=0.9, epochs=1, objective="benign", precision="bf16"))
    assert sum(int(mask.sum()) for mask in pruned.masks.values()) == pruned.metadata.budget
    assert all(mask.is_contiguous() for mask in pruned.masks.values())
    with pytest.raises(UsageError, match="cannot hold integers"):
        quantize(bench, pruned, QuantizeStage(mode="qat", epochs=1, precision="bf16"))
