"""The file that certificates are written to: bound to model, data and environment, sealed by its digest; its check.

Checking takes the names of model and data from the file and trusts no more: bytes first, then arithmetic (every radius
from its counts), then a few samples anew: bounds, noise, and an attack, which must not break what is certified.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

import rprune
from rprune.certification.confidence import recounted
from rprune.certification.ibp import of_integers
from rprune.data.loaders import Batch, loader
from rprune.errors import InputError, IntegrityError
from rprune.evaluation.accuracy import classes_of
from rprune.evaluation.certificates import STATUS, cascade, exactly
from rprune.evaluation.robustness import chosen, robustness
from rprune.evaluation.target import Target
from rprune.files import file_digest, read_json, seal_of
from rprune.pipeline.bench import Bench, Reporter
from rprune.pipeline.certifying import (
    CLAIMS,
    CLAIMS_OF,
    FALSIFIER,
    LOWER,
    Certificates,
    as_hydra,
    bounds_of,
    certified_network,
    falsifier_of,
    said,
    said_of,
    smoothing_of,
    threat_of,
)
from rprune.pipeline.environment import environment, source_digest
from rprune.pipeline.recipe import CertifyStage
from rprune.pipeline.shipped import graph_of, is_final, open_target
from rprune.pipeline.single import Request, open_model
from rprune.pipeline.verdicts import SCHEMA
from rprune.threat import ThreatModel

HINT = "do not trust this certificate; issue a new one: rprune certify"
CLOSE = 1e-6  # of margins that another CPU computes, relative
DRIFT = 1 / 500  # of draws whose class float rounding may change elsewhere
Outcome = tuple[str, str]
Sample = TypeVar("Sample", int, tuple[int, str])


def sealed(found: Certificates, model: Path | None) -> dict[str, Any]:
    """The content of a certificate file; ``model`` is the file that was certified."""
    body = found | {
        "schema": SCHEMA,
        "tool": {"name": "rprune", "version": rprune.__version__, "source_sha256": source_digest()},
        "environment": environment("cpu"),
        "caveats": _caveats(found),
    }
    if model is not None:
        body["file"] = {"name": model.name, "sha256": _identity(model)}
    return body | {"digest": seal_of(body)}


def _identity(model: Path) -> str:
    """sha256 of a file, or of a stage folder's record, which lists those of its files."""
    return file_digest(model / "stage.json" if model.is_dir() else model)


def _caveats(found: Certificates) -> list[str]:
    bounds, smoothing = found.get("bounds"), found.get("smoothing")
    said = []
    if bounds:
        said.append(f"bounds hold for {CLAIMS[bounds['claim']]}")
    if smoothing:
        said.append(f"radii hold for {CLAIMS['statistical']}; a device has to run the smoothed classifier to have them")
        if smoothing["noise"] == "gauss":
            said.append(
                "noise is drawn in floating point, which the theory of smoothing does not cover; --noise grid is exact"
            )
    return said


def check(path: Path, request: Request, reporter: Reporter, samples: int) -> Iterator[Outcome]:
    """What was checked, one after the other, with ``samples`` of each kind computed anew.

    Raises:
        IntegrityError: bytes are not the ones promised, or a claim does not hold.
        InputError: the file is no certificate, or model or data cannot be read.
    """
    found = read_json(path, "certificate")
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise InputError(f"{path} is no certificate of schema {SCHEMA}", "give the file that 'rprune certify' wrote")
    try:
        yield from _checks(path, found, request, reporter, samples)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise IntegrityError(f"{path}: its content makes no sense ({type(error).__name__}: {error})", HINT) from None


def _checks(path: Path, found: dict[str, Any], request: Request, reporter: Reporter, samples: int) -> Iterator[Outcome]:
    _need(found["digest"] == seal_of(found), f"{path} was changed after it was issued: its digest differs")
    yield "digest", "the content is the one that was sealed"
    name = str(found["file"]["name"])
    model = path.parent / name
    _need(Path(name).name == name != "..", "it names a file elsewhere")
    if not model.exists():
        raise InputError(f"there is no {model}", "put the model beside its certificate")
    _need(
        _identity(model) == found["file"]["sha256"], f"{model} is not the file that was certified: its sha256 differs"
    )
    yield "model", f"{name} has the bytes that were certified"
    threat = ThreatModel.of(found["threat"]["norm"], found["threat"]["eps"])
    request = replace(
        request, data=request.data or found["data"]["source"], seed=found["seed"], norm=threat.norm, eps=threat.text
    )
    stage, opened = CertifyStage.model_validate(found["config"]), _opened(model, request, reporter, "bounds" in found)
    bench = opened.bench
    _need(
        bench.data.test.digest == found["data"]["sha256"], f"the data of {bench.data.source} are not those certified on"
    )
    yield "data", f"the test split of {bench.data.source} has the images and labels that were certified"
    same = all(found.get(name) == value for name, value in opened.says.items())
    _need(same, "it speaks of another form of the model, or of other tensors, architecture or code")
    _need(found["caveats"] == _caveats(found), "its caveats are not those of its claims")
    _settings_agree(found, stage, threat, opened)
    yield "settings", "radii, samples and settings are those that it was made with"
    dice = random.SystemRandom()  # not to be foreseen by who issues
    if bounds := found.get("bounds"):
        _bounds_add_up(bounds)
        yield "bounds", f"verdicts of {bounds['n']} samples add up"
        yield "bounds again", _bounds_again(bounds, opened.network, bench, dice, samples)
    if smoothing := found.get("smoothing"):
        _radii(smoothing)
        yield "radii", f"{len(smoothing['samples'])} radii follow from their counts"
        yield "noise again", _noise_again(smoothing, stage, threat, opened.net, bench, dice, samples)


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise IntegrityError(message, HINT)


