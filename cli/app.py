"""The command line. Every command is one file; torch is imported inside commands that need it."""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from rprune import __version__
from rprune.cli.attack import attack
from rprune.cli.bench import bench
from rprune.cli.certify import certify
from rprune.cli.compare import compare
from rprune.cli.console import print_error, stdout
from rprune.cli.doctor import doctor
from rprune.cli.evaluate import evaluate
from rprune.cli.export import export
from rprune.cli.finetune import finetune
from rprune.cli.gate import gate
from rprune.cli.init import init
from rprune.cli.inspect import inspect
from rprune.cli.launch import joined
from rprune.cli.listing import list_
from rprune.cli.prune import prune
from rprune.cli.quantize import quantize
from rprune.cli.report import report
from rprune.cli.run import run
from rprune.cli.schema import schema
from rprune.cli.shrink import shrink
from rprune.cli.sign import sign
from rprune.cli.signals import ended_gently
from rprune.cli.train import train
from rprune.cli.unpack import unpack
from rprune.cli.verify import verify
from rprune.errors import EXIT_CODES, InputError, Interrupted, RpruneError, WorkError
from rprune.files import unwritable
from rprune.reports.energy import intensity

NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "not enough memory: you tried to allocate", "bad_alloc")
MEMORY_HINT = "use a smaller --batch-size, or --set accumulate=4 for batches in four parts; what is finished is kept"

app = typer.Typer(
    name="rprune",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compress image classifiers without losing robustness, and prove it.",
    epilog=f"Exit codes: {'; '.join(f'{code} {text}' for code, text in EXIT_CODES.items())}.",
)


def _version(wanted: bool) -> None:
    if wanted:
        stdout.print(f"rprune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """Ctrl-C ends with exit code 130 and says that nothing is lost."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            raise Interrupted("interrupted", "what is finished is kept; the same command continues") from None
        except BrokenPipeError:
            # the reader of stdout is gone (a pager, head); Typer would exit 1, which means "gate failed" here
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None

    return wrapper


PANELS: dict[str, dict[str, Callable[..., None]]] = {
    "Pipeline": {
        "run": run, "train": train, "prune": prune, "finetune": finetune, "shrink": shrink, "quantize": quantize,
        "certify": certify, "export": export, "unpack": unpack,
    },
    "Measure": {"evaluate": evaluate, "attack": attack, "bench": bench},
    "Trust": {"verify": verify, "gate": gate, "compare": compare, "report": report, "sign": sign},
    "Help": {"init": init, "inspect": inspect, "list": list_, "doctor": doctor, "schema": schema},
}  # fmt: skip
for _panel, _commands in PANELS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_panel)(_interruptible(_command))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: runs a command and exits with a documented code."""
    try:
        intensity()  # a misspelt one is found before hours are spent
        with ended_gently(), joined():
            app(None if arguments is None else list(arguments))
    except RpruneError as error:
        print_error(error)
        if os.environ.get("RPRUNE_DEBUG"):
            traceback.print_exc()
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "rprune").partition(".")[0]
        if package == "rprune":
            _internal(error)
        print_error(InputError(f"this command needs {package}", "pip install rprune brings it"))
        sys.exit(InputError.exit_code)
    except Exception as error:
        if _out_of_memory(error):
            print_error(WorkError("out of memory", MEMORY_HINT))
            sys.exit(WorkError.exit_code)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            told = unwritable(Path(error.filename or "a file"), error)
            print_error(told)
            sys.exit(told.exit_code)
        _internal(error)


def _internal(error: Exception) -> NoReturn:
    hint = "RPRUNE_DEBUG=1 shows where; please report it"
    print_error(RpruneError(f"internal error: {type(error).__name__}: {error}", hint))
    if os.environ.get("RPRUNE_DEBUG"):
        traceback.print_exc()
    sys.exit(RpruneError.exit_code)


def _out_of_memory(error: Exception) -> bool:
    """Of Python, NumPy, torch on a GPU; torch on a CPU and ONNX Runtime have no class of their own for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
