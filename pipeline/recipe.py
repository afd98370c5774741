"""Recipes: what a run is, as frozen, validated tables."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from rprune.data.splits import Augment
from rprune.errors import UsageError, unknown_name
from rprune.files import read_toml
from rprune.registry import first_problem, misspelt
from rprune.threat import ThreatModel

Spec: TypeAlias = str | dict[str, Any]
"""A registered name, or a table with ``name`` and its options."""
Positive: TypeAlias = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """The architecture; classes and image shape come from the data."""

    arch: str = "cnn-small"
    kwargs: dict[str, Any] = {}
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class DataSection(Section):
    source: str
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    augment: Augment | None = None
    pseudo: str | None = None  # a second source; its training split, labels included, joins every batch
    pseudo_model: str | None = None  # a model file whose predictions replace those labels
    limit: Positive | None = None  # samples of each split, at most
    download: bool = False


class ThreatSection(Section):
    norm: Literal["linf", "l2"] = "linf"
    eps: str | float

    def model(self) -> ThreatModel:
        return ThreatModel.of(self.norm, self.eps)


class Trained(Section):
    """Options of every stage that trains. SGD as in HARP (HYDRA: weight decay 1e-4); the cosine falls at every step,
    where the papers' code steps once an epoch (``cosine-by-epoch``)."""

    batch_size: Positive = 128
    optimizer: str = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    schedule: str = "cosine"
    warmup: Annotated[float, Field(ge=0, description="epochs of linear warm-up")] = 0.0
    clip_norm: Annotated[float, Field(gt=0, description="largest norm of the gradient")] | None = None
    average: Literal["none", "ema", "swa"] = "none"
    average_decay: Annotated[float, Field(ge=0, lt=1, description="decay of the ema at every step")] = 0.995
    awp: Annotated[float, Field(ge=0, description="relative radius of the weight perturbation; 0.005 is usual")] = 0.0
    awp_from: Annotated[int, Field(ge=0)] = 0
    accumulate: Annotated[Positive, Field(description="parts of a batch that are computed one after another")] = 1
    precision: Annotated[Literal["fp32", "bf16"], Field(description="of the net in training; losses are fp32")] = "fp32"
    compile: Annotated[bool, Field(description="torch.compile the net in training; pays off on GPUs")] = False
    select: Literal["best", "last"] = "best"


class TrainStage(Trained):
    """Dense training. 100 epochs at lr 0.1, as HYDRA and HARP pretrain."""

    kind: Literal["train"] = "train"
    objective: Spec = "pgd-at"
    epochs: Positive = 100
    lr: Annotated[float, Field(gt=0)] = 0.1


class PruneStage(Trained):
    """Pruning to a budget: ``sparsity`` of the weights, or a share of the ``macs`` of the dense conv and linear layers.

    Epochs and lr come from the method (20 and 0.1 for HYDRA and HARP) unless given.
    """

    kind: Literal["prune"] = "prune"
    method: Spec = "harp"
    sparsity: Annotated[
        float | None, Field(ge=0, lt=1, description="0.99 removes 99 % of the conv and linear weights")
    ] = None
    macs: Annotated[float | None, Field(gt=0, le=1, description="0.05 keeps weights that cost 5 % of the MACs")] = None
    floor: Annotated[float, Field(gt=0, description="weights that a layer keeps at least, or below 1 their share")] = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    data_fraction: Annotated[float, Field(gt=0, le=1, description="share of the training data to prune with")] = 1.0
    objective: Spec | None = None  # None: as the model was trained
    epochs: Annotated[int, Field(ge=0)] | None = None
    lr: Annotated[float, Field(gt=0)] | None = None

    @pydantic.model_validator(mode="after")
    def _one_budget(self) -> PruneStage:
        if (self.sparsity is None) == (self.macs is None):
            raise UsageError(
                f"pruning needs {'one of sparsity and macs' if self.macs is None else 'sparsity or macs, not both'}",
                "sparsity 0.99 removes 99 % of the weights, macs 0.05 keeps weights that cost 5 % of the MACs",
            )
        return self


class FinetuneStage(Trained):
    """Training with the mask held. 100 epochs at lr 0.01, as HYDRA and HARP fine-tune."""

    kind: Literal["finetune"] = "finetune"
    objective: Spec | None = None
    epochs: Positive = 100
    lr: Annotated[float, Field(gt=0)] = 0.01
    teacher: str | None = None  # "dense": the model before pruning; or a model file
    teacher_weight: Annotated[float, Field(ge=0, le=1, description="share of the teacher's term in the loss")] = 0.5
    temperature: Annotated[float, Field(gt=0)] = 4.0
    soup: Annotated[Positive, Field(description="trainings from seeds of their own, averaged where it helps")] = 1


class ShrinkStage(Section):
    """Remove channels that do nothing, so that the network is physically smaller; batch norm is folded."""

    kind: Literal["shrink"] = "shrink"


