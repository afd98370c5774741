"""The oracle itself, against the shared vectors and against sums done by hand."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("wrapper_net_oracle", HERE / "wrapper_net.py")
assert _spec is not None
assert _spec.loader is not None
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

V = json.loads((HERE.parent / "data" / "vectors-hydra-harp-admm.json").read_text())


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def vgg_shapes():
    shapes, c = [], 3
    for width in (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512):
        shapes.append((width, c, 3, 3))
        c = width
    return [*shapes, (256, 2048), (256, 256), (10, 256)]


def resnet_shapes():
    shapes, c = [(64, 3, 3, 3)], 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
            shapes += [(width, c, 3, 3), (width, width, 3, 3)]
            if c != width:
                shapes.append((width, c, 1, 1))
            c = width
    return [*shapes, (10, 512)]


SHAPES = {"vgg16_bn": vgg_shapes(), "resnet18_cifar": resnet_shapes()}


def linear_of(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    layer.weight = nn.Parameter(weight)
    return layer


def small_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    return net.double()


def small_batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(5, 2, 4, 4, generator=generator, dtype=torch.float64),
            torch.randint(3, (5,), generator=generator),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("kind", ["hydra_conv", "hydra_linear"])
def test_initial_scores_and_masks(kind):
    v = V[kind]
    weight = f64(v["weight_flat"]).reshape(v["weight_shape"])
    scores = oracle.scaled_initial_scores(weight, v["fan_in"])
    torch.testing.assert_close(scores.flatten(), f64(v["scores_flat"]), rtol=0, atol=1e-8)
    for keep, expected in v["masks"].items():
        assert weight.numel() - oracle.uniform_kept(weight.numel(), float(keep)) == expected["n_pruned"]
        assert oracle.mask_of(scores.abs(), expected["n_pruned"]).flatten().tolist() == expected["mask"]


def test_conv_layer_takes_its_own_fan_in():
    v = V["hydra_conv"]
    conv = nn.Conv2d(1, 2, 2, dtype=torch.float64)
    conv.weight = nn.Parameter(f64(v["weight_flat"]).reshape(v["weight_shape"]))
    subnet = oracle.SubnetConv(conv, n_pruned=4)
    torch.testing.assert_close(subnet.scores.detach().flatten(), f64(v["scores_flat"]), rtol=0, atol=1e-8)
    grouped = oracle.SubnetConv(nn.Conv2d(4, 4, 3, groups=2), n_pruned=0)
    assert float(grouped.scores.detach().abs().max()) == pytest.approx(math.sqrt(6 / 18))


@pytest.mark.parametrize("v", V["rounding"], ids=lambda v: f"{v['N']}@{v['keep_rate']}")
def test_uniform_kept(v):
    assert oracle.uniform_kept(v["N"], v["keep_rate"]) == v["N"] - v["pruned_exact"]


@pytest.mark.parametrize("arch", SHAPES)
def test_uniform_totals(arch):
    sizes = [math.prod(shape) for shape in SHAPES[arch]]
    for keep, v in V["uniform_totals"][arch].items():
        assert sum(sizes) == v["total"]
        assert sum(oracle.uniform_kept(n, keep) for n in sizes) == v["kept_layerwise_floor_prune"]


def test_straight_through_gradients():
    v = V["ste"]
    x = f64([v["upstream_dL_dweff"]])
    layer = linear_of(f64([v["w"]]))
    hydra = oracle.SubnetLinear(layer, n_pruned=2)
    hydra.scores.data = f64([v["s"]])
    assert hydra.mask().flatten().tolist() == v["mask"]
    hydra(x).sum().backward()
    assert hydra.scores.grad.flatten().tolist() == v["dL_dscore"]
    assert hydra.weight.grad is None

    abs_scores = f64(v["s"]).abs().requires_grad_()
    a = f64(0.5).requires_grad_()
    (oracle.RateMask.apply(abs_scores, a) * f64(v["w"]) * x[0]).sum().backward()
    assert abs_scores.grad.tolist() == v["dL_dmask"]
    assert a.grad.item() == v["dL_drate_sum"]

    harp = oracle.SubnetLinear(layer, a_t=v["a_min"] / 0.1, r=v["r"])
    harp.scores.data = f64([v["s"]])
    assert harp.layer_rate().item() == pytest.approx(v["a"])
    assert harp.mask().flatten().tolist() == [0, 0, 0, 1]
    harp(x).sum().backward()
    assert harp.scores.grad.flatten().tolist() == v["dL_dscore"]
    assert harp.r.grad.item() == pytest.approx(v["dL_dr"])


@pytest.mark.parametrize("v", V["harp_r_init"], ids=lambda v: f"{v['a_init']}@{v['a_t']}")
def test_rate_and_its_start(v):
    assert oracle.harp_initial_r(v["a_init"], v["a_t"]) == pytest.approx(v["r"])
    r = f64(v["r"]).requires_grad_()
    a = oracle.rate(r, v["a_t"])
    a.backward()
    assert a.item() == pytest.approx(v["a_roundtrip"])
    assert r.grad.item() == pytest.approx(v["g_prime"])


def test_lower_clip_is_positive():
    assert oracle.harp_initial_r(0.001, 0.5) == pytest.approx(math.log(0.01 / 0.99))


@pytest.mark.parametrize("v", V["harp_lhw"], ids=["above", "equal", "below"])
def test_hardware_loss(v):
    a = f64(v["a"]).requires_grad_()
    loss = oracle.hardware_loss(a, v["N"], v["a_t"])
    loss.backward()
    assert loss.item() == pytest.approx(v["L_hw"], abs=1e-12)
    if isinstance(v["dL_da"], list):
        assert a.grad.tolist() == pytest.approx(v["dL_da"])


def test_gamma_schedule():
    v = V["harp_gamma"]
    never = oracle.gamma_schedule(v["step"], [1.0] * 12)
    assert never == pytest.approx(v["first_epochs"])
    reached = oracle.gamma_schedule(0.01, [1.0] * 10 + [4e-5] + [1.0] * 9)
    assert reached == pytest.approx(v["first_epochs"][:11] + [0.11] * 9)
    assert oracle.gamma_schedule(0.01, [6e-5, 1.0]) == pytest.approx([0.01, 0.02])


def test_learning_rate():
    for key, lr0, epochs in (("prune lr0.1 E20", 0.1, 20), ("finetune lr0.01 E100", 0.01, 100)):
        for e, lr in V["lr_cosine_ref"][key].items():
            assert oracle.reference_lr(lr0, epochs, int(e)) == pytest.approx(lr)


@pytest.mark.parametrize("key", V["erk"])
def test_erk(key):
    v = V["erk"][key]
    arch, density = key.split("@")
    shapes = v["shapes"] if arch == "tiny" else SHAPES[arch]
    sizes = [math.prod(shape) for shape in shapes]
    densities = oracle.erk(shapes, float(density))
    assert densities == pytest.approx(v["densities"], abs=1e-9)
    kept = [d * n for d, n in zip(densities, sizes, strict=True)]
    if arch == "tiny":
        assert kept == pytest.approx(v["kept"])
        assert sum(sizes) == v["total"]
    else:
        assert [round(n) for n in kept] == v["kept"]
        assert sum(v["kept"]) == v["kept_total"]
        assert densities.count(1.0) == v["n_dense"]
        assert sum(kept) == pytest.approx(v["budget"])


def test_erk_of_a_full_net_is_dense():
    assert oracle.erk(SHAPES["vgg16_bn"], 1.0) == [1.0] * 16


def test_lamp():
    v = V["lamp"]
    scores = {name: oracle.lamp_scores(f64(v[name])) for name in "AB"}
    for name in "AB":
        assert scores[name].tolist() == pytest.approx(v[f"score_{name}"])
    for keep in (2, 3, 4, 5):
        ranked = sorted((s, name) for name in "AB" for s in scores[name].tolist())[-keep:]
        assert ranked[0][0] == pytest.approx(v[f"keep{keep}"]["threshold"])
        for name in "AB":
            share = sum(owner == name for _, owner in ranked) / len(v[name])
            assert share == pytest.approx(v[f"keep{keep}"][name])


def test_lamp_counts_ties_in_the_tail():
    assert oracle.lamp_scores(f64([[1.0, -1.0], [2.0, 0.0]])).tolist() == [[1 / 6, 1 / 6], [1.0, 0.0]]


def test_trades_loss():
    v = V["losses"]
    nat, adv, y = f64([v["nat_logits"]]), f64([v["adv_logits"]]), torch.tensor([v["y"]])
    assert F.cross_entropy(adv, y).item() == pytest.approx(v["pgd_at(CE adv)"])
    assert oracle.kl_per_sample(nat, adv).item() == pytest.approx(v["kl(nat||adv)"])
    assert oracle.trades_loss(nat, adv, y, 6.0).item() == pytest.approx(v["trades_beta6"])
    nat.requires_grad_()
    adv.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, q: oracle.trades_loss(p, q, y, 6.0), (nat, adv))


def test_attacks_on_a_linear_net():
    weight = f64([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    net = linear_of(weight)
    x, y = f64([[0.5, 0.02, 0.3]]), torch.tensor([0])
    start = x + f64([[0.0, 0.0, 0.04]])
    for found in (
        oracle.pgd_linf(net, x, y, 0.1, 0.04, 5, start),
        oracle.trades_attack(net, x, 0.1, 0.04, 5, start + f64([[-1e-3, 1e-3, 0.0]])),
    ):
        torch.testing.assert_close(found, f64([[0.4, 0.12, 0.34]]))
    outside = torch.full_like(x, -1.0)
    assert torch.equal(oracle.pgd_linf(net, x, y, 0.1, 0.04, 0, outside), outside)
    torch.testing.assert_close(oracle.pgd_linf(net, x, y, 0.1, 0.04, 1, outside), f64([[0.4, 0.0, 0.2]]))


def test_attacks_leave_modes_statistics_and_gradients_alone():
    net = small_net().train()
    net[2].eval()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    x, y = small_batches(1)[0]
    oracle.pgd_linf(net, x, y, 0.1, 0.05, 3, x + 0.01)
    oracle.trades_attack(net, x, 0.1, 0.05, 3, x + 0.001)
    assert [m.training for m in net] == [True, True, False, True, True]
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_to_subnet_swaps_every_layer_and_nothing_else():
    net = small_net().eval()
    x = small_batches(1)[0][0]
    same = oracle.to_subnet(net, pruned={"0": 0, "4": 0})
    assert [type(m) for m in same] == [oracle.SubnetConv, nn.BatchNorm2d, nn.ReLU, nn.Flatten, oracle.SubnetLinear]
    assert torch.equal(same(x), net(x))
    assert type(net[0]) is nn.Conv2d
    assert not same.training
    cut = oracle.to_subnet(net, pruned={"0": 9, "4": 40})
    for name in ("0", "4"):
        layer = net.get_submodule(name)
        with torch.no_grad():
            n = {"0": 9, "4": 40}[name]
            layer.weight[layer.weight.abs() <= layer.weight.abs().flatten().sort().values[n - 1]] = 0
    torch.testing.assert_close(cut(x), net(x))


def test_to_subnet_refuses_a_half_given_plan():
    with pytest.raises(ValueError, match="expected one entry"):
        oracle.to_subnet(small_net(), pruned={"0": 0})
    with pytest.raises(ValueError, match="give either"):
        oracle.to_subnet(small_net(), a_t=0.1)
    with pytest.raises(ValueError, match="give either"):
        oracle.to_subnet(small_net(), pruned={"0": 0, "4": 0}, a_t=0.1, r=0.0)


def test_hydra_steps_by_hand():
    torch.manual_seed(2)
    layer = linear_of(torch.randn(3, 4, dtype=torch.float64))
    batches = [(torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])) for _ in range(3)]
    w = layer.weight.detach()
    s = oracle.scaled_initial_scores(w, 4)
    velocity = torch.zeros_like(s)
    for x, y in batches:
        mask = torch.zeros(12, dtype=torch.float64)
        mask[s.abs().flatten().topk(5).indices] = 1
        probability = (x @ (w * mask.view(3, 4)).T).softmax(1)
        upstream = (probability - F.one_hot(y, 3)).T @ x / 5
        velocity = 0.9 * velocity + upstream * w * s.sign() + 0.01 * s
        s = s - 0.5 * velocity
    found = oracle.sgd_steps_hydra(layer, {"": 7}, batches, lr=0.5, momentum=0.9, wd=0.01)
    assert list(found) == ["scores"]
    torch.testing.assert_close(found["scores"], s)


def test_harp_steps_by_hand():
    torch.manual_seed(3)
    layer = linear_of(torch.randn(3, 4, dtype=torch.float64))
    batches = [(torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])) for _ in range(3)]
    w = layer.weight.detach()
    s, r, a_min = oracle.scaled_initial_scores(w, 4), -0.5, 0.02
    velocity, r_velocity, kept_counts = torch.zeros_like(s), 0.0, []
    for x, y in batches:
        sigma = 1 / (1 + math.exp(-r))
        a = a_min + (1 - a_min) * sigma
        kept_counts.append(12 - int((1 - a) * 12))
        mask = torch.zeros(12, dtype=torch.float64)
        mask[s.abs().flatten().topk(kept_counts[-1]).indices] = 1
        probability = (x @ (w * mask.view(3, 4)).T).softmax(1)
        to_mask = (probability - F.one_hot(y, 3)).T @ x / 5 * w
        to_rate = to_mask.sum().item() + (0.3 / 0.2 if a > 0.2 else 0.0)
        velocity = 0.9 * velocity + to_mask * s.sign() + 0.01 * s
        r_velocity = 0.9 * r_velocity + to_rate * (1 - a_min) * sigma * (1 - sigma) + 0.01 * r
        s, r = s - 0.5 * velocity, r - 0.5 * r_velocity
    assert len(set(kept_counts)) > 1
    found = oracle.sgd_steps_harp(layer, 0.2, 0.3, -0.5, batches, lr=0.5, momentum=0.9, wd=0.01)
    assert sorted(found) == ["r", "scores"]
    torch.testing.assert_close(found["scores"], s)
    assert found["r"].item() == pytest.approx(r)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_train_scores_and_rates_only(dtype):
    net = small_net().to(dtype)
    batches = [(x.to(dtype), y) for x, y in small_batches()]
    before = {name: t.clone() for name, t in net.state_dict().items()}
    hydra = oracle.sgd_steps_hydra(net, {"0": 18, "4": 24}, batches, 0.1, 0.9, 5e-4)
    harp = oracle.sgd_steps_harp(net, 0.1, 0.01, {"0": 0.0, "4": -1.0}, batches, 0.1, 0.9, 5e-4)
    assert sorted(hydra) == ["0.scores", "4.scores"]
    assert sorted(harp) == ["0.r", "0.scores", "4.r", "4.scores"]
    assert harp["0.scores"].dtype == dtype
    assert harp["0.r"] != 0
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