def _settings_agree(found: dict[str, Any], stage: CertifyStage, threat: ThreatModel, opened: _Opened) -> None:
    """What stands twice is the same: nothing is claimed at other settings, or of chosen samples alone."""
    bench, config = opened.bench, found["config"]
    _need(threat == threat_of(bench, stage), "its threat is not that of its settings")
    index, count = (int(number) for number in found.get("shard", "1/1").split("/"))
    for section, limit in (("bounds", "limit"), ("smoothing", "smoothing_limit")):
        if section in found:
            ids = chosen(len(bench.data.test), config[limit], (index - 1, count)).tolist()
            same = [row["index"] for row in found[section]["samples"]] == ids
            _need(same, f"its samples of {section} are not in order, each once, and all of its part")
    if bounds := found.get("bounds"):
        levels = [threat.text, *(threat.scaled(factor).text for factor in LOWER)]
        same = (bounds["norm"], bounds["eps"]) == (threat.norm, threat.text)
        _need(same and [level["eps"] for level in bounds["levels"]] == levels, "its bounds are at other radii")
        methods = list(bounds_of(stage, of_integers(opened.network)))
        same = (bounds["methods"], bounds["falsifier"]) == (methods, falsifier_of(stage))
        _need(same and ("as_hydra" in bounds) == (stage.compat is not None), "its bounds have other settings")
    if smoothing := found.get("smoothing"):
        _, wanted = smoothing_of(stage, threat, math.prod(bench.data.shape))
        _need(smoothing == wanted | {"samples": smoothing["samples"]}, "its smoothing has other settings")
    asked = {"bounds": set(stage.methods) != {"smoothing"}, "smoothing": "smoothing" in stage.methods}
    _need(all((name in found) == wanted for name, wanted in asked.items()), "a section that it asks for is missing")


@dataclass(frozen=True, eq=False)
class _Opened:
    """What bounds, where there are some, and noise are computed with; what a certificate says of such a model."""

    network: Any
    net: Any
    bench: Bench
    says: dict[str, str]


def _opened(model: Path, request: Request, reporter: Reporter, bounds: bool) -> _Opened:
    if is_final(model, request):
        opened = open_target(model, request, reporter)
        network, net = graph_of(opened) if bounds else None, opened.target.artifact
        return _Opened(network, net, opened.bench, said(opened.role, opened.identity))
    bench, artifact = open_model(model, request, reporter)
    network = certified_network(artifact, bench)
    return _Opened(network, network, bench, said_of(artifact))


def _batch(bench: Bench, ids: list[int]) -> Batch:
    return loader(bench.data.test, torch.device("cpu")).take(torch.tensor(ids))


def _bounds_add_up(bounds: dict[str, Any]) -> None:
    rows, levels = bounds["samples"], bounds["levels"]
    counted = {status: sum(row["status"] == status for row in rows) for status in STATUS}
    _need(len(rows) == bounds["n"] and counted == bounds["counts"], "its counts are not those of its samples")
    for row in rows:
        sure = row["status"] == "certified"
        wrong = row["label"] != row["prediction"]
        _need(wrong == (row["status"] == "misclassified"), "a verdict contradicts prediction and label")
        _need(sure or not row["firm"], "a sample holds for more kernels and is not certified")
        _need(
            not sure or (row["margin"] is not None and row["margin"] > 0), "a certified sample has no positive margin"
        )
        by = bounds["methods"] if sure else ["attack"] if row["status"] == "falsified" else [""]
        _need(row["method"] in by, "a verdict names what cannot have decided it")
        _need(row["status"] != "falsified" or bounds["falsifier"] is not None, "a sample is falsified by no attack")
    firm = sum(row["firm"] for row in rows)
    _need(bounds["firm"]["correct"] == firm, "its counts are not those of its samples")
    _need(levels[0]["eps"] == bounds["eps"], "its first level is not the radius that was certified")
    _need(levels[0]["proved"] == [int(row["status"] == "certified") for row in rows], "its levels are not its samples'")
    for wider, level in zip([levels[0], *levels], levels, strict=False):
        _need(
            sum(level["proved"]) == level["correct"] and len(level["proved"]) == len(rows), "its levels do not add up"
        )
        _need(
            all(a <= b for a, b in zip(wider["proved"], level["proved"], strict=True)), "less holds in a smaller ball"
        )


