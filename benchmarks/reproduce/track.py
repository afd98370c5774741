"""A track: which recipes run, along which axes, and what is measured of each; and one row of it."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DENSE = "dense"
FLOAT, CODEBOOK = "float", "codebook"  # forms; "8-bit" are integers


@dataclass(frozen=True)
class Row:
    """One line of the result: a recipe at one place of every axis, from one seed. ``method`` "dense" is its start."""

    method: str
    places: dict[str, str]  # axis -> its value here
    seed: int
    recipe: Path
    settings: tuple[str, ...]  # as --set has them
    data: str

    @property
    def name(self) -> str:
        return "-".join(
            re.sub(r"[^\w.+-]+", "_", part) for part in (self.method, *self.places.values(), str(self.seed))
        )

    @property
    def command(self) -> str:
        """What makes the same net by hand; a subset lies in the work folder."""
        sets = " ".join(f"--set {shlex.quote(text)}" for text in (*self.settings, f"data.source={self.data}"))
        return f"rprune run {os.path.relpath(self.recipe, HERE.parent.parent)} {sets}"


@dataclass(frozen=True)
class Track:
    """A folder of recipes with ``track.toml``, which says what is made of them."""

    folder: Path
    table: dict[str, Any] = field(repr=False)
    share: float = 1.0  # of the recipes' epochs

    @classmethod
    def read(cls, name: str, share: float = 1.0) -> Track:
        """``name``: a folder beside this file, or anywhere. Raises FileNotFoundError where it is no track."""
        folder = HERE / name
        return cls(folder, tomllib.loads((folder / "track.toml").read_text(encoding="utf-8")), share)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def methods(self) -> dict[str, Path]:
        """Recipes by the name of their method."""
        paths = [self.folder / f"{stem}.toml" for stem in self.table["recipes"]]
        return {tomllib.loads(path.read_text(encoding="utf-8"))["name"]: path for path in paths}

    @property
    def axes(self) -> dict[str, dict[str, list[str]]]:
        """Settings by axis and place; on a ``cumulative`` axis a place has those of the places before it, too."""
        axes: dict[str, dict[str, list[str]]] = dict(self.table["axis"])
        for name in self.table.get("cumulative", []):
            changes = itertools.accumulate(axes[name].values())
            axes[name] = dict(zip(axes[name], changes, strict=True))
        return axes

    @property
    def suites(self) -> dict[str, dict[str, int]]:
        """Suites by form, and on how many test images, the first ones, each runs."""
        return self.table["suites"]  # type: ignore[no-any-return]

    def of_start(self, row: Row) -> dict[str, str]:
        """Where a row's dense start stands: on axes that change it."""
        changing = ("model.", "stage.train.", "data.", "threat.")
        settings = {axis: [text for found in values.values() for text in found] for axis, values in self.axes.items()}
        return {
            axis: place for axis, place in row.places.items() if any(s.startswith(changing) for s in settings[axis])
        }

    def rows(self) -> Iterator[Row]:
        data = "npz:subset.npz" if "subset" in self.table else "npz:cifar10.npz"
        for seed in self.table["seeds"]:
            for (method, recipe), *values in itertools.product(
                self.methods.items(), *(axis.items() for axis in self.axes.values())
            ):
                places = {axis: value for axis, (value, _) in zip(self.axes, values, strict=True)}
                settings = [*self.table.get("settings", []), *(setting for _, found in values for setting in found)]
                yield Row(method, places, seed, recipe, (*settings, f"seed={seed}"), data)


def recipe_of(track: Track, row: Row, source: str) -> Any:
    """The whole recipe of a row, on the data ``source``, with the track's share of its epochs."""
    from rprune.pipeline.anytime import shortened
    from rprune.pipeline.recipe import read_recipe
    from rprune.pipeline.stages import epochs_of

    recipe = read_recipe(row.recipe, [*row.settings, f"data.source={source}"])
    if track.share == 1:
        return recipe
    stages = [
        shortened(stage, max(1, round(track.share * epochs_of(stage)))) if epochs_of(stage) else stage
        for stage in recipe.stage
    ]
    return recipe.model_copy(update={"stage": tuple(stages)})


def dense_of(track: Track, row: Row, source: str) -> Any:
    """The dense start of a row, which many rows share, as a recipe that has its train stage alone."""
    recipe = recipe_of(track, row, source)
    return recipe.model_copy(update={"name": DENSE, "stage": recipe.stage[:1], "policy": None})


def digest(recipe: Any) -> str:
    """Of every value in it, defaults and presets, too."""
    return hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:12]


