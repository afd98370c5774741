"""A recipe cut down to the least that runs its whole chain, to see whether that works: a minute for small nets."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from rprune.attacks.base import ATTACKS, Attack
from rprune.attacks.suites import suite
from rprune.objectives.base import OBJECTIVES
from rprune.pipeline.anytime import shortened
from rprune.pipeline.recipe import CertifyStage, ExportStage, FinetuneStage, Recipe, Section, Trained
from rprune.pipeline.stages import epochs_of
from rprune.threat import ThreatModel

SAMPLES = 16  # of each split
BATCHES = 2  # of an epoch, at least
CERTIFIED = 2  # test samples
GUESSES, DRAWS = 10, 100  # of smoothing; so many draws reach a radius of sigma
LEAST = {"steps": 1, "restarts": 1, "targets": 2, "budget": 20, "eot": 2}  # fields of attacks
SUITE = "smoke"


def smoked(recipe: Recipe) -> Recipe:
    """The same data, model and stages in the same order, each with the least of everything that takes time.

    One epoch of a few batches on ``SAMPLES`` images of each split, attacks of one step in training and in the suite,
    few samples to certify, no checks of the attack's health. What a recipe names is still all built and run, so that
    what fails in the middle of the night fails here.

    Raises UsageError for the name of an objective, an attack or a suite that is unknown.
    """
    limit = min(recipe.data.limit or SAMPLES, SAMPLES)
    suites = dict(recipe.suites)
    stages = []
    for stage in recipe.stage:
        cut: Any = _cut(stage, limit)
        if isinstance(cut, ExportStage):
            attacks = [ATTACKS.describe(weakened(attack)) for attack in suite(cut.suite, recipe.suites)]
            suites[SUITE] = tuple(attacks)
            cut = cut.model_copy(update={"suite": SUITE})
        stages.append(cut)
    changes = {"name": f"{recipe.name}-smoke", "smoke": True, "suites": suites, "stage": tuple(stages)}
    return recipe.model_copy(update=changes | {"data": recipe.data.model_copy(update={"limit": limit})})


def _cut(stage: Section, limit: int) -> Section:
    if isinstance(stage, CertifyStage):
        least = {
            "limit": min(stage.limit or CERTIFIED, CERTIFIED),
            "n0": min(stage.n0, GUESSES),
            "n": min(stage.n or DRAWS, DRAWS),
            "smoothing_limit": min(stage.smoothing_limit, CERTIFIED),
            "radius": stage.radius and min(stage.radius, stage.sigma),  # few draws reach no further
        }
        return stage.model_copy(update=least)
    if isinstance(stage, ExportStage):
        return stage.model_copy(update={"health": False})
    if not isinstance(stage, Trained) or not epochs_of(stage):
        return stage
    changes: dict[str, Any] = {"batch_size": min(stage.batch_size, max(1, limit // BATCHES))}
    if isinstance(stage, FinetuneStage):
        changes["soup"] = min(stage.soup, 2)
    objective = getattr(stage, "objective", None)
    if objective is not None:
        changes["objective"] = _hurried(objective)
    return shortened(stage, 1).model_copy(update=changes)


def _hurried(spec: Any) -> dict[str, Any]:
    """The specification of an objective with its attacks weakened."""
    objective: Any = OBJECTIVES.build(spec, threat=ThreatModel("linf", "0"))
    attacks = {field.name: getattr(objective, field.name) for field in fields(objective)}
    changes = {name: weakened(attack) for name, attack in attacks.items() if isinstance(attack, Attack)}
    return OBJECTIVES.describe(replace(objective, **changes))


def weakened(attack: Attack) -> Attack:
    """The attack with few steps, restarts, targets and queries, those of an attack inside it as well."""
    changed: Any = attack
    for field in fields(changed):
        value = getattr(attack, field.name)
        if isinstance(value, Attack):
            changed = replace(changed, **{field.name: weakened(value)})
        elif field.name in LEAST:
            changed = replace(changed, **{field.name: min(value, LEAST[field.name])})
    return changed  # type: ignore[no-any-return]