def _bounds_again(bounds: dict[str, Any], network: Any, bench: Bench, dice: random.Random, samples: int) -> str:
    """Certified samples are proved again, by what proved them, and stand the attack; falsified ones fall to it."""
    threat, rows = ThreatModel.of(bounds["norm"], bounds["eps"]), bounds["samples"]
    exact = exactly(network)
    claims = CLAIMS_OF[of_integers(network)]
    _need((bounds["claim"], bounds["firm"]["claim"]) == claims, "it makes the claims of another kind of model")
    rows_by_id = {row["index"]: row for row in rows}
    proved = _some([row["index"] for row in rows if row["status"] == "certified"], dice, samples)
    for i in proved:
        batch, row = _batch(bench, [i]), rows_by_id[i]
        _need(row["label"] == int(batch.y), f"sample {i} has label {int(batch.y)}, not {row['label']}")
        (by,), margin, firm = cascade(exact, batch.x, batch.y, threat, (row["method"],), torch.tensor([True]))
        same = by and math.isclose(float(margin), row["margin"], rel_tol=CLOSE, abs_tol=CLOSE)
        _need(bool(same), f"sample {i} is certified by {row['method']} with margin {row['margin']}, not so here")
        _need(not row["firm"] or bool(firm), f"sample {i} is said to hold for more kernels; not so here")
    lower = _some(_lower_proofs(bounds), dice, samples)
    for i, level in lower:
        less, batch = ThreatModel.of(bounds["norm"], level), _batch(bench, [i])
        (by,), *_ = cascade(exact, batch.x, batch.y, less, ("ibp",), torch.tensor([True]))
        _need(bool(by), f"sample {i} is said to be proved at {level}; not so here")
    broken = _some([row["index"] for row in rows if row["status"] == "falsified"], dice, samples)
    test = loader(bench.data.test, torch.device("cpu"))
    if both := sorted(proved + broken):
        found = robustness(
            Target(network, network), test, threat, (FALSIFIER,), seed=bench.seed, ids=torch.tensor(both), grid=False
        )
        for i, robust in zip(found.ids.tolist(), found.robust.tolist(), strict=True):
            _need(i not in proved or robust, f"sample {i} is certified, and an attack breaks it")
            _need(i in proved or not robust, f"sample {i} is said to be falsified; the attack named does not break it")
    if samples and "as_hydra" in bounds:
        counted = as_hydra(exact, test, threat, torch.tensor(list(rows_by_id), dtype=torch.int64))
        _need(bounds["as_hydra"] == counted, "HYDRA's code would count otherwise")
    again = f"{len(proved)} certified samples proved and attacked again, {len(lower)} proved at smaller radii"
    return f"{again}, {len(broken)} falsified ones broken"


def _lower_proofs(bounds: dict[str, Any]) -> list[tuple[int, str]]:
    """Samples that intervals prove below eps alone, each at the largest of these levels."""
    found: dict[int, str] = {}
    for place, row in enumerate(bounds["samples"]):
        for level in reversed(bounds["levels"][1:]):
            if level["proved"][place] and row["status"] != "certified":
                found[row["index"]] = level["eps"]
    return sorted(found.items())


def _radii(smoothing: dict[str, Any]) -> None:
    settings = {name: smoothing[name] for name in ("n", "alpha", "sigma", "test", "slack")}
    for row in smoothing["samples"]:
        _, right = recounted(row, **settings)
        _need(right, f"the radius of sample {row['index']} does not follow from its counts")


def _noise_again(
    smoothing: dict[str, Any],
    stage: CertifyStage,
    threat: ThreatModel,
    net: Any,
    bench: Bench,
    dice: random.Random,
    samples: int,
) -> str:
    rows = {row["index"]: row for row in smoothing["samples"]}
    again, _ = smoothing_of(stage, threat, math.prod(bench.data.shape))
    ids = _some(list(rows), dice, samples)
    if not ids:
        return "no samples drawn again"
    batch = _batch(bench, ids)
    labels = batch.y.tolist()
    verdicts = again.certify(classes_of(net), batch.x, ids, len(bench.data.classes), bench.seed, smoothing["radius"])
    for i, label, found in zip(ids, labels, verdicts, strict=True):
        row = rows[i]
        _need(row["label"] == label, f"sample {i} has label {label}, not {row['label']}")
        near = abs(found.count * row["n"] - row["count"] * found.n) <= DRIFT * found.n * row["n"]
        same = near and found.prediction == row["prediction"]
        _need(same, f"sample {i} has {row['count']} of {row['n']} draws in its class, here {found.count} of {found.n}")
    return f"{len(ids)} samples drawn again"


def _some(ids: list[Sample], dice: random.Random, count: int) -> list[Sample]:
    return sorted(dice.sample(ids, min(count, len(ids))))