class QuantizeStage(Trained):
    """Integers in place of floats (ptq; qat trains with them first), or few weight values (codebook).

    ``observer`` None: minmax from 8 bits on, mse below; ``bias_correction`` None: below 8 bits. qat trains ``epochs``
    at ``lr``, the learning rate of fine-tuning.
    """

    kind: Literal["quantize"] = "quantize"
    mode: Literal["ptq", "qat", "codebook"] = "ptq"
    bits: Annotated[int, Field(ge=2, le=12, description="8 is deployed; more can only be simulated")] = 8
    observer: Literal["minmax", "percentile", "mse"] | None = None
    percentile: Annotated[float, Field(gt=50, le=100, description="per cent of the values that stay")] = 99.99
    calibration: Positive = 512  # training images whose ranges set the scales
    portable: bool = False  # no filter saturates on a CPU without VNNI
    compact: bool = True  # remove channels that do nothing first, so that no form holds them
    bias_correction: bool | None = None
    objective: Spec | None = None
    epochs: Positive | None = None
    lr: Annotated[float, Field(gt=0)] | None = None

    @pydantic.model_validator(mode="after")
    def _fits_mode(self) -> QuantizeStage:
        """Options that would do nothing are refused."""
        calibrated = {"observer", "percentile", "calibration", "portable"}
        modes = {
            "ptq": calibrated | {"bias_correction"},
            "qat": calibrated | {"objective", "epochs", "lr"} | set(Trained.model_fields),
            "codebook": set[str](),
        }
        used = modes[self.mode] | {"kind", "mode", "bits", "compact"}
        for name, field in type(self).model_fields.items():
            if name not in used and getattr(self, name) != field.default:
                others = ", ".join(mode for mode, names in modes.items() if name in names)
                raise UsageError(f"{name} has no effect in mode {self.mode}", f"it belongs to {others}")
        if self.bits > 8 and (self.mode == "codebook" or self.portable):
            what = "a codebook" if self.mode == "codebook" else "portable"
            raise UsageError(f"{what} needs at most 8 bits", "a byte names its levels, and an int8 file its weights")
        return self


Certification: TypeAlias = Literal["auto", "ibp", "crown-ibp", "deepz", "crown", "alpha-crown", "smoothing"]


class CertifyStage(Section):
    """Bounds and smoothing, whose defaults are Cohen et al.'s.

    Bounds are tried in their order on what the ones before left; "auto" stands for all that the form has, from the
    cheapest on: integers have exact intervals alone. ``falsify``: an attack goes first, as what it breaks needs none.

    ``compat`` "hydra" counts beside that what HYDRA's code would (:mod:`rprune.certification.compat`): no guarantee.

    ``test`` "sequential" draws up to ``n`` (None: 100,000) until l2 ``radius`` is proved or out of reach; "fixed" draws
    ``n`` (None: 10,000, as HYDRA). ``radius`` None: what covers the threat, or sigma where n draws do not reach that.
    """

    kind: Literal["certify"] = "certify"
    methods: tuple[Certification, ...] = ("auto", "smoothing")
    falsify: bool = True
    eps: str | float | None = None  # None: the threat's
    compat: Literal["hydra"] | None = None
    limit: Positive | None = None
    sigma: Annotated[float, Field(gt=0)] = 0.25
    test: Literal["sequential", "fixed"] = "sequential"
    noise: Literal["gauss", "grid"] = "gauss"
    radius: Annotated[float, Field(gt=0)] | None = None
    n0: Positive = 100
    n: Positive | None = None
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.001
    smoothing_limit: Positive = 100


class ExportStage(Section):
    """Files, checks, and the claims measured on them."""

    kind: Literal["export"] = "export"
    formats: tuple[str, ...] = ("safetensors", "onnx", "onnx-int8", "onnx-compact", "packed")
    compact: bool = True  # remove channels that do nothing first; integers say themselves whether that was done
    bench: bool = False  # measure latencies, too
    suite: str = "aa-lite"
    health: bool = True  # check the attack itself; without, a gate does not accept robust accuracy
    limit: Positive | None = None


Stage: TypeAlias = TrainStage | PruneStage | FinetuneStage | ShrinkStage | QuantizeStage | CertifyStage | ExportStage
STAGES: dict[str, type[Section]] = {
    "train": TrainStage,
    "prune": PruneStage,
    "finetune": FinetuneStage,
    "shrink": ShrinkStage,
    "quantize": QuantizeStage,
    "certify": CertifyStage,
    "export": ExportStage,
}


class Recipe(Section):
    """A whole run. ``policy`` is a gate file, found beside the recipe."""

    rprune: Literal[1]
    name: str
    seed: Annotated[int, Field(ge=0)] = 0
    preset: str | None = None  # paper or rprune: what the stages do not say
    model: ModelSection = ModelSection()
    data: DataSection
    threat: ThreatSection | None = None  # None: what is usual for the data
    checkpoint: str | None = None  # start from this file instead of a train stage
    suites: dict[str, tuple[Spec, ...]] = {}  # attacks by a name of your own, for export's suite
    stage: tuple[Annotated[Stage, Field(discriminator="kind")], ...]
    policy: str | None = None
    smoke: bool = False  # does the chain work? (:mod:`rprune.pipeline.smoke`)


