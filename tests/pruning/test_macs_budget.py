"""Budgets of multiply-accumulates: as full as integers allow, for every method that takes one, and HARP's pressure."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rprune.cli.app import main
from rprune.errors import InputError, UsageError
from rprune.models.cost import count_macs, positions
from rprune.models.prunable import prunable
from rprune.objectives.benign import Benign
from rprune.pipeline.artifact import load_artifact, save_artifact
from rprune.pipeline.bench import Bench, architecture
from rprune.pipeline.recipe import DataSection, FinetuneStage, ModelSection, PruneStage, TrainStage, validated
from rprune.pipeline.stages import check_stage, finetune, prune, train
from rprune.pruning.allocation import ALLOCATORS, allocate, global_top
from rprune.pruning.base import METHODS, Context, check_costs
from rprune.pruning.budget import Budget, apportion, fill
from rprune.pruning.harp import Harp, macs_per_weight
from rprune.threat import ThreatModel
from rprune.training.loop import Settings, fit

SHAPE = (3, 8, 8)
quick = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def macs_budget(model, share):
    sizes = {name: weight.numel() for name, weight in prunable(model).items()}
    return Budget.of(sizes, 1 - Fraction(str(share)), costs=positions(model, SHAPE))


def counts_of(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


@st.composite
def weighed(draw):
    """A budget whose weights cost unequally, and a share for each tensor."""
    sizes = {f"l{i}": n for i, n in enumerate(draw(st.lists(st.integers(1, 300), min_size=1, max_size=6)))}
    costs = {name: draw(st.sampled_from([1, 2, 3, 16, 49, 64])) for name in sizes}
    floor = draw(st.integers(1, 3))
    least = sum(min(floor, n) * costs[name] for name, n in sizes.items())
    total = sum(n * costs[name] for name, n in sizes.items())
    budget = Budget(sizes, draw(st.integers(least, total)), floor, costs=costs)
    return budget, {name: draw(st.floats(0, 1e6)) for name in sizes}


@settings(quick, max_examples=25)
@given(weighed())
def test_nothing_more_fits_whoever_shares_out(case):
    budget, shares = case
    generator = torch.Generator().manual_seed(len(shares))
    weights = {name: torch.randn(n, generator=generator) for name, n in budget.sizes.items()}
    for counts in (
        apportion(shares, budget),
        global_top({name: weight.abs() for name, weight in weights.items()}, budget),
        *(allocate(name, weights, budget) for name in ALLOCATORS),
    ):
        room = budget.kept - sum(count * budget.costs[name] for name, count in counts.items())
        assert room >= 0
        assert all(room < budget.costs[name] for name, size in budget.sizes.items() if counts[name] < size)
        assert all(budget.least[name] <= counts[name] <= size for name, size in budget.sizes.items())
        assert budget.met(counts)


@quick
@given(weighed())
def test_fill_spends_the_budget(case):
    budget, shares = case
    counts = fill(shares, budget)
    assert sum(n * budget.costs[name] for name, n in counts.items()) == pytest.approx(budget.kept, rel=1e-9, abs=1e-6)


@quick
@given(weighed(), st.integers(1, 5))
def test_one_price_for_all_is_a_budget_of_weights(case, price):
    budget, shares = case
    kept = max(budget.kept * sum(budget.sizes.values()) // budget.total, sum(budget.least.values()))
    plain = Budget(budget.sizes, kept, budget.floor)
    priced = Budget(budget.sizes, kept * price, budget.floor, costs=dict.fromkeys(budget.sizes, price))
    assert apportion(shares, priced) == apportion(shares, plain)
    scores = {name: torch.arange(float(n)) for name, n in budget.sizes.items()}
    assert global_top(scores, priced) == global_top(scores, plain)
    assert priced.density == plain.density


@quick
@given(weighed(), st.integers(0, 2**31))
def test_global_top_takes_each_in_its_turn_if_it_fits(case, seed):
    """The slow way: walk down the list, and take what does not cost more than what is left."""
    budget, _ = case
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.randint(0, 50, (n,), generator=generator).float() for name, n in budget.sizes.items()}
    order = []
    for name, score in scores.items():
        best = sorted(range(len(score)), key=lambda i: (-float(score[i]), i))
        order += [(rank >= budget.least[name], -float(score[i]), name) for rank, i in enumerate(best)]
    position = {name: index for index, name in enumerate(scores)}
    counts, left = dict.fromkeys(scores, 0), budget.kept
    for _, _, name in sorted(order, key=lambda entry: (entry[0], entry[1] if entry[0] else 0, position[entry[2]])):
        if budget.costs[name] <= left:
            counts[name] += 1
            left -= budget.costs[name]
    assert global_top(scores, budget) == counts


def test_met_means_that_no_set_of_more_weights_fits():
    """Brute force over all counts of two tensors."""
    budget = Budget({"a": 3, "b": 4}, 13, costs={"a": 4, "b": 3})
    for a, b in itertools.product(range(4), range(5)):
        fits = 4 * a + 3 * b <= 13
        more = any(4 * c + 3 * d <= 13 for c, d in ((a + 1, b), (a, b + 1)) if c <= 3 and d <= 4)
        assert budget.met({"a": a, "b": b}) == (fits and not more)


def test_a_share_of_macs_has_no_float_trap():
    sizes, costs = {"a": 10, "b": 10}, {"a": 9, "b": 1}
    for hundredths in range(10, 101):
        assert Budget.of(sizes, 1 - Fraction(str(hundredths / 100)), costs=costs).kept == hundredths


def test_a_budget_too_small_and_a_layer_that_never_runs():
    with pytest.raises(UsageError, match="of 100 MACs leaves a layer empty") as caught:
        Budget.of({"a": 10, "b": 10}, 0.95, costs={"a": 9, "b": 1})
    assert "macs of at least 0.1" in caught.value.hint
    with pytest.raises(InputError, match="b does nothing"):
        Budget.of({"a": 10, "b": 10}, 0.5, costs={"a": 9, "b": 0})


ABLE = [name for name, cls in METHODS.all().items() if cls().takes_costs()]
OPTIONS = {"harp": {"gamma_step": 0.5}, "harp-r": {"gamma_step": 0.5}, "s2ap": {"warmup": 1}}
SETTINGS = Settings(epochs=2, batch_size=24, lr=0.5, momentum=0.9, weight_decay=5e-3)


def searched(method, budget, tiny, epochs=2):
    model = tiny.net()
    data = tiny.data()
    context = Context(
        epochs,
        2,
        input_shape=SHAPE,
        batches=lambda: data.shuffled(24, torch.Generator().manual_seed(6), "none"),
        loss=lambda net, batch: torch.nn.functional.cross_entropy(net(batch.x), batch.y),
    )
    pruner = method.bind(model, budget, context)
    fit(model, pruner, Benign(), data, replace(SETTINGS, epochs=epochs))
    return model, pruner, pruner.finish()


@pytest.mark.parametrize("name", ABLE)
def test_methods_that_take_a_budget_of_macs_keep_it(tiny, name):
    budget = macs_budget(tiny.net(), 0.1)
    model, pruner, masks = searched(METHODS.build({"name": name, **OPTIONS.get(name, {})}), budget, tiny)
    assert pruner.exact
    assert budget.met(counts_of(masks))
    counted = count_macs(model, SHAPE)
    assert counted["sparse"] == budget.spent(counts_of(masks))
    assert 0 <= counted["dense"] // 10 - counted["sparse"] < max(budget.costs.values())


def test_those_are_the_methods_of_the_papers_baselines():
    assert {"harp", "harp-r", "harp-s", "hydra", "lwm", "nap", "ap", "robust-admm", "s2ap"} <= set(ABLE)
    for name in set(METHODS.all()) - set(ABLE):
        with pytest.raises(UsageError, match=f"{name} .*weights") as caught:
            check_costs(METHODS.build(name))
        assert "harp, " in caught.value.hint


@pytest.mark.parametrize(
    "method",
    [
        {"name": "lwm", "structure": "filter"},
        {"name": "harp", "structure": "channel"},
        {"name": "robust-admm", "structure": "column"},
        {"name": "harp", "macs_weight": 0.5},
        {"name": "s2ap", "host": {"name": "hydra", "structure": "filter"}},
    ],
)
def test_options_that_do_not_go_with_a_budget_of_macs(method):
    with pytest.raises(UsageError, match="budget of weights"):
        check_costs(METHODS.build(method))


def test_hardware_loss_counts_macs(tiny):
    """HARP's eq. 2 with N_l P_l in the place of N_l, by hand."""
    model = tiny.net()
    budget = macs_budget(model, 0.05)
    pruner = Harp().bind(model, budget, Context())
    spent = sum(
        a * size * budget.costs[name]
        for a, (name, size) in zip(pruner.rates().tolist(), budget.sizes.items(), strict=True)
    )
    dense = sum(size * budget.costs[name] for name, size in budget.sizes.items())
    a_t = (dense * 5 // 100) / dense
    assert float(pruner.hardware_loss().detach()) == pytest.approx(spent / (a_t * dense) - 1, rel=1e-5)
    assert torch.equal(pruner.penalty(), pruner.gamma * pruner.hardware_loss())


def test_macs_per_weight_by_hand_and_what_a_layer_pays():
    sizes, places = torch.tensor([100.0, 900.0]), torch.tensor([64.0, 4.0])
    a = torch.tensor([0.5, 0.1], requires_grad=True)
    mean, dense = (50 * 64 + 90 * 4) / 140, (100 * 64 + 900 * 4) / 1000
    found = macs_per_weight(a, sizes, places)
    assert float(found.detach()) == pytest.approx(mean / dense)
    found.backward()
    assert a.grad.tolist() == pytest.approx([n * (p - mean) / (140 * dense) for n, p in ((100, 64), (900, 4))])
    assert float(macs_per_weight(torch.full((2,), 0.3), sizes, places)) == pytest.approx(1.0)
    assert float(macs_per_weight(0.2 * a.detach(), sizes, places)) == pytest.approx(mean / dense)


def test_pressure_lowers_the_macs_of_as_many_weights(tiny):
    sizes = {name: weight.numel() for name, weight in prunable(tiny.net()).items()}
    budget = Budget.of(sizes, 0.9)
    reached = {}
    for weight in (0.0, 0.5, 2.0):
        model, pruner, masks = searched(Harp(gamma_step=0.5, macs_weight=weight), budget, tiny, epochs=8)
        assert sum(counts_of(masks).values()) == budget.kept
        assert pruner.within_budget()
        reached[weight] = count_macs(model, SHAPE)["sparse"]
    assert reached[2.0] < reached[0.5] < 0.8 * reached[0.0]


def test_no_pressure_is_the_paper(tiny):
    """0 changes no bit of the search, and needs no input shape."""
    model = tiny.net()
    budget = Budget.of({name: weight.numel() for name, weight in prunable(model).items()}, 0.9)
    pruner = Harp().bind(model, budget, Context())
    pruner.penalty().backward()
    ours = pruner.r.grad.clone()
    pruner.r.grad = None
    (pruner.gamma * pruner.hardware_loss()).backward()
    assert torch.equal(ours, pruner.r.grad)
    with pytest.raises(UsageError, match="forward pass"):
        Harp(macs_weight=1.0).bind(model, budget, Context())
    with pytest.raises(UsageError, match="single weights"):
        Harp(macs_weight=1.0, structure="filter")


@pytest.fixture(scope="module")
def bench():
    return Bench.open(DataSection(source="digits"), ThreatModel.of("linf", "0.03"), 0, "cpu")


@pytest.fixture(scope="module")
def trained(bench):
    arch = architecture(ModelSection(arch="cnn-small"), bench.data)
    return train(bench, arch, TrainStage(objective="benign", epochs=1, batch_size=32, lr=0.05))


def test_the_stage_records_what_it_kept_and_what_that_costs(bench, trained):
    pruned = prune(bench, trained, PruneStage(method="lwm", macs=0.05))
    kept, metrics = sum(counts_of(pruned.masks).values()), pruned.metadata.lineage[-1].metrics
    assert metrics["macs"]["sparse"] == metrics["macs"]["dense"] * 5 // 100
    assert metrics["macs"] == count_macs(pruned.model(), bench.data.shape)
    total = sum(mask.numel() for mask in pruned.masks.values())
    assert (metrics["kept"], metrics["total"]) == (kept, total)
    assert (pruned.metadata.budget, pruned.metadata.sparsity) == (kept, 1 - kept / total)
    tuned = finetune(bench, pruned, FinetuneStage(epochs=1, objective="benign"))
    assert tuned.metadata.lineage[-1].metrics["macs"] == metrics["macs"]
    again = prune(bench, pruned, PruneStage(method="lwm", macs=0.05))
    assert counts_of(again.masks) == counts_of(pruned.masks)
    with pytest.raises(InputError, match="MACs left"):
        prune(bench, pruned, PruneStage(method="lwm", macs=0.5))


def test_layers_that_stay_dense_are_paid_from_the_budget(bench, trained):
    first = next(iter(prunable(trained.model())))
    pruned = prune(bench, trained, PruneStage(method="hydra", macs=0.2, exclude=(first,), epochs=1))
    assert bool(pruned.masks[first].all())
    macs = pruned.metadata.lineage[-1].metrics["macs"]
    assert macs["sparse"] == macs["dense"] // 5


@pytest.mark.parametrize("table", [{}, {"sparsity": 0.5, "macs": 0.5}])
def test_exactly_one_budget(table):
    with pytest.raises(UsageError, match="sparsity") as caught:
        validated(PruneStage, table, "options")
    assert "macs 0.05" in caught.value.hint


@pytest.mark.parametrize("macs", [0, -0.1, 1.5])
def test_macs_outside_their_range(macs):
    with pytest.raises(UsageError, match="macs") as caught:
        validated(PruneStage, {"macs": macs}, "options")
    assert "5 %" in caught.value.hint


def test_every_mistake_is_found_before_work_begins(bench, trained):
    arch = trained.metadata.arch
    check_stage(PruneStage(method="harp", macs=0.05), bench, arch)
    with pytest.raises(UsageError, match="leaves a layer empty"):
        check_stage(PruneStage(method="lwm", macs=0.0001), bench, arch)
    with pytest.raises(UsageError, match="dnr"):
        check_stage(PruneStage(method="dnr", macs=0.5), bench, arch)


def test_the_command(bench, trained, tmp_path, capsys):  # noqa: ARG001
    save_artifact(trained, tmp_path / "model.pt")

    def call(*options):
        with pytest.raises(SystemExit) as done:
            main(["prune", str(tmp_path / "model.pt"), *options])
        return done.value.code, capsys.readouterr()

    code, said = call("--macs", "0.05", "-m", "lwm")
    assert code == 0, said.err
    made = load_artifact(tmp_path / "model-lwm-macs0.05.pt")
    macs = made.metadata.lineage[-1].metrics["macs"]
    assert f"{macs['sparse']:,}" in said.out
    assert f"{macs['dense']:,}" in said.out
    for options in ((), ("--macs", "0.05", "-s", "0.9")):
        code, said = call(*options)
        assert code == 2
        assert "sparsity" in said.err
    code, said = call("-s", "0.9", "--macs-weight", "0.5", "--epochs", "1", "--objective", "benign")
    assert code == 0, said.err
    method = load_artifact(tmp_path / "model-harp-0.9.pt").metadata.lineage[-1].config["method"]
    assert method["macs_weight"] == 0.5
    code, said = call("-s", "0.9", "-m", "lwm", "--macs-weight", "0.5", "--force")
    assert code == 2
    assert "macs_weight" in said.err
