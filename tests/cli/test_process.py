"""Fresh interpreters: what is imported, colours, and help."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from rprune import __version__
from rprune.errors import EXIT_CODES

WITHOUT_TORCH = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision"):
            raise RuntimeError(f"{name} was imported")

sys.meta_path.insert(0, Blocker())
from rprune.cli.app import main
main(sys.argv[1:])
"""
ESCAPE = "\x1b["


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--help",), "Exit codes"),
        (("prune", "--help"), "--sparsity"),
        (("gate", "out", "--min", "sparsity=0.5"), "GATE PASSED"),
        (
            ("gate", "out", "--max-drop", "clean_accuracy=0.1", "--baseline", "out", "--junit", "j.xml", "--force"),
            "PASSED",
        ),
        (("compare", "out", "out", "--format", "markdown"), "McNemar"),
        (("report", "out"), "clean accuracy"),
        (("report", "out", "--markdown", "doc/r.md", "--card", "doc/README.md", "--bom", "doc/bom.cdx.json",
          "--intoto", "doc/model.intoto.jsonl", "--robustbench", "doc/rb.json", "--force"), "doc/bom.cdx.json"),
        (("inspect", "model.pt"), "cnn-small"),
        (("inspect", "out/model.int8.onnx"), "opset"),
        (("verify", "out"), "VERIFIED level=replay"),
        (("list", "data"), "digits"),
        (("list", "architectures"), "cnn-small"),
    ],
)  # fmt: skip
def test_torch_is_not_imported(python, chain, arguments, wanted):
    said = python("-c", WITHOUT_TORCH, *arguments, cwd=chain.folder)
    assert said.code == 0, said.err
    assert wanted in said.out
    assert ESCAPE not in said.out + said.err


def test_version_and_help(python, tmp_path):
    said = python("-m", "rprune", "--version", cwd=tmp_path)
    assert (said.code, said.out) == (0, f"rprune {__version__}\n")
    said = python("-m", "rprune", "--help", cwd=tmp_path)
    text = " ".join(said.out.split())
    for code in EXIT_CODES:
        assert f"{code} " in text.partition("Exit codes")[2]


def test_colours(python, chain):
    command = ("-m", "rprune", "gate", "out", "--min", "sparsity=0.5")
    assert ESCAPE not in python(*command, cwd=chain.folder).out
    forced = python(*command, cwd=chain.folder, FORCE_COLOR="1", TERM="xterm-256color").out
    assert ESCAPE + "32m" in forced
    plain = python(*command, cwd=chain.folder, FORCE_COLOR="1", NO_COLOR="1", TERM="xterm-256color").out
    assert "32m" not in plain


def test_usage_errors_of_the_parser(python, tmp_path):
    for arguments in (("prun",), ("train", "--sparsty", "1"), ("prune", "x.pt"), ("gate", "x", "--min")):
        said = python("-m", "rprune", *arguments, cwd=tmp_path)
        assert said.code == 2
        assert said.out == ""
        assert "error" in said.err.lower()
    assert "prune" in python("-m", "rprune", "prun", cwd=tmp_path).err


def test_closed_pipe_is_not_a_failed_gate(chain):
    """``rprune report out --json | head -0``: the reader is gone before anything is written."""
    with subprocess.Popen(
        [sys.executable, "-m", "rprune", "report", str(chain / "out"), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        process.stdout.close()
        error = process.stderr.read()
        code = process.wait(60)
    assert code == 141
    assert error == ""


def test_failed_gate_in_a_process(python, chain, tmp_path):
    command = ("-m", "rprune", "gate", chain / "out", "--min", "clean_accuracy=1")
    assert python(*command, cwd=tmp_path).code == 1
    shutil.copytree(chain / "out", tmp_path / "out")
    (tmp_path / "out" / "model.onnx").write_bytes(b"")
    assert python("-m", "rprune", "verify", "out", cwd=tmp_path).code == 5


@pytest.mark.parametrize("command", [["evaluate", "model.pt"], ["unpack", "model.packed.safetensors", "-o", "out"]])
def test_command_that_needs_torch_says_so_where_there_is_none(tmp_path, command):
    code = f"import sys; sys.modules['torch'] = None; from rprune.cli.app import main; main({command})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 3
    assert "this command needs torch" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_package_is_no_false_claim(call, chain, monkeypatch):
    """Inside a check, too, where whatever a stranger's file causes counts against the file."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    error = call("verify", "out", cwd=chain.folder).refused(3)
    assert "this command needs onnxruntime" in error
