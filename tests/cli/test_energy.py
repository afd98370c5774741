"""What commands say of energy: a figure where the machine tells it, nothing where it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rprune.pipeline import energy

RECIPE = """
rprune = 1
name = "drawn"
[data]
source = "digits"
[[stage]]
kind = "train"
objective = "benign"
epochs = 1
[[stage]]
kind = "prune"
method = "lwm"
sparsity = 0.5
[[stage]]
kind = "export"
suite = "fgsm"
limit = 8
health = false
"""


@pytest.fixture
def rapl(tmp_path: Path, monkeypatch) -> None:
    """A package that draws 36 J between the readings of a stage."""
    zone = tmp_path / "rapl" / "intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0")
    (zone / "energy_uj").write_text("0")
    (zone / "max_energy_range_uj").write_text("65532610987")
    read = energy.Package.read

    def drawing(package: energy.Package) -> None:
        counter = zone / "energy_uj"
        counter.write_text(str(int(counter.read_text()) + 36_000_000))
        read(package)

    monkeypatch.setattr(energy.Package, "read", drawing)
    monkeypatch.setattr(energy, "EVERY", 1000.0)
    monkeypatch.setattr(energy, "RAPL", zone.parent)


@pytest.mark.usefixtures("rapl")
def test_a_recipe_shows_what_its_stages_drew(call, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("RPRUNE_CO2", raising=False)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    run = ("run", "recipe.toml", "-o", "out", "--device", "cpu")
    said = call(*run, cwd=tmp_path)
    assert said.code == 0, said.err
    assert said.out.count("0.01\u00a0Wh (1 CPU package)") == 2
    assert "CO2" not in said.out
    report = json.loads((tmp_path / "out" / "export" / "report.json").read_text())
    assert [entry["energy"]["cpu_joules"] for entry in report["lineage"]] == [36, 36, 36]
    page = tmp_path / "out" / "export" / "report.html"
    assert "Energy: 0.03\u00a0Wh in the 3 stages" in page.read_text()
    monkeypatch.setenv("RPRUNE_CO2", "400")
    again = call(*run, cwd=tmp_path)
    assert again.err.count("reused") == 3  # neither figures nor the variable are part of a key
    assert again.out.count("0.01\u00a0Wh, 0.004\u00a0g CO2e (1 CPU package)") == 2
    assert call("report", "out/export", "-o", "page.html", cwd=tmp_path).code == 0
    assert "0.03\u00a0Wh, 0.012\u00a0g CO2e in the 3 stages" in (tmp_path / "page.html").read_text()
    assert call("verify", "out/export", cwd=tmp_path).code == 0


@pytest.mark.usefixtures("rapl")
def test_a_command_shows_what_its_stage_drew(call, chain, tmp_path: Path) -> None:
    said = call("prune", chain / "model.pt", "-s", 0.7, "-m", "lwm", "-o", "p.pt", "--device", "cpu", cwd=tmp_path)
    assert said.code == 0, said.err
    (line,) = [line for line in said.out.splitlines() if line.startswith("energy")]
    assert line.split() == ["energy", "0.01", "Wh", "(1", "CPU", "package)"]


def test_without_counters_nothing_is_said(call, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(energy, "RAPL", tmp_path / "nothing")
    monkeypatch.setenv("RPRUNE_CO2", "400")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    said = call("run", "recipe.toml", "-o", "out", "--device", "cpu", cwd=tmp_path)
    assert said.code == 0, said.err
    assert "energy" not in said.out
    for name in ("01-train/stage.json", "02-prune/stage.json", "export/report.json", "export/report.html"):
        text = (tmp_path / "out" / name).read_text().lower()
        assert '"energy"' not in text
        assert "co2" not in text
        assert "kwh" not in text


def test_a_misspelt_intensity_is_found_before_any_work(call, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RPRUNE_CO2", "400g")
    said = call("run", "digits", "-o", "out", cwd=tmp_path)
    assert "RPRUNE_CO2=400g" in said.refused(2)
    assert not (tmp_path / "out").exists()
