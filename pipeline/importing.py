"""Somebody's weights as an artifact: of the architecture that the user names, or that the weights tell."""

from __future__ import annotations

from dataclasses import replace

from rprune.errors import UsageError
from rprune.models.guess import described, shapes_of
from rprune.models.registry import Architecture, is_trusted
from rprune.pipeline.artifact import Artifact
from rprune.pipeline.bench import Bench, architecture
from rprune.pipeline.foreign import Foreign
from rprune.pipeline.recipe import ModelSection
from rprune.pipeline.stages import adopt


def imported(found: Foreign, model: ModelSection, bench: Bench) -> Artifact:
    """The weights as an artifact for the bench's data, whose notes tell what was taken and what it seems to be.

    ``model``: its ``arch`` is followed where the section names one; else only what normalises is taken from it.

    Raises:
        InputError: the weights fit no architecture, several, or not the one that is named, or not the data.
        UsageError: arguments of an architecture that is not named.
    """
    if "arch" in model.model_fields_set:
        arch = architecture(model, bench.data)
        found, how, told = _unwrapped(found, arch), "", {}
    else:
        if model.kwargs:
            raise UsageError("arguments of an architecture that is not named", "name it: --arch NAME")
        data = bench.data
        arch = found.guessed(data.shape, len(data.classes), data.source)
        arch = replace(arch, mean=model.mean, std=model.std)
        how, told = ", by names and shapes", {"guessed": described(arch)}
    artifact = adopt(found.state, arch, "pgd-at", bench, found.record | told)
    taken = str(found.found)
    clean = artifact.metadata.lineage[-1].metrics["validation"]["validation_accuracy"]
    hint = "" if clean > 2 / arch.num_classes or arch.mean else "; it may expect --mean and --std"
    bench.reporter.note(
        f"Import {found.path.name} ({found.kind}{f': {taken}' if taken else ''}) as {described(arch)} with "
        f"{arch.num_classes} classes{how}: {100 * clean:.1f} % right on the validation split{hint}"
    )
    return artifact


def _unwrapped(found: Foreign, arch: Architecture) -> Foreign:
    """With the prefix that was taken off put back, where the architecture's own names have it."""
    prefix = found.found.prefix
    if not prefix or is_trusted(arch.name):
        return found
    wanted = set(shapes_of(arch))
    places = [place for place, letter in enumerate(prefix, 1) if letter == "."]
    for place in (0, *places):
        back = prefix[place:]
        state = {back + name: tensor for name, tensor in found.state.items()}
        if set(state) == wanted:
            return replace(found, found=replace(found.found, state=state, prefix=prefix[:place]))
    return found
