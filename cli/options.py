"""Options that commands share: one spelling for one thing everywhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rprune.cli import completion
from rprune.errors import UsageError

if TYPE_CHECKING:
    from rprune.pipeline.single import Request

UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}

Model = Annotated[
    Path,
    typer.Argument(help="A file or stage folder that rprune wrote, or anybody's weights (then with --data)."),
]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Where to write.")]
Data = Annotated[
    str | None,
    typer.Option(
        "-d",
        "--data",
        help="digits, npz:FILE, imagefolder:DIR, webdataset:DIR, cifar10, ...; "
        "default: the data the model was made with.",
        autocompletion=completion.data,
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        "--arch",
        "--model",
        help="Architecture: built in, torchvision:NAME, pkg.module:factory or file.py:factory; "
        "default: as the file says, or as its weights tell.",
        autocompletion=completion.architectures,
    ),
]
Eps = Annotated[str | None, typer.Option("--eps", help="Radius of the threat in [0,1] pixel units, e.g. 8/255.")]
Norm = Annotated[str | None, typer.Option("--norm", help="linf or l2.", autocompletion=completion.of("linf", "l2"))]
Objective = Annotated[
    str | None,
    typer.Option(
        "--objective",
        help="A name of 'rprune list objectives', or file.py:Class.",
        autocompletion=completion.objectives,
    ),
]
Preset = Annotated[
    str | None, typer.Option("--preset", help="paper or rprune: settings that the options do not say; METHOD:paper.")
]
InitialScores = Annotated[
    str | None, typer.Option("--initial-scores", help="scaled, xavier-normal, kaiming-uniform, orthogonal, dirac, ...")
]
Include = Annotated[
    list[str] | None, typer.Option("--include", help="Prune only layers whose name fits this glob; repeatable.")
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", help="Keep layers dense whose name fits this glob; repeatable.")
]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the training data.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Learning rate at the start.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Images a step.")]
Seed = Annotated[int, typer.Option("--seed", help="Everything random follows from it.", envvar="RPRUNE_SEED")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", envvar="RPRUNE_DEVICE")]
Gpus = Annotated[
    int | None,
    typer.Option("--gpus", help="Work in so many processes, on a GPU each (on the CPU with --device cpu).", min=1),
]
Mean = Annotated[
    str | None, typer.Option("--mean", help="Channel means that the model subtracts, with commas, in [0,1] units.")
]
Std = Annotated[str | None, typer.Option("--std", help="Channel deviations that the model divides by.")]
ArchArg = Annotated[
    list[str] | None, typer.Option("--arch-arg", help="Argument of the architecture, as KEY=VALUE; repeatable.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Any other option of the stage, as KEY=VALUE; repeatable.")
]
TensorBoard = Annotated[
    Path | None, typer.Option("--tensorboard", help="Folder for the figures of every epoch, for TensorBoard.")
]
Suite = Annotated[
    str | None,
    typer.Option(
        "--suite",
        help="Attacks for robust accuracy: a name of 'rprune list suites', or several with commas.",
        autocompletion=completion.suites,
    ),
]
Formats = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="safetensors, onnx, onnx-int8, onnx-compact, packed, c; several with commas.",
        autocompletion=completion.formats,
    ),
]
Health = Annotated[
    bool, typer.Option("--health/--no-health", help="Check the attack itself, and find the curve over eps.")
]
Limit = Annotated[int | None, typer.Option("-n", "--limit", help="Only the first N test samples.", min=1)]
Baseline = Annotated[
    Path | None,
    typer.Option("--baseline", help="Report of an earlier model on the same test data, with its evidence/."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what exists.")]
Shard = Annotated[str | None, typer.Option("--shard", help="Only part i of n, as i/n; merge the parts later.")]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Continue an interrupted run of the same command.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print plan and cost, and stop.")]
ShowConfig = Annotated[
    bool, typer.Option("--show-config", help="Print every value of the stage, as a recipe has it, and stop.")
]
Profile = Annotated[
    Path | None, typer.Option("--profile", help="Folder for a trace and a table of one step; nothing else is run.")
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the net of the training steps; for GPUs.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no notes.")]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Run the code that the model file names; only for files of your own.")
]
TrustC = Annotated[
    bool, typer.Option("--trust-c", help="Compile and run model.c even where no ONNX file beside it proves its origin.")
]
Download = Annotated[bool, typer.Option("--download", help="Allow the network, to fetch a data set.")]


def shard(text: str | None) -> tuple[int, int]:
    """i/n as (i, n), i from 0. Raises UsageError."""
    if text is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text.replace(" ", ""))
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"cannot read --shard {text}", "write i/n with i from 1 to n, for example 2/8")
    return int(found[1]) - 1, int(found[2])


def seconds(text: str) -> float:
    """90s, 10m or 2h. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if not found:
        raise UsageError(f"cannot read --budget {text}", "write a time with its unit: 90s, 10m or 2h")
    return float(found[1]) * UNITS[found[2]]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def with_settings(table: dict[str, Any], settings: list[str] | None) -> dict[str, Any]:
    """A stage table with ``--set KEY=VALUE`` applied; ``method.gamma_step=0.2`` reaches into a specification."""
    from rprune.pipeline.recipe import override

    for setting in settings or []:
        override(table, setting)
    return table


def with_preset(table: dict[str, Any], kind: str, name: str | None, method: str | None) -> tuple[dict[str, Any], Any]:
    """A stage table over a preset's, and the eps and norm of that preset's threat."""
    from rprune.pipeline.presets import preset, stage_table

    found = {} if name is None else preset(name, method)
    return stage_table(table, found.get(kind, {})), found.get("threat", {})


def with_options(name: str, **options: Any) -> Any:
    """A method by name, as a table where options of it were given."""
    table = given(**options)
    return {"name": name} | table if table else name


def typed(table: dict[str, Any]) -> frozenset[str]:
    """Names of the user's own code among the options."""
    from rprune.pipeline.environment import named_code

    return named_code(table)


def numbers(text: str | None) -> tuple[float, ...]:
    """``0.49,0.48,0.45`` as floats; nothing as an empty tuple."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UsageError(f"cannot read '{text}'", "write numbers with commas: 0.49,0.48,0.45") from None


def arguments(settings: list[str] | None) -> dict[str, Any]:
    """``--arch-arg KEY=VALUE`` as a table."""
    return with_settings({}, settings)


def request(mean: str | None, std: str | None, arch_arg: list[str] | None, **said: Any) -> Request:
    """What the options say about model, data and threat, parsed."""
    from rprune.pipeline.single import Request

    return Request(mean=numbers(mean), std=numbers(std), kwargs=arguments(arch_arg), **said)


def default_output(model: Path, suffix: str) -> Path:
    """A name beside the model: model.pt -> model-suffix.pt; a folder gives folder-suffix.pt."""
    stem = model.stem if model.suffix in (".pt", ".pth", ".safetensors") else model.name
    kind = ".safetensors" if model.suffix == ".safetensors" else ".pt"
    if not stem:
        raise UsageError(f"cannot name the output of {model}", "say where to write: -o FILE")
    return model.with_name(f"{stem}-{suffix}{kind}")
