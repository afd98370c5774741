"""Ledgers: equal bits whatever the batches, order, shards and interruptions; never mixed."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from rprune.attacks.apgd import APGD
from rprune.attacks.fab import FAB
from rprune.attacks.fgsm import FGSM
from rprune.attacks.pgd import PGD
from rprune.attacks.square import Square
from rprune.attacks.transfer import Transfer
from rprune.data.loaders import Resident
from rprune.errors import InputError, UsageError, WorkError
from rprune.evaluation.ledger import Clean, Ledger, Row, Witness
from rprune.evaluation.robustness import chosen, on_grid, robustness
from rprune.evaluation.target import INVALID, Rows, Target
from rprune.threat import ThreatModel

LINF, L2 = ThreatModel.of("linf", "0.08"), ThreatModel.of("l2", "0.8")
KEY = {"artifact": "a", "seed": 0}
SUITE = (
    FGSM(),
    APGD(steps=6),
    APGD(steps=5, loss="dlr", targets=3),
    FAB(steps=4, targets=2),
    Transfer(attack=PGD(steps=3)),
    Square(budget=25),
)


@pytest.fixture(scope="module")
def data(oracle_net):
    _, x, y = oracle_net
    return Resident((x * 255).round().to(torch.uint8)[:48], y[:48])


@pytest.fixture(scope="module")
def target(oracle_net):
    net, _, _ = oracle_net
    return Target.of(net, net, (net,))


def ledger_of(target, data, threat, ledger=None, **options):
    ledger = Ledger(KEY) if ledger is None else ledger
    robustness(target, data, threat, SUITE, ledger=ledger, **options)
    return ledger


@pytest.fixture(scope="module", params=[LINF, L2], ids=str)
def whole(request, target, data):
    return request.param, ledger_of(target, data, request.param, batch_size=256).canonical()


@pytest.mark.parametrize("size", [64, 7])
def test_batch_size_does_not_change_a_bit(whole, target, data, size):
    threat, wanted = whole
    assert ledger_of(target, data, threat, batch_size=size).canonical() == wanted


def test_order_does_not_change_a_bit(whole, target, data):
    threat, wanted = whole
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    assert ledger_of(target, data, threat, ids=order, batch_size=32).canonical() == wanted


def test_three_shards_merged_are_the_whole(whole, target, data, tmp_path):
    threat, wanted = whole
    merged = Ledger.open(tmp_path / "all.jsonl", KEY)
    for part in range(3):
        path = tmp_path / f"{part}.jsonl"
        ledger_of(target, data, threat, Ledger.open(path, KEY), ids=chosen(48, None, (part, 3)), batch_size=20)
        merged.merge(path)
    assert merged.canonical() == wanted
    assert Ledger.open(tmp_path / "all.jsonl", KEY).canonical() == wanted
    found = robustness(target, data, threat, SUITE, ledger=merged)
    assert found.complete
    assert merged.canonical() == wanted


@pytest.mark.parametrize("cut", [0, 0.001, 0.2, 0.5, 0.93])
def test_a_file_that_was_cut_off_is_continued(whole, target, data, tmp_path, cut):
    threat, wanted = whole
    path = tmp_path / "ledger.jsonl"
    ledger_of(target, data, threat, Ledger.open(path, KEY), batch_size=16)
    text = path.read_bytes()
    path.write_bytes(text[: int(cut * len(text))])
    ledger_of(target, data, threat, Ledger.open(path, KEY), batch_size=40)
    assert Ledger.open(path, KEY).canonical() == wanted


def test_stored_points_are_the_points(target, data, tmp_path):
    path = tmp_path / "ledger.jsonl"
    found = robustness(target, data, L2, SUITE, ledger=Ledger.open(path, KEY))
    again = robustness(target, data, L2, SUITE, ledger=Ledger.open(path, KEY))
    assert 0 < int(found.exact.sum()) < len(found.exact) or bool(found.exact.all())
    for name in ("broken_ids", "points", "adversarial", "exact", "queries", "size"):
        assert torch.equal(getattr(found, name), getattr(again, name)), name
    assert found.tallies == again.tallies


def test_budget_ends_between_batches_and_the_rest_follows(target, data, tmp_path):
    path = tmp_path / "ledger.jsonl"
    found = robustness(target, data, LINF, SUITE, ledger=Ledger.open(path, KEY), budget=0.0)
    assert not found.complete
    assert found.correct == found.clean.correct
    assert [tally.tried for tally in found.tallies] == [0] * len(SUITE)
    assert robustness(target, data, LINF, SUITE, ledger=Ledger.open(path, KEY)).complete


@pytest.mark.parametrize("change", [{"artifact": "b"}, {"seed": 1}, {"more": 2}])
def test_another_key_is_refused(tmp_path, change):
    path = tmp_path / "ledger.jsonl"
    Ledger.open(path, KEY).add_clean({0: Clean(1, 1)})
    other = KEY | change
    with pytest.raises(UsageError, match=next(iter(change))):
        Ledger.open(path, other)
    with pytest.raises(UsageError):
        Ledger.open(tmp_path / "new.jsonl", other).merge(path)
    assert Ledger.open(path, KEY).clean == {0: Clean(1, 1)}
    assert Ledger.open(path, other, resume=False).clean == {}


@pytest.mark.parametrize("text", ["{}", "{}\n", "no json\n", '{"format": "rprune.ledger/9", "key": {}}\n', "[1]\n"])
def test_what_is_no_ledger_is_refused(tmp_path, text):
    path = tmp_path / "ledger.jsonl"
    path.write_text(text)
    with pytest.raises(InputError):
        Ledger.open(path, KEY)
    with pytest.raises(InputError):
        Ledger(KEY).merge(tmp_path / "missing.jsonl")


@pytest.mark.parametrize("exact", [True, False])
def test_a_witness_survives_the_file(tmp_path, exact):
    x = torch.randint(0, 256, (3, 5, 4)).float() / 255 if exact else torch.rand(3, 5, 4)
    row = Row("fooled", 7, -0.25, Witness(x, 2, 0.03, exact))
    ledger = Ledger.open(tmp_path / "l.jsonl", KEY)
    ledger.add_clean({4: Clean(1, 1)})
    ledger.add("fgsm", {4: row})
    read = Ledger.open(tmp_path / "l.jsonl", KEY).rows["fgsm"][4]
    assert torch.equal(read.witness.x, x)
    assert (read[:3], read.witness[1:]) == (row[:3], row.witness[1:])


CHILD = """
import sys
sys.path[:0] = sys.argv[2:]
from attack_oracle import load
from test_ledger import *
net, x, y = load()
data = Resident((x * 255).round().to(torch.uint8)[:48], y[:48])
ledger_of(Target.of(net, net, (net,)), data, LINF, Ledger.open(Path(sys.argv[1]), KEY), batch_size=10)
"""


@pytest.mark.slow
def test_kill_and_resume_end_in_the_same_ledger(target, data, tmp_path):
    path = tmp_path / "ledger.jsonl"
    here = Path(__file__).parent
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), str(here), str(here.parent / "oracles")])
        before = path.stat().st_size if path.exists() else 0
        while child.poll() is None and (not path.exists() or path.stat().st_size < before + 4000):
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert len(path.read_text().splitlines()) > 3
    ledger_of(target, data, LINF, Ledger.open(path, KEY))
    assert Ledger.open(path, KEY).canonical() == ledger_of(target, data, LINF).canonical()


# -- the artifact's verdict and 8-bit points -----------------------------------------------------------------------


def test_rows_are_independent_of_their_batch(oracle_net):
    net, x, _ = oracle_net
    rows = Rows(net, 32)
    with torch.no_grad():
        wanted = rows(x)
        order = torch.randperm(len(x))
        assert torch.equal(rows(x[order]), wanted[order])
        assert torch.equal(rows(x[5:6]), wanted[5:6])
        assert torch.equal(rows(x[:0]), wanted[:0])


def test_points_on_the_grid_stay_in_the_ball():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (50, 1, 6, 6), generator=generator).float() / 255
    for text in ("8/255", "0.1", "0.002"):
        threat = ThreatModel.of("linf", text)
        points = (x + threat.eps * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)
        found = on_grid(points, x, threat)
        assert torch.equal((found * 255).round() / 255, found)
        assert float((found - x).abs().max()) <= math.floor(threat.eps * 255 + 1e-9) / 255 + 1e-7
        assert float((found - points).abs().max()) <= 1 / 255 + 1e-6


def test_witnesses_are_of_8_bit_pixels_where_such_points_break(oracle_net, data):
    net, _, _ = oracle_net
    target = Target.of(net, net)
    for threat in (ThreatModel.of("linf", "20/255"), LINF, L2):
        found = robustness(target, data, threat, (APGD(steps=10),))
        assert found.exact.float().mean() > 0.9
        exact = found.points[found.exact]
        assert torch.equal((exact * 255).round() / 255, exact)
        assert torch.equal(target.verdict(found.points), found.adversarial)
        clean = data.take(found.broken_ids).x
        delta = (found.points - clean).flatten(1)
        reach = delta.abs().amax(1) if threat.norm == "linf" else delta.norm(dim=1)
        assert bool((reach <= threat.eps + 1e-6).all())
        torch.testing.assert_close(reach, found.size)
    below_the_grid = robustness(target, data, ThreatModel.of("linf", "0.003"), (APGD(steps=10),))
    assert not below_the_grid.exact.any()


def test_certified_samples_are_skipped_and_cross_checked(oracle_net, data):
    net, _, _ = oracle_net
    target = Target.of(net, net)
    plain = robustness(target, data, LINF, (FGSM(),))
    safe = torch.zeros(48, dtype=torch.bool)
    strong = robustness(target, data, LINF, (APGD(steps=20, restarts=2),)).robust
    safe[torch.nonzero(strong).flatten()[:5]] = True
    found = robustness(target, data, LINF, (FGSM(),), certified=safe)
    assert found.tallies[0].tried == plain.tallies[0].tried - 5
    assert torch.equal(found.certified, safe)
    assert found.robust[safe].all()
    safe[plain.broken_ids[0]] = True
    with pytest.raises(WorkError, match="certified and broken"):
        robustness(target, data, LINF, (FGSM(),), certified=safe)


class Breaking(nn.Module):
    """Logits that are no numbers wherever a pixel is not one of 8 bits."""

    def __init__(self, net, value):
        super().__init__()
        self.net, self.value = net, value

    def forward(self, x):
        off = ((x * 255).round() / 255 != x).flatten(1).any(1)
        return torch.where(off[:, None], torch.full_like(self.net(x), self.value), self.net(x))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_no_success(oracle_net, data, value):
    net, _, _ = oracle_net
    target = Target.of(Breaking(net, value), net)
    found = robustness(target, data, L2, (PGD(steps=5),), grid=False)
    assert found.tallies[0].invalid > 0
    assert found.tallies[0].broken == 0
    assert found.correct == found.clean.correct
    assert (target.verdict(data.take(torch.arange(3)).x + 1e-3) == INVALID).all()


def test_eps_zero_is_the_clean_accuracy_and_more_eps_never_helps(oracle_net, data):
    net, _, _ = oracle_net
    target, suite = Target.of(net, net), (APGD(steps=8), FAB(steps=5, targets=2), Square(budget=25))
    for norm, radii in (("linf", ("0", "0.03", "0.1", "0.2")), ("l2", ("0", "0.3", "1", "2"))):
        found = [robustness(target, data, ThreatModel.of(norm, eps), suite, grid=False).correct for eps in radii]
        assert found[0] == robustness(target, data, LINF, ()).clean.correct
        assert found == sorted(found, reverse=True)
        assert found[-1] < found[0]


def test_the_file_is_lines_of_json(target, data, tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger_of(target, data, LINF, Ledger.open(path, KEY))
    head, *lines = map(json.loads, path.read_text().splitlines())
    assert head == {"format": "rprune.ledger/1", "key": KEY}
    assert [line.get("attack") for line in lines][:2] == [None, "fgsm"]
