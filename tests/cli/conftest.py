"""Commands run in this process, and one small chain of files that all tests read."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def refused(self, code: int) -> str:
        """One line of error and one of hint, nothing else; returns the former."""
        assert self.code == code, self.err
        assert self.out == ""
        error, hint = self.err.splitlines()
        assert error.startswith("error: ")
        assert hint.startswith("hint: ")
        assert self.err.replace("\n", "").isprintable()
        return error


@dataclass(frozen=True)
class Chain:
    """Where the chain lies, and what every command of it said."""

    folder: Path
    said: dict[str, Result] = field(default_factory=dict)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


def _call(*arguments: object, cwd: Path) -> Result:
    from rprune.cli.app import main

    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main([str(argument) for argument in arguments])
    return Result(end.value.code or 0, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def call():
    """``call(*arguments, cwd=folder)``: main() with these arguments, in this process."""
    return _call


@pytest.fixture(scope="session")
def python():
    """``python(*arguments, cwd=folder, **environment)``: a fresh interpreter, with no terminal."""

    def run(*arguments: object, cwd: Path, **environment: str) -> Result:
        kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "RPRUNE_DEBUG")}
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)

    return run


TRAIN = ("--data", "digits", "--objective", "benign", "--epochs", 2, "--batch-size", 16, "--lr", 0.05, "--eps", "0.03")
CERTIFY = ("--n", 100, "--limit", 10)


@contextlib.contextmanager
def _offline() -> Iterator[list[str]]:
    """Whatever asks for a socket or an address fails, and is in the list."""
    asked: list[str] = []

    def refuse(*given: object, **named: object) -> None:
        asked.append(f"{given} {named}")
        raise OSError("no network here")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("socket", "create_connection", "getaddrinfo"):
            patch.setattr(socket, name, refuse)
        yield asked


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """train -> prune -> finetune -> quantize -> certify -> export -> verify -> gate, with default names, offline."""
    made = Chain(tmp_path_factory.mktemp("chain"))

    def step(name: str, *arguments: object) -> None:
        with _offline() as asked:
            made.said[name] = _call(name, *arguments, cwd=made.folder)
        assert made.said[name].code == 0, made.said[name].err
        assert asked == [], f"{name} used the network"

    step("train", *TRAIN)
    step("prune", "model.pt", "-s", 0.5, "-m", "lwm")
    step("finetune", "model-lwm-0.5.pt", "--epochs", 2, "--batch-size", 32)
    step("quantize", "model-lwm-0.5-finetuned.pt")
    step("certify", "model-lwm-0.5-finetuned-int8.pt", *CERTIFY)
    step("export", "model-lwm-0.5-finetuned-int8.pt", "-o", "out", "--suite", "pgd10", "--limit", 60)
    step("verify", "out")
    step("gate", "out", "--min", "sparsity=0.5", "--min", "clean_accuracy=0.5")
    return made


@pytest.fixture(scope="session")
def contents():
    """Every file below a folder with its bytes."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    return read


@pytest.fixture(scope="session")
def bundle(chain, tmp_path_factory):
    """The chain's model in every form, as exported; nothing may be written into it."""
    folder = tmp_path_factory.mktemp("bundle")
    forms = "safetensors,onnx,onnx-int8,onnx-compact,packed,c"
    with pytest.MonkeyPatch.context() as patch, _offline() as asked:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "c-cache"))
        said = _call(
            "export", chain / "model-lwm-0.5-finetuned-int8.pt", "-o", "out", "--format", forms, "--suite", "fgsm",
            "--limit", 40, "--no-health", "-q", cwd=folder,
        )  # fmt: skip
    assert said.code == 0, said.err
    assert asked == []
    return folder / "out"
