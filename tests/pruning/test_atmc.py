"""ATMC: the vectors, exact initial factors, budgets at every step, the ADMM splitting, and what ships."""

import copy

import pytest
import torch
from torch import nn

from rprune.errors import UsageError
from rprune.models.prunable import prunable
from rprune.objectives.benign import Benign
from rprune.pruning.atmc import REST, SQUARE, distance, factored
from rprune.pruning.base import METHODS, Context
from rprune.pruning.budget import Budget
from rprune.pruning.codebook import nearest
from rprune.pruning.masks import count
from rprune.training.loop import Settings, fit

SETTINGS = Settings(epochs=3, batch_size=24, lr=0.1)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def budget_of(model, sparsity, **options):
    return Budget.of({name: w.numel() for name, w in prunable(model).items()}, sparsity, **options)


def bound(model, budget, **options):
    return METHODS.build({"name": "atmc", **options}).bind(model, budget, Context(3, 2))


def with_steps(pruner, look):
    """Call ``look`` after every step."""
    original = pruner.after_step

    def after_step():
        original()
        look()

    pruner.after_step = after_step


def train(model, pruner, tiny, settings=SETTINGS, **options):
    return fit(model, pruner, Benign(), tiny.data(), settings, **options)


def test_abc_rank_eq_in(vectors_others):
    v = vectors_others["abc_rank_eq_in"]
    made = factored(f64(v["V"]), f64(v["U"]), f64(v["C"]))
    torch.testing.assert_close(made, f64(v["W"]), rtol=0, atol=1e-9)
    assert sum(int(f64(v[name]).count_nonzero()) for name in "UVC") == v["nnz_factors"]
    assert int(made.count_nonzero()) == v["nnz_product"]
    transposed = factored(f64(v["V"]).T, f64(v["U"]).T, f64(v["C"]).T)  # the other case: r = out
    torch.testing.assert_close(transposed, f64(v["W"]).T, rtol=0, atol=1e-9)


def test_admm_step(vectors_others):
    v = vectors_others["admm_step"]
    value, dual = f64(v["W"]), f64(v["U"])
    found = nearest(value + dual, f64(v["levels"]).sort().values)
    torch.testing.assert_close(found, f64(v["Z"]), rtol=0, atol=1e-9)
    penalty = v["rho"] / 2 * distance({"w": value}, {"w": found}, {"w": dual})
    assert float(penalty) == pytest.approx(v["penalty_at_Z"], abs=1e-12)
    torch.testing.assert_close(dual + value - found, f64(v["U_new"]), rtol=0, atol=1e-9)


def test_quantize_takes_the_admm_step_on_the_support(vectors_others):
    """The vector's numbers through the pruner, whose levels are learned and whose zeros stay zeros without a dual."""
    v = vectors_others["admm_step"]
    net = nn.Linear(4, 1, bias=False).double()
    net.weight.data = f64([v["W"]])
    pruner = bound(net, Budget({"weight": 4}, 3), bits=8)
    with torch.no_grad():
        pruner.duals["weight"].copy_(f64([v["U"]]))
    pruner.quantize()
    moved = f64(v["W"]) + f64(v["U"])
    moved[2] = 0.0  # the dual off the support ends
    torch.testing.assert_close(pruner.copies["weight"][0], moved)  # 3 values fit into 255 levels
    assert not pruner.duals["weight"].any()


@pytest.mark.parametrize("shape", ["wide", "tall", "square", "grouped"])
def test_initial_factors_make_the_net_exactly(shape):
    layer = {
        "wide": nn.Conv2d(4, 6, 3),
        "tall": nn.Conv2d(3, 40, 3),
        "square": nn.Linear(7, 7),
        "grouped": nn.Conv2d(8, 8, 3, groups=4),
    }[shape]
    before = copy.deepcopy(layer.state_dict())
    pruner = bound(layer, budget_of(layer, 0.5))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(pruner.effective()["weight"], before["weight"])
    shapes = {name: tuple(value.shape) for name, value in pruner.learned.items()}
    if shape == "grouped":
        assert shapes == {"weight": (8, 2, 3, 3)}
    else:
        out, inner = before["weight"].flatten(1).shape
        full = tuple(before["weight"].shape)
        rank = min(out, inner)
        assert shapes == {"weight": full, SQUARE + "weight": (rank, rank), REST + "weight": full}
    assert pruner.penalty() is None


