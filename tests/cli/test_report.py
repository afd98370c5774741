"""``rprune report``: which documents are written, and when none is."""

from __future__ import annotations

import json
import shutil

import pytest

DOCUMENTS = {
    "--markdown": "report.md", "--card": "README.md", "--bom": "bom.cdx.json", "--intoto": "model.intoto.jsonl",
    "--robustbench": "robustbench.json",
}  # fmt: skip


@pytest.fixture
def every(tmp_path):
    return [part for option, name in DOCUMENTS.items() for part in (option, tmp_path / "new" / name)]


def test_several_documents_in_one_command(call, chain, every, tmp_path):
    said = call("report", chain / "out", *every, cwd=tmp_path)
    assert said.code == 0, said.err
    assert [line.rpartition("/")[2] for line in said.out.split()] == list(DOCUMENTS.values())
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(DOCUMENTS.values())
    report = json.loads((chain / "out" / "report.json").read_text())
    assert report["id"] in (tmp_path / "new" / "report.md").read_text()
    bom = json.loads((tmp_path / "new" / "bom.cdx.json").read_text())
    assert len(bom["components"]) == len(report["subjects"]) + 4
    lines = (tmp_path / "new" / "model.intoto.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["predicate"] == report


def test_second_run_writes_the_same_bytes(call, chain, contents, every, tmp_path):
    assert call("report", chain / "out", *every, cwd=tmp_path).code == 0
    before = contents(tmp_path / "new")
    assert call("report", chain / "out" / "report.json", *every, "--force", cwd=tmp_path).code == 0
    assert contents(tmp_path / "new") == before


@pytest.mark.parametrize("option", [*DOCUMENTS, "--html"])
def test_nothing_is_overwritten_and_nothing_half_written(call, chain, every, tmp_path, option):
    (tmp_path / "there").write_text("mine")
    others = [part for part in every if part != option]
    arguments = [option, "there", *(others[2:] if option == "--html" else [])]
    assert "there exists" in call("report", chain / "out", *arguments, cwd=tmp_path).refused(2)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "mine"
    assert call("report", chain / "out", option, "there", "--force", cwd=tmp_path).code == 0
    assert (tmp_path / "there").read_text() != "mine"


def test_folder_is_no_document(call, chain, tmp_path):
    (tmp_path / "folder").mkdir()
    said = call("report", chain / "out", "--card", "folder", "--force", cwd=tmp_path)
    assert "folder is a folder" in said.refused(2)


def test_one_file_for_two_documents_is_refused(call, chain, tmp_path):
    said = call("report", chain / "out", "--card", "a.md", "--markdown", "./a.md", cwd=tmp_path)
    assert "one file" in said.refused(2)
    assert not (tmp_path / "a.md").exists()


def test_report_that_was_changed_becomes_no_document(call, chain, tmp_path):
    shutil.copy(chain / "out" / "report.json", tmp_path)
    table = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps(table | {"name": "better"}))
    said = call("report", "report.json", "--bom", "bom.json", cwd=tmp_path)
    assert "its id names" in said.refused(5)
    assert not (tmp_path / "bom.json").exists()


def test_json_names_the_files(call, chain, tmp_path):
    said = call("report", chain / "out", "--card", "README.md", "--json", cwd=tmp_path)
    assert said.json == {"files": ["README.md"]}
