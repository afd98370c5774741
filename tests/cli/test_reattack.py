"""verify --level reattack, and signatures: what a stranger finds out who trusts nobody."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from rprune.evaluation.statistics import clopper_pearson
from rprune.pipeline.reattack import INSTEAD, Reattack

ROBUST = "robust_accuracy@onnx-int8"


@pytest.fixture
def out(chain, tmp_path: Path) -> Path:
    shutil.copytree(chain / "out", tmp_path / "out")
    return tmp_path / "out"


def edited(folder: Path, claim: str, **changes: object) -> dict:
    """The report with a claim changed; its id is not looked at here."""
    path = folder / "report.json"
    report = json.loads(path.read_text())
    found = next(entry for entry in report["claims"] if entry["id"] == claim)
    found.update(changes)
    path.write_text(json.dumps(report))
    return found


def rows(folder: Path, change=lambda row: None) -> list[dict[str, str]]:
    path = folder / "evidence" / "samples.csv"
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    for row in table:
        change(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    return table


def test_an_honest_bundle_passes(call, out: Path) -> None:
    said = call("verify", "out", "--level", "reattack", "-n", 20, "--seed", 3, cwd=out.parent)
    assert said.code == 0, said.out
    assert "VERIFIED level=reattack" in said.out
    for name in ("attacked anew", "certified anew", "noise anew", "replay"):
        assert f"✓ {name}" in said.out
    found = call("verify", "out", "--level", "reattack", "-n", 5, "--json", cwd=out.parent).json
    assert (found["passed"], found["level"]) == (True, "reattack")
    assert "of 5 robust samples broken by pgd10, seed" in found["checks"][-3]["detail"]


def test_an_attack_that_was_not_run_is_found_out(out: Path) -> None:
    """Replay cannot tell: without witnesses every right sample counts as robust, here in a large ball."""
    table = rows(out, lambda row: row.update(attack="", adversarial_prediction=""))
    right, n = sum(row["label"] == row["clean_prediction"] for row in table), len(table)
    lower, upper = clopper_pearson(right, n)
    edited(out, ROBUST, correct=right, value=right / n, interval={"level": 0.95, "lower": lower, "upper": upper})
    path = out / "report.json"
    report = json.loads(path.read_text())
    report["threat"] |= {"eps": "0.3", "eps_float": 0.3}
    path.write_text(json.dumps(report))
    passed, detail = Reattack(out, limit=30, seed=0).attacked()
    assert not passed
    assert "of 30 robust samples broken by pgd10, seed 0" in detail


def test_a_part_of_the_samples_says_what_it_can(out: Path) -> None:
    table = rows(out)
    robust = sum(row["label"] == row["clean_prediction"] and not row["attack"] for row in table)
    passed, detail = Reattack(out, limit=7, seed=1).attacked()
    assert passed
    assert f"of {min(7, robust)} robust samples" in detail
    assert Reattack(out, limit=7, seed=1).attacked() == (passed, detail)
    assert Reattack(out).seed != Reattack(out).seed


def test_certificates_that_do_not_hold_are_found_out(out: Path) -> None:
    assert Reattack(out, seed=0).certified()[0]
    rows(out, lambda row: row.update(certified="1"))
    passed, detail = Reattack(out, seed=0).certified()
    assert not passed
    assert "proved by ibp" in detail
    rows(out, lambda row: row.update(certified="0"))
    assert Reattack(out, seed=0).certified() == (True, "nothing is certified")


def test_radii_that_draws_do_not_support_are_found_out(out: Path) -> None:
    assert Reattack(out, seed=0).noise()[0]
    claim = edited(out, "smoothed_certified_accuracy@onnx-int8")
    sigma, samples = claim["settings"]["sigma"], claim["settings"]["samples"]
    far = [row | {"prediction": (row["prediction"] + 1) % 10, "radius": sigma} for row in samples]
    edited(out, claim["id"], settings=claim["settings"] | {"samples": far})
    passed, detail = Reattack(out, seed=0).noise()
    assert not passed
    assert "not as their radii say" in detail
    edited(out, claim["id"], settings=claim["settings"] | {"samples": [row | {"prediction": -1} for row in samples]})
    assert Reattack(out, seed=0).noise() == (True, "no sample has a radius")


def test_a_strangers_own_suite_is_not_run(out: Path) -> None:
    (out.parent / "own.py").write_text("raise SystemExit('it was run')")
    edited(out, ROBUST, method="own.py:attack")
    passed, detail = Reattack(out, limit=3, seed=0).attacked()
    assert passed
    assert f"{INSTEAD} (in place of own.py:attack)" in detail


def test_signatures_of_a_bundle(call, load_helper, out: Path) -> None:
    pytest.importorskip("model_signing.signing")
    folder = out.parent
    load_helper("reports/keys.py").pair(folder, "mine")
    check = ("verify", "out", "--level", "hash", "--key", "mine.pub.pem")
    assert "there is no model.sig" in call(*check, cwd=folder).out
    assert call(*check, cwd=folder).code == 5
    said = call("sign", "out", "--key", "mine.pem", cwd=folder)
    assert said.code == 0, said.err
    assert "✓ signature" in call(*check, cwd=folder).out
    assert call(*check, cwd=folder).code == 0
    assert "signed already" in call("sign", "out", "--key", "mine.pem", cwd=folder).refused(2)
    (out / "report.html").write_text("no subject of the report, but signed")
    assert call("verify", "out", "--level", "hash", cwd=folder).code == 0
    assert call(*check, cwd=folder).code == 5
    assert call("sign", "out", "--key", "mine.pem", "--force", cwd=folder).code == 0
    assert call(*check, cwd=folder).code == 0