def test_dense_layers_are_not_factored_and_stay_dense(tiny):
    model = tiny.net()
    budget = budget_of(model, 0.7, exclude=["conv1"], floor=0.02)
    pruner = bound(model, budget)
    assert SQUARE + "conv1.weight" not in pruner.learned
    train(model, pruner, tiny)
    assert pruner.finish()["conv1.weight"].all()
    assert prunable(model)["conv1.weight"].all()


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99, 0.999])
def test_factors_are_within_the_budget_after_every_step(tiny, sparsity, bits):
    model = tiny.net()
    budget = budget_of(model, sparsity)
    pruner = bound(model, budget, bits=bits, quantize_every=2)
    counts = []

    def look():
        counts.append(sum(int(value.count_nonzero()) for value in pruner.learned.values()))
        weights = prunable(model)
        assert all(torch.equal(weights[name], w) for name, w in pruner.effective().items())
        assert all(weight.any() for weight in weights.values()), "a layer is empty"

    with_steps(pruner, look)
    train(model, pruner, tiny)
    assert counts == [budget.kept] * 6
    share = sum(int(w.count_nonzero()) for w in prunable(model).values()) / budget.total
    assert pruner.log()["kept_share"] == share
    assert pruner.log()["factor_share"] == budget.kept / budget.total
    masks = pruner.finish()
    assert count(masks) == budget.kept
    for name, weight in prunable(model).items():
        assert torch.equal(weight != 0, masks[name]), "a kept weight is lost, or a cut one is not"
        assert not torch.signbit(weight[~masks[name]]).any()
        assert masks[name].any()
    assert pruner.log()["kept_share"] == share, "the log tells the search's figures, not the artifact's"


def test_gradients_of_the_factors(tiny):
    """Those of a functional net whose weights are (I + square) main + rest."""
    model = tiny.net(dtype=torch.float64)
    pruner = bound(model, budget_of(model, 0.5))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in pruner.learned.values():
            value.add_(torch.randn(value.shape, generator=generator, dtype=value.dtype), alpha=0.1)
    pruner.after_step()
    x, y = tiny.batch(dtype=torch.float64)
    factors = {name: value.detach().clone().requires_grad_() for name, value in pruner.learned.items()}

    def weight(name, shape):
        main, square = factors[name].reshape(shape[0], -1), factors[SQUARE + name]
        grown = square + torch.eye(len(square), dtype=square.dtype)
        made = main @ grown if len(square) == main.shape[1] else grown @ main
        return (made + factors[REST + name].reshape(made.shape)).reshape(shape)

    weights = {name: weight(name, w.shape) for name, w in prunable(model).items()}
    twin = copy.deepcopy(model).train()
    nn.functional.cross_entropy(torch.func.functional_call(twin, weights, (x,)), y).backward()
    nn.functional.cross_entropy(model.train()(x), y).backward()
    pruner.before_step()
    for name, value in pruner.learned.items():
        torch.testing.assert_close(value.grad, factors[name].grad)


def test_weights_whose_product_is_too_sparse_are_filled_up():
    """Two factors with an entry at the same place make one weight: the largest given weight takes the free place."""
    net = nn.Linear(3, 2, bias=False)
    net.weight.data = torch.tensor([[3.0, -2.0, 0.5], [1.0, 0.25, -0.125]])
    pruner = bound(net, Budget({"weight": 6}, 4))
    with torch.no_grad():
        for value in pruner.learned.values():
            value.zero_()
        pruner.learned["weight"][0, 0] = 3.0
        pruner.learned[REST + "weight"][0, 0] = 1.0
        pruner.learned["weight"][1, 1] = 0.5
        pruner.learned[REST + "weight"][1, 1] = -0.25
    pruner.after_step()
    assert net.weight.tolist() == [[4.0, 0.0, 0.0], [0.0, 0.25, 0.0]]
    assert pruner.log() == {"kept_share": 2 / 6, "factor_share": 4 / 6}
    masks = pruner.finish()
    assert masks["weight"].int().tolist() == [[1, 1, 0], [1, 1, 0]]
    assert net.weight.tolist() == [[4.0, -0.25, 0.0], [0.25, 0.25, 0.0]]


