"""The nets of model_zoo.toml: each bundle is the one that the table names, and says what the table says."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from rprune.cli.listing import zoo
from rprune.pipeline.unpacking import whole_bundle
from rprune.reports.schema import read_report
from rprune.reports.verify import verify

ROOT = Path(__file__).resolve().parent.parent
ZOO: dict[str, Any] = tomllib.loads((ROOT / "model_zoo.toml").read_text(encoding="utf-8"))
MOST = 300_000  # bytes of a folder


@pytest.mark.parametrize("name", ZOO)
def test_a_net_of_the_zoo_claims_what_the_table_says(name: str):
    entry = ZOO[name]
    folder = ROOT / entry["folder"]
    report = read_report(folder)
    assert report.id == entry["report"]
    assert (report.data.source, f"{report.threat.norm} {report.threat.eps}") == (entry["data"], entry["threat"])
    assert round(report.sparsity.overall, 4) == entry["sparsity"]
    assert (folder / "model.packed.safetensors").stat().st_size == entry["bytes"]
    claims = {claim.metric: [claim.correct, claim.n] for claim in report.claims if claim.artifact == "onnx-int8"}
    assert entry["claims"].items() <= claims.items()
    assert all(claim.reliable for claim in report.claims if claim.metric == "robust_accuracy")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < MOST


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry["data"] == "digits"])
def test_a_net_on_built_in_data_is_verified(name: str):
    found = verify(ROOT / ZOO[name]["folder"])
    assert found.passed, [check for check in found.checks if not check.passed]


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry["data"] != "digits"])
def test_a_net_on_other_data_is_whole_but_for_what_no_packed_file_holds(name: str, tmp_path: Path):
    """The int8 file comes back to the byte, and static checks hold; the data is not in the repository."""
    folder = ROOT / ZOO[name]["folder"]
    assert verify(folder, "hash", partial=True).passed
    _, absent = whole_bundle(folder, tmp_path / "whole")
    found = verify(tmp_path / "whole", "static", partial=True)
    assert found.passed, [check for check in found.checks if not check.passed]
    assert found.absent == absent == ["model.safetensors", "masks.safetensors", "model.onnx"]


def test_every_artifact_is_in_the_zoo():
    folders = {str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks/reproduce/artifacts").iterdir()}
    assert folders == {entry["folder"] for entry in ZOO.values()}


def test_the_list_has_the_shares():
    row = next(row for row in zoo() if row["name"] == "digits-cnn-harp-0.9-int8")
    assert (row["clean"], row["robust"]) == ("98.3 %", "83.3 %")
