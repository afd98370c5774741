"""Suites: the budgets that their names promise, on any number of classes and any image shape."""

import math

import pytest
import torch
from torch import nn

from rprune.attacks.apgd import APGD
from rprune.attacks.names import ABOUT, TABLES
from rprune.attacks.pgd import PGD
from rprune.attacks.square import Square
from rprune.attacks.suites import SUITES, suite, with_transfer
from rprune.attacks.transfer import Transfer
from rprune.data.loaders import Resident
from rprune.errors import InputError, UsageError
from rprune.evaluation.robustness import robustness
from rprune.evaluation.target import Target
from rprune.threat import ThreatModel


class Unbreakable(nn.Module):
    """The first class always, by far; counts images, in all and with a gradient."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes, self.passes, self.gradients = classes, 0, 0

    def forward(self, x):
        self.passes += len(x)
        self.gradients += len(x) * (torch.is_grad_enabled() and x.requires_grad)
        wave = torch.sin(x.flatten(1).sum(1, keepdim=True) * torch.arange(1, self.classes + 1))
        return wave + 100 * nn.functional.one_hot(torch.zeros(len(x), dtype=torch.int64), self.classes)


def images(n, shape, seed=0):
    return torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.slow
def test_aa_standard_spends_its_budget_to_the_last_pass():
    """Fact sheet: apgd-ce 100, apgd-t 9 x 100, fab-t 9 x 100, square 5000; a start and a ranking of classes beside."""
    net, data = Unbreakable(10).eval(), Resident(images(2, (1, 5, 6)), torch.zeros(2, dtype=torch.int64))
    found = robustness(Target(net, net), data, ThreatModel.of("linf", "0.01"), suite("aa-standard"), grid=False)
    assert found.correct == 2
    spent = {tally.name: tally.queries // 2 for tally in found.tallies}
    assert spent == {"apgd-ce": 101, "apgd-t": 1 + 9 * 101, "fab-t": 1 + 9 * 200, "square": 5000}
    assert net.gradients == 2 * (100 + 9 * 100 + 9 * 100)
    verdicts = 2 * (1 + len(found.tallies))
    assert net.passes == 2 * sum(spent.values()) + verdicts
    assert [attack.queries(10) for attack in suite("aa-standard")] == list(spent.values())


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_says_what_it_is(name):
    assert ABOUT[name]
    assert suite(name) == SUITES[name]


def test_budgets_by_name():
    (harp,) = suite("cw20-harp")
    assert harp == PGD(steps=20, step=0.25, loss="margin", kappa=50)
    assert [a.steps for a in suite("aa-torchattacks10")[:3]] == [10, 10, 10]
    assert [getattr(a, "eot", None) for a in suite("aa-rand")] == [20, 20]
    assert [type(a).__name__ for a in suite("aa-quant")] == ["APGD", "APGD", "Transfer", "Transfer", "Square"]
    assert TABLES["harp-table"].keys() == {"FGSM", "PGD-10", "C&W-20", "APGD 50x5", "AA, 10 steps", "AA"}
    assert all(name in SUITES for columns in TABLES.values() for name in columns.values())


@pytest.mark.parametrize("classes", [2, 3, 4, 10, 100])
@pytest.mark.parametrize(("shape", "norm"), [((1, 5, 5), "linf"), ((3, 7, 12), "l2")])
def test_every_number_of_classes_and_every_shape(classes, shape, norm):
    torch.manual_seed(classes)
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 24), nn.ReLU(), nn.Linear(24, classes)).eval()
    pixels = images(12, shape)
    with torch.no_grad():
        labels = net(pixels.float() / 255).argmax(1)
    small = tuple(type(a)(**{"budget": 30} if isinstance(a, Square) else {"steps": 5}) for a in suite("aa-standard"))
    attacks = (*small, APGD(steps=5, loss="dlr"), APGD(steps=5, loss="dlr", targets=9))
    threat = ThreatModel.of(norm, "0.3" if norm == "linf" else "2")
    found = robustness(Target.of(net, net), Resident(pixels, labels), threat, attacks)
    assert found.clean.correct == 12
    assert found.correct < 12


def test_names_of_ones_own_and_several_at_once():
    own = {"mine": ["fgsm", {"name": "pgd", "steps": 40}, "aa-lite"]}
    assert suite("mine", own) == (*SUITES["fgsm"], PGD(steps=40), *SUITES["aa-lite"])
    assert suite("fgsm, square,mine", own) == (*SUITES["fgsm"], *SUITES["square"], *suite("mine", own))
    assert suite("transfer") == (Transfer(),)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("aa-standart", UsageError, "aa-standard"),
        ("apgd-ce,sqare", UsageError, "square"),
        ("harp-table", UsageError, "table"),
        ("nowhere.py:attack", InputError, "nowhere.py"),
    ],
)
def test_names_that_mean_nothing(name, error, words):
    with pytest.raises(error) as caught:
        suite(name)
    assert words in f"{caught.value.message} {caught.value.hint}"


def test_suite_of_an_artifact_with_parents_transfers():
    assert with_transfer(suite("aa-standard"), ()) == suite("aa-standard")
    assert with_transfer(suite("aa-quant"), ["a parent"]) == suite("aa-quant")
    more = with_transfer(suite("aa-standard"), ["a parent"])
    assert more[:4] == suite("aa-standard")
    assert [attack.label for attack in more[4:]] == ["transfer apgd-ce", "transfer apgd-t"]


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr"])
def test_quick_parts_leave_what_the_reference_leaves(oracle_net, load_helper, name):
    """The others, and the whole, in tests/benchmarks."""
    net, x, y = oracle_net
    data = Resident((x * 255).round().to(torch.uint8), y)
    target, threat = Target.of(net, net), ThreatModel.of("linf", "0.08")
    found = robustness(target, data, threat, suite(name), seed=7, batch_size=64)
    wanted = load_helper("oracles/attack_oracle.py").RESULTS
    assert found.clean.correct == round(wanted["clean"] * 256)
    assert abs(found.correct - round(wanted[f"{name}_s0"] * 256)) <= 4
    assert all(tally.misses == 0 for tally in found.tallies)