def test_a_dense_product_is_cut_to_its_largest():
    net = nn.Linear(3, 2, bias=False)
    net.weight.data = torch.tensor([[3.0, -2.0, 1.0], [1.0, 1.0, 1.0]])
    pruner = bound(net, Budget({"weight": 6}, 4))
    with torch.no_grad():
        pruner.learned["weight"][1] = 0.0
        pruner.learned[SQUARE + "weight"][1, 0] = 0.5
    pruner.after_step()
    assert net.weight.tolist() == [[3.0, -2.0, 1.0], [1.5, -1.0, 0.5]]
    pruner.finish()
    assert net.weight.tolist() == [[3.0, -2.0, 1.0], [1.5, 0.0, 0.0]]


def test_eight_bits_ship_a_codebook_on_the_masks(tiny):
    model = tiny.net()
    budget = budget_of(model, 0.3)
    pruner = bound(model, budget, bits=8, quantize_every=1)
    train(model, pruner, tiny)
    plain = pruner.made_of(pruner.projected())
    masks = pruner.finish()
    for name, weight in prunable(model).items():
        kept = weight[masks[name]]
        assert len(kept.unique()) <= 255
        assert torch.equal(weight != 0, masks[name])
        same = masks[name] & (plain[name] != 0)
        assert torch.equal(weight[same].sign(), plain[name][same].sign())
        assert (weight - plain[name])[same].norm() < 0.02 * plain[name][same].norm()
    assert len(prunable(model)["fc.weight"].unique()) == 256, "here the codebook is full"


def test_copies_follow_the_factors(tiny):
    model = tiny.net()
    pruner = bound(model, budget_of(model, 0.3), bits=8, quantize_every=2)
    assert float(pruner.penalty().detach()) == 0
    penalties = []

    def look():
        penalties.append(float(pruner.penalty().detach()))
        if pruner.steps % 2:  # the copies are of this step
            for name, value in pruner.learned.items():
                assert torch.equal(pruner.copies[name] != 0, value != 0), "quantization changed the support"
                assert len(pruner.copies[name].unique()) <= 256
                assert not pruner.duals[name][value == 0].any()

    with_steps(pruner, look)
    train(model, pruner, tiny)
    assert pruner.steps == 6
    assert all(penalty > 0 for penalty in penalties)
    size = pruner.log()["size_share"]
    assert pruner.log()["factor_share"] / 4 < size < pruner.log()["factor_share"]


@pytest.mark.parametrize("stop_after", [1, 2])
def test_eight_bits_resume_exactly(tiny, tmp_path, stop_after):
    class Stop(Exception):
        pass

    def stop(log):
        if log.epoch == stop_after:
            raise Stop

    def run(**options):
        model = tiny.net()
        pruner = bound(model, budget_of(model, 0.5), bits=8, quantize_every=3)
        train(model, pruner, tiny, **options)
        masks = pruner.finish()
        return {**model.state_dict(), **masks, **pruner.copies, **{f"u/{n}": u for n, u in pruner.duals.items()}}

    file = tmp_path / "state.pt"
    with pytest.raises(Stop):
        run(state_file=file, on_epoch=stop)
    assert tiny.same_bits(run(state_file=file), run())


@pytest.mark.parametrize("options", [{"bits": 4}, {"rho": 0}, {"quantize_every": 0}])
def test_options_out_of_range(options):
    with pytest.raises(UsageError):
        METHODS.build({"name": "atmc", **options})
