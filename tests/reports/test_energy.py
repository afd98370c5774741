"""Energy and CO2 in words, on the page and in the id of a report."""

from __future__ import annotations

import pytest

from rprune.errors import UsageError
from rprune.reports.energy import carbon, counted, energy, intensity, spent, total
from rprune.reports.html import render_html
from rprune.reports.schema import Energy, Report

NIGHT = Energy(seconds=10_423.2, gpus=1, gpu_joules=7_200_000, cpus=2, cpu_joules=720_000)
SHORT = Energy(seconds=41.2, cpus=2, cpu_joules=3_600, resumed=True)


@pytest.fixture(scope="module")
def report(load_helper) -> Report:
    return load_helper("reports/sample_report.py").sample_report(curves=False, history=False, profile=False)


@pytest.fixture(scope="module")
def measured(report: Report) -> Report:
    train, prune, *rest = report.lineage
    lineage = [train.model_copy(update={"energy": NIGHT}), prune.model_copy(update={"energy": SHORT}), *rest]
    return report.model_copy(update={"lineage": lineage}).sealed()


def plain(text: str) -> str:
    return text.replace("\u00a0", " ")


def test_units() -> None:
    assert [plain(energy(joules)) for joules in (50, 3_600, 3_598_000, 3_600_000, 9e9)] == [
        "0.0139 Wh", "1 Wh", "999 Wh", "1 kWh", "2,500 kWh",
    ]  # fmt: skip
    assert plain(carbon(3.6e6, 400)) == "400 g CO2e"
    assert plain(carbon(2.5 * 3.6e6, 400)) == "1 kg CO2e"
    assert plain(spent(NIGHT, None)) == "2.2 kWh"
    assert plain(spent(NIGHT, 0)) == "2.2 kWh, 0 g CO2e"
    assert plain(total([NIGHT, SHORT], 400)) == "at least 2.2 kWh, 880 g CO2e"
    assert counted(NIGHT) == "1 GPU, 2 CPU packages"
    assert counted(SHORT) == "2 CPU packages"


@pytest.mark.parametrize(("text", "value"), [(None, None), ("", None), ("0", 0), ("412.5", 412.5)])
def test_the_intensity_is_the_users(monkeypatch, text: str | None, value: float | None) -> None:
    monkeypatch.delenv("RPRUNE_CO2", raising=False)
    if text is not None:
        monkeypatch.setenv("RPRUNE_CO2", text)
    assert intensity() == value


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf", "400 g"])
def test_an_intensity_that_is_none(monkeypatch, text: str) -> None:
    monkeypatch.setenv("RPRUNE_CO2", text)
    with pytest.raises(UsageError, match="RPRUNE_CO2"):
        intensity()


def test_the_page_says_it_where_it_is_known(report: Report, measured: Report) -> None:
    assert "Energy" not in render_html(report)
    page = plain(render_html(measured))
    assert '2.2 kWh<br><span class="note">1 GPU, 2 CPU packages</span>' in page
    assert "Energy: at least 2.2 kWh in the 2 stages" in page
    assert "CO2e" not in page
    page = plain(render_html(measured, grams=400))
    assert "2.2 kWh, 880 g CO2e<br>" in page
    assert "CO2e: at 400 g a kWh" in page


def test_the_id_covers_it_and_reports_without_it_keep_theirs(report: Report, measured: Report) -> None:
    assert all("energy" not in entry for entry in report.to_json()["lineage"])
    assert measured.id != report.id
    again = Report.model_validate(measured.to_json())
    assert again.computed_id() == measured.id
    assert again.lineage[0].energy == NIGHT