RECIPES = Path(__file__).parent.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with rprune, by name. gate.toml is a policy."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.toml")) if path.stem != "gate"}


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a TOML file, with ``key=value`` overrides applied; one with ``smoke`` as it will run.

    Raises UsageError: not there, not TOML, an unknown key (the nearest is offered), a value out of range, or stages in
    an order that cannot work.
    """
    table = read_table(path)
    for text in overrides:
        override(table, text)
    if table.get("preset") is not None:
        from rprune.pipeline.presets import apply_preset  # torch comes with it

        apply_preset(table)
    recipe: Recipe = validated(Recipe, table, str(path))
    _check_order(recipe)
    if recipe.smoke:
        from rprune.pipeline.smoke import smoked  # torch comes with it

        recipe = smoked(recipe)
    return recipe


def read_table(path: Path) -> dict[str, Any]:
    """A recipe as it stands in its file. Raises UsageError: not there, not TOML."""
    return read_toml(path, "recipe", "'rprune init' writes one")


def validated(section: type[Any], table: Mapping[str, Any], origin: str) -> Any:
    """Validate a table; the error names the key, and for an unknown one the nearest that exists."""
    try:
        return section.model_validate(table)
    except pydantic.ValidationError as error:
        # an unknown key is the likelier mistake than the required one that it was meant to be
        problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        if problem["type"] == "extra_forbidden":
            place = [str(part) for part in problem["loc"] if not isinstance(part, int)]  # as --set addresses it
            raise unknown_name(f"key in {origin}", ".".join(place), _siblings(section, place)) from None
        if problem["type"] == "union_tag_invalid":
            raise unknown_name(f"stage in {origin}", str(problem["ctx"]["tag"]), STAGES) from None
        if (found := misspelt(problem, origin)) is not None:
            raise found from None
        field = next((s.model_fields[str(problem["loc"][-1])] for s in STAGES.values()
                      if problem["loc"] and str(problem["loc"][-1]) in s.model_fields), None)  # fmt: skip
        hint = field.description if field is not None and field.description else "correct the value"
        raise UsageError(f"{origin}: {first_problem(error)}", hint) from None


def _siblings(section: type[Any], place: Sequence[str]) -> list[str]:
    """Full names of the keys that may stand where an unknown one stands."""
    owner: Any = section
    for part in place[:-1]:
        if part in STAGES:
            owner = STAGES[part]
        elif part in owner.model_fields:
            annotation = owner.model_fields[part].annotation
            candidates = [annotation, *getattr(annotation, "__args__", ())]
            owner = next((a for a in candidates if isinstance(a, type) and issubclass(a, BaseModel)), owner)
    return [".".join([*place[:-1], name]) for name in owner.model_fields]


def override(table: dict[str, Any], setting: str) -> None:
    """Set ``a.b=c``; a stage is addressed by its kind: ``stage.prune.sparsity=0.9``. Values are TOML, else text."""
    path, separator, text = setting.partition("=")
    if not separator or not path.strip():
        raise UsageError(f"cannot read --set {setting}", "write --set KEY=VALUE, for example stage.prune.sparsity=0.9")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = path.strip().split(".")
    place: Any = table
    for part in parents:
        if isinstance(place, list):
            stages = [entry for entry in place if entry.get("kind") == part]
            if part not in STAGES:
                raise unknown_name(f"stage of --set {setting}:", part, STAGES)
            if not stages:
                kinds = ", ".join(str(entry.get("kind")) for entry in place)
                raise UsageError(f"--set {setting}: the recipe has no {part} stage", f"its stages are {kinds}")
            place = stages[0]
        else:
            if isinstance(place.get(part), str):  # method = "harp" -> { name = "harp" }
                place[part] = {"name": place[part]}
            place = place.setdefault(part, {})
    if not isinstance(place, dict):
        raise UsageError(f"--set {setting} does not name a value", "write --set stage.prune.sparsity=0.9")
    place[last] = value


def _check_order(recipe: Recipe) -> None:
    kinds = [stage.kind for stage in recipe.stage]
    if recipe.checkpoint is None and (not kinds or kinds[0] != "train"):
        raise UsageError("the first stage is not train", "begin with a train stage, or name a checkpoint")
    if "train" in kinds[1:] or (recipe.checkpoint is not None and "train" in kinds):
        raise UsageError("a train stage stands after a model exists", "use finetune")
    order = list(STAGES)
    positions = [order.index(kind) for kind in kinds]
    if positions != sorted(set(positions)):
        raise UsageError(f"stages are out of order or twice: {', '.join(kinds)}", f"the order is {', '.join(order)}")