def make_dense(track: Track, row: Row, source: str, work: Path, device: str) -> dict[str, Any]:
    """Train the dense start of a row, and measure it."""
    from rprune.pipeline.run import Runner

    recipe = dense_of(track, row, source)
    folder = work / DENSE / digest(recipe)
    net = Runner(recipe, row.recipe.parent, folder / "run", Lines(), device).run()[-1].folder
    found = measure(track, recipe, net, FLOAT, folder, device)
    start = replace(row, method=DENSE, places=track.of_start(row))
    return describe(start, dense_of(track, row, row.data), net, found)


def make_row(
    track: Track, row: Row, source: str, work: Path, device: str, forms: Sequence[str], known: dict[str, Any] | None
) -> dict[str, Any]:
    """Prune and fine-tune from the dense start (and what else the recipe says), and measure each form of it.

    ``known``: what was found of it before, on another device perhaps. Its net is finished then. Raises SystemExit where
    that net does not lie here.
    """
    from rprune.pipeline.run import Runner

    def run(start: Path, stages: list[Any], name: str) -> Path:
        part = recipe.model_copy(update={"checkpoint": str(start.resolve()), "stage": tuple(stages)})
        return Runner(part, row.recipe.parent, folder / name, Lines(), device).run()[-1].folder

    recipe = recipe_of(track, row, source)
    folder, found = work / track.name / row.name, dict(known["counts"]) if known else {}
    if known:
        finished = sorted((folder / "run").glob("*/stage.json"))
        if not finished:
            raise SystemExit(f"{folder}.json has figures, but no net lies in {folder}; remove that file to train it")
        net = finished[-1].parent
    else:
        dense = work / DENSE / digest(dense_of(track, row, source)) / "run" / "01-train"
        net = run(dense, [stage for stage in recipe.stage[1:] if stage.kind != "quantize"], "run")
    for form in forms:
        if form in found:
            continue
        made = net
        if form != FLOAT:
            stage = next(stage for stage in recipe.stage if stage.kind == "quantize")
            stage = stage.model_copy(update={"mode": CODEBOOK}) if form == CODEBOOK else stage
            made = run(net, [stage], form)
        found |= measure(track, recipe, made, form, folder, device)
    return describe(row, recipe_of(track, row, row.data), net, found)


def measure(track: Track, recipe: Any, artifact: Path, form: str, folder: Path, device: str) -> dict[str, Any]:
    """Counts of every suite on a stage's result, ``{form: {suite: {clean, robust, n}}}``; interrupted, it goes on."""
    from rprune.attacks.suites import with_transfer
    from rprune.data.loaders import loader
    from rprune.evaluation.ledger import Ledger
    from rprune.evaluation.robustness import robustness
    from rprune.files import digest_of, read_json
    from rprune.pipeline.attack import ledger_key
    from rprune.pipeline.shipped import open_target
    from rprune.pipeline.single import Request

    named = read_json(artifact / "stage.json", "stage")["metadata"]["architecture"]["name"]
    arch = named if ":" in named else None  # a file's, which is asked for; integers hold their layers themselves
    opened = open_target(artifact, Request(arch=arch, seed=recipe.seed, device=device), Lines())
    bench, counts = opened.bench, {}
    for suite, limit in track.suites.get(form, {}).items():
        attacks = with_transfer(bench.suite(suite), opened.target.parents)
        key = ledger_key(
            opened.identity, bench.data.test.digest, bench.threat, attacks, bench.seed, bench.device.type, form=form
        )
        # a ledger of other code is of another attack
        ledger = Ledger.open(folder / f"{form}-{suite}-{digest_of(key)[:8]}.jsonl", key)
        data = loader(bench.data.test, bench.device)
        found = robustness(
            opened.target, data, bench.threat, attacks, seed=bench.seed, limit=limit, ledger=ledger, grid=False
        )
        counts[suite] = {"clean": found.clean.correct, "robust": found.correct, "n": found.clean.n}
    return {form: counts}


def describe(row: Row, recipe: Any, net: Path, found: dict[str, Any]) -> dict[str, Any]:
    from rprune.pipeline.artifact import load_artifact

    artifact = load_artifact(net, recipe.model.arch)
    stages = [
        {key: entry.metrics[key] for key in ("target_met", "selected_epoch") if key in entry.metrics}
        | {"stage": entry.stage}
        for entry in artifact.metadata.lineage
    ]
    return {
        "method": row.method,
        "seed": row.seed,
        **row.places,
        "recipe": digest(recipe),
        "kept": artifact.metadata.budget,
        "stages": stages,
        "counts": found,
    }


class Lines:
    """Progress as plain lines, for a log."""

    def epoch(self, stage: str, log: Any) -> None:
        print(f"{stage} {log.epoch}/{log.epochs} " + json.dumps({k: round(v, 4) for k, v in log.values.items()}))

    def progress(self, what: str, done: int, good: int | None, total: int) -> None: ...

    def note(self, text: str) -> None:
        print(text)

    def warn(self, text: str) -> None:
        print(text)
