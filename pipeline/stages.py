"""What each stage does: an artifact in, an artifact out."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from rprune.attacks.base import Attack
from rprune.attacks.noise import Stream
from rprune.data.loaders import Batch, Loader, loader
from rprune.errors import InputError, WorkError
from rprune.evaluation.accuracy import classes_of, predictions
from rprune.evaluation.robustness import chosen, robustness
from rprune.evaluation.target import Target
from rprune.export.compact import compact
from rprune.models.cost import count_macs, macs, parameters, positions
from rprune.models.flat import describe
from rprune.models.graph import trace
from rprune.models.prunable import prunable
from rprune.models.registry import Architecture, build
from rprune.objectives.base import OBJECTIVES, Objective
from rprune.objectives.distillation import Distilled
from rprune.pipeline.artifact import Artifact, Metadata, load_artifact
from rprune.pipeline.bench import Bench, check_fits
from rprune.pipeline.energy import Meter
from rprune.pipeline.environment import environment
from rprune.pipeline.forms import check_formats
from rprune.pipeline.recipe import (
    CertifyStage,
    ExportStage,
    FinetuneStage,
    PruneStage,
    QuantizeStage,
    Section,
    ShrinkStage,
    Spec,
    Trained,
    TrainStage,
)
from rprune.pruning.allocation import allocate, check_allocator
from rprune.pruning.base import METHODS, Context, Fixed, Pruner, check_costs
from rprune.pruning.budget import Budget
from rprune.pruning.masks import Masks, count
from rprune.reports.schema import LineageEntry
from rprune.seeds import derive
from rprune.training.loop import FitResult, Settings, check_optimizer, fit
from rprune.training.schedules import schedule
from rprune.training.soup import greedy_soup
from rprune.training.world import world


def adopt(
    state: dict[str, torch.Tensor], arch: Architecture, objective: Spec, bench: Bench, origin: Mapping[str, Any]
) -> Artifact:
    """A foreign state_dict as an artifact. Raises InputError when it does not fit the architecture or the data.

    ``origin``: what the lineage says of where it comes from.
    """
    artifact = Artifact(_metadata("import", arch, bench, _objective(objective, bench)), state)
    metrics = {"validation": _scores(bench, artifact.model(bench.device), None)}
    return _stamped(artifact, "import", dict(origin), None, 0.0, metrics)


QAT_EPOCHS = 20
AT_THE_END = 1 - 1e-9  # progress at which ramps of eps are over
DENSE = "dense"  # the teacher that is the model before pruning


def open_teacher(path: Path, bench: Bench, arch: str | None) -> Artifact:
    """A model file as a teacher. Raises InputError when it is not one of rprune's or does not fit the data."""
    teacher = load_artifact(path, arch)
    check_fits(teacher, bench.data)
    return teacher


def run_stage(
    bench: Bench,
    stage: Section,
    source: Artifact | None,
    arch: Architecture | None = None,
    state_file: Path | None = None,
    teacher: Artifact | None = None,
) -> Artifact:
    """Run a stage that leaves an artifact; ``arch`` is for training alone, ``source`` for all others.

    Its line of the lineage says what it drew, where that can be read. What a smoke run makes is marked.
    """
    resumed = state_file is not None and state_file.exists()
    with Meter(bench.device) as meter:
        made = _run_stage(bench, stage, source, arch, state_file, teacher)
    energy = meter.energy(world(), resumed=resumed)
    *before, entry = made.metadata.lineage
    lineage = [*before, entry.model_copy(update={"energy": energy})]
    return made.with_metadata(lineage=lineage, smoke=bench.smoke)


def _run_stage(
    bench: Bench,
    stage: Section,
    source: Artifact | None,
    arch: Architecture | None,
    state_file: Path | None,
    teacher: Artifact | None,
) -> Artifact:
    if isinstance(stage, TrainStage):
        assert arch is not None
        return train(bench, arch, stage, state_file)
    assert source is not None
    check_source(stage, source)
    if isinstance(stage, PruneStage):
        return prune(bench, source, stage, state_file)
    if isinstance(stage, FinetuneStage):
        return finetune(bench, source, stage, state_file, teacher)
    if isinstance(stage, ShrinkStage):
        return shrink(bench, source)
    assert isinstance(stage, QuantizeStage)
    from rprune.pipeline.quantizing import quantize  # builds on this file

    return quantize(bench, source, stage, state_file)


def train(bench: Bench, arch: Architecture, stage: TrainStage, state_file: Path | None = None) -> Artifact:
    """A dense robust model."""
    started = time.monotonic()
    objective = _objective(stage.objective, bench)
    torch.manual_seed(derive(bench.seed, "weights"))
    model = _placed(build(arch), bench, stage)
    found = _fit(bench, "train", model, Pruner(model), objective, stage, stage.epochs, state_file)
    artifact = Artifact(_metadata("train", arch, bench, objective), _state(model))
    return _finished(artifact, bench, stage, model, objective, found, started, None)


def prune(bench: Bench, source: Artifact, stage: PruneStage, state_file: Path | None = None) -> Artifact:
    """Exactly the budget's weights kept, by any registered method."""
    started = time.monotonic()
    objective = _objective(stage.objective or recorded_objective(source, bench), bench)
    model = _placed(source.model(), bench, stage)
    method = METHODS.build(stage.method)
    budget = budget_of(stage, model, bench.data.shape)
    alive = {name: int(w.count_nonzero()) for name, w in prunable(model).items()}
    if budget.spent(alive) < budget.kept and not budget.met(alive):
        unit = "non-zero weights" if stage.macs is None else "MACs"
        raise InputError(
            f"the model has {budget.spent(alive)} {unit} left, the budget is {budget.kept}",
            "it is pruned already; ask for a smaller budget, or start from the dense model",
        )
    epochs = epochs_of(stage)
    lr = method.lr if stage.lr is None else stage.lr
    stage = stage.model_copy(update={"lr": lr})
    train_data = bench.training(stage.data_fraction)
    context = Context(
        epochs=epochs,
        steps_per_epoch=math.ceil(len(train_data) / stage.batch_size),
        seed=bench.seed,
        lr=lr,
        threat=bench.threat,
        input_shape=bench.data.shape,
        batches=lambda: train_data.shuffled(stage.batch_size, _generator(bench.seed, "score"), "none"),
        loss=lambda net, batch: _first_loss(objective, net, batch, bench),
    )
    before = {name: weight.detach().clone() for name, weight in prunable(model).items()}
    pruner = method.bind(model, budget, context)
    found = _fit(bench, "prune", model, pruner, objective, stage, epochs, state_file, train_data)
    masks = pruner.finish()
    kept, total = count(masks), sum(budget.sizes.values())
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    if pruner.exact and not budget.met(counts):
        spent = budget.spent(counts)
        raise WorkError(f"{METHODS.name_of(method)} kept {spent}, the budget is {budget.kept}", "report this")
    sparsity = 1 - kept / total if stage.sparsity is None else stage.sparsity
    metadata = _metadata("prune", source.metadata.arch, bench, objective).model_copy(
        update={"sparsity": sparsity, "budget": kept, "dense_total": source.metadata.dense_total}
    )
    artifact = Artifact(metadata, _state(model), {name: mask.cpu() for name, mask in masks.items()})
    resolved = stage.model_copy(update={"method": METHODS.describe(method), "epochs": epochs})
    extra = {"kept": kept, "total": total, "search": pruner.log()} | profile(before, masks, budget)
    if found.history:
        extra["target_met"] = found.selected_epoch is not None  # else the search was off the budget in every epoch
    return _finished(artifact, bench, resolved, model, objective, found, started, source, extra)


def budget_of(stage: PruneStage, model: nn.Module, shape: tuple[int, int, int]) -> Budget:
    """Of weights, or of multiply-accumulates. Raises UsageError for one that cannot be met or that no method keeps."""
    sizes = {name: w.numel() for name, w in prunable(model).items()}
    if stage.macs is None:
        assert stage.sparsity is not None
        return Budget.of(sizes, stage.sparsity, stage.floor, stage.include, stage.exclude)
    check_costs(METHODS.build(stage.method))
    saved = 1 - Fraction(str(stage.macs))
    return Budget.of(sizes, saved, stage.floor, stage.include, stage.exclude, positions(model, shape))


def profile(before: Mapping[str, torch.Tensor], masks: Masks, budget: Budget) -> dict[str, Any]:
    """What plots show: kept weights of each layer beside the fixed allocations, and which magnitudes were kept."""
    allocations = {name: allocate(name, before, budget) for name in ("uniform", "erk", "lamp")}
    values = torch.cat([weight.flatten() for weight in before.values()]).cpu()
    inside = torch.cat([masks[name].flatten() for name in before]).cpu()
    reach = float(values.abs().max().clamp_min(1e-12))
    counts = [torch.histc(values[part], 41, -reach, reach).int().tolist() for part in (inside, ~inside)]
    return {
        "kept_by_layer": {name: int(mask.sum()) for name, mask in masks.items()},
        "allocations": allocations,
        "histogram": {
            "edges": [round(edge, 6) for edge in torch.linspace(-reach, reach, 42).tolist()],
            "kept": counts[0],
            "pruned": counts[1],
        },
    }


def finetune(
    bench: Bench,
    source: Artifact,
    stage: FinetuneStage,
    state_file: Path | None = None,
    teacher: Artifact | None = None,
) -> Artifact:
    """Training with the mask held, by a teacher where there is one; several of them make a soup.

    The history is that of the soup's best part.
    """
    started = time.monotonic()
    objective = _objective(stage.objective or recorded_objective(source, bench), bench)
    masks = {name: mask.to(bench.device) for name, mask in source.masks.items()}
    taught = objective
    if teacher is not None:
        network = teacher.model(bench.device).requires_grad_(False)
        taught = Distilled(inner=objective, teacher=network, weight=stage.teacher_weight, temperature=stage.temperature)
    found, states = [], []
    for part in range(1, stage.soup + 1):
        model = _placed(source.model(), bench, stage)
        name, file = ("finetune", state_file) if part == 1 else (f"finetune {part}", _part_of(state_file, part))
        found.append(_fit(bench, name, model, Fixed(model, masks), taught, stage, stage.epochs, file))
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    def score(state: dict[str, torch.Tensor]) -> float:
        model.load_state_dict(state)
        return _scores(bench, model, objective.attack_used)["score"]

    scores = [fit.score or 0.0 for fit in found]
    mean, taken, _ = greedy_soup(states, scores, score)
    model.load_state_dict(mean)
    extra = {"soup": {"scores": scores, "taken": [i + 1 for i in taken]}} if stage.soup > 1 else {}
    kept = {key: getattr(source.metadata, key) for key in ("sparsity", "budget", "dense_total")}
    metadata = _metadata("finetune", source.metadata.arch, bench, objective).model_copy(update=kept)
    artifact = Artifact(metadata, _state(model), source.masks)
    return _finished(artifact, bench, stage, model, objective, found[taken[0]], started, source, extra)


def _part_of(state_file: Path | None, part: int) -> Path | None:
    """Where a further training of the same stage keeps its state."""
    return None if state_file is None else state_file.with_name(f"{part}.{state_file.name}")


def shrink(bench: Bench, source: Artifact) -> Artifact:
    """The same function as a smaller network of plain layers. Raises InputError for one that cannot be traced."""
    started = time.monotonic()
    model, shape = source.model(), source.metadata.arch.input_shape
    network = compact(model, shape)
    weights = prunable(network)
    dense = source.metadata.dense_total or sum(weight.numel() for weight in prunable(model).values())
    artifact = as_flat(source, network, stage="shrink", dense_total=dense)
    metrics: dict[str, Any] = {
        "kept": sum(int(weight.count_nonzero()) for weight in weights.values()),
        "total": sum(weight.numel() for weight in weights.values()),
        "macs": {"before": macs(trace(model, shape))} | count_macs(network, shape),
        "parameters": {"before": parameters(model), "after": parameters(network)},
        "validation": _scores(
            bench, artifact.model(bench.device), _objective(source.metadata.objective, bench).attack_used
        ),
    }
    return _stamped(artifact, "shrink", {"kind": "shrink"}, source, time.monotonic() - started, metrics)


def as_flat(source: Artifact, network: fx.GraphModule, **changes: Any) -> Artifact:
    """The artifact of a traced network that computes what ``source`` does, as architecture ``flat``.

    Masks are where its weights are not zero. ``changes``: of the metadata, beside architecture and budget.
    """
    old = source.metadata.arch
    arch = Architecture("flat", old.num_classes, old.input_shape, {"layers": describe(network)})
    masks = {name: weight != 0 for name, weight in prunable(network).items()} if source.masks else {}
    changes |= {"architecture": arch.to_dict(), "budget": count(masks) if masks else None}
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return Artifact(source.metadata.model_copy(update=changes), state, masks)


def compacted(bench: Bench, source: Artifact) -> Artifact:
    """The shrunk artifact where there are channels to remove; else, and with integers, which a network has, itself."""
    if source.quantization:
        return source
    model, shape = source.model(), source.metadata.arch.input_shape
    try:
        removable = parameters(compact(model, shape)) < parameters(trace(model, shape))
    except InputError:  # it cannot be traced, and ships as it is
        return source
    return shrink(bench, source) if removable else source


def recorded_objective(source: Artifact, bench: Bench) -> dict[str, Any]:
    """What a model file says it was trained with. Raises InputError when that is code which the user did not name."""
    spec = source.metadata.objective
    name = str(spec.get("name", ""))
    if ":" in name and name not in bench.typed:
        raise InputError(f"the model was trained with {name}, which is not built in", f"say so: --objective {name}")
    return spec


def _objective(spec: Spec | Mapping[str, Any], bench: Bench) -> Objective:
    return OBJECTIVES.build(spec, threat=bench.threat)


def _placed(model: nn.Module, bench: Bench, stage: Trained) -> nn.Module:
    """On its device, in the layout that kernels of its precision are fast in."""
    layout = torch.channels_last if stage.precision == "bf16" else torch.preserve_format
    return model.to(bench.device).to(memory_format=layout)


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in model.state_dict().items()}


def _metadata(stage: str, arch: Architecture, bench: Bench, objective: Objective) -> Metadata:
    return Metadata(
        stage=stage,
        architecture=arch.to_dict(),
        data=bench.record(),
        norm=bench.threat.norm,
        eps=bench.threat.text,
        objective=OBJECTIVES.describe(objective),
        seed=bench.seed,
        environment=environment(str(bench.device)),
    )


def _fit(
    bench: Bench,
    name: str,
    model: nn.Module,
    pruner: Pruner,
    objective: Objective,
    stage: Trained,
    epochs: int,
    state_file: Path | None,
    data: Loader | None = None,
) -> FitResult:
    shared = {field: getattr(stage, field) for field in Trained.model_fields}
    settings = Settings(epochs=epochs, lr=stage.lr, **shared)  # type: ignore[attr-defined]  # every concrete one has it
    found = fit(
        model,
        pruner,
        objective,
        data or bench.training(),
        settings,
        augment=bench.data.augment,
        validate=lambda net: _scores(bench, net, objective.attack_used),
        seed=derive(bench.seed, name),
        on_epoch=lambda log: bench.reporter.epoch(f"{name} smoke" if bench.smoke else name, log),
        state_file=state_file,
    )
    model.eval()
    return found


def _generator(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, purpose))


def _first_loss(objective: Objective, net: nn.Module, batch: Batch, bench: Bench) -> torch.Tensor:
    """The objective's first loss at a batch, with noise that depends on the batch alone."""
    noise = Stream(torch.Generator(batch.x.device).manual_seed(derive(bench.seed, "score", int(batch.ids[0]))))
    return next(iter(objective(net, batch.x, batch.y, AT_THE_END, noise)))().value


def _scores(bench: Bench, net: nn.Module, attack: Attack | None) -> dict[str, float]:
    """Validation accuracy, clean and under an attack; the latter is the score where there is one."""
    was_training = net.training
    net.eval()
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    data = bench.loader("validation") if device == bench.device else loader(bench.data.validation, device)
    here = world()
    ids = chosen(len(data), None, (here.rank, here.size))  # every process takes its part
    counts = torch.zeros(2, dtype=torch.int64)
    if len(ids) and attack is None:
        counts[:] = predictions(classes_of(net), data, ids=ids).correct
    elif len(ids) and attack is not None:
        result = robustness(Target(net, net), data, bench.threat, (attack,), seed=bench.seed, ids=ids, grid=False)
        counts[:] = torch.tensor([result.clean.correct, result.correct])
    here.sum_([counts])
    clean, robust = (int(count) / len(data) for count in counts)
    net.train(was_training)
    if attack is None:
        return {"validation_accuracy": clean, "score": clean}
    return {"validation_accuracy": clean, "validation_robust": robust, "score": robust}


def _finished(
    artifact: Artifact,
    bench: Bench,
    stage: Section,
    model: nn.Module,
    objective: Objective,
    found: FitResult,
    started: float,
    source: Artifact | None,
    extra: Mapping[str, Any] | None = None,
) -> Artifact:
    metrics: dict[str, Any] = {"selected_epoch": found.selected_epoch} if found.selected_epoch else {}
    metrics |= dict(extra or {})
    if artifact.masks:
        metrics["macs"] = count_macs(model, artifact.metadata.arch.input_shape)
    metrics["validation"] = _scores(bench, model, objective.attack_used)
    config = stage.model_dump(mode="json") | {"objective": OBJECTIVES.describe(objective)}
    history = [{"epoch": float(log.epoch)} | log.values for log in found.history]
    seconds = time.monotonic() - started
    kind = str(config["kind"])
    return _stamped(artifact, kind, config, source, seconds, metrics, history)


def _stamped(
    artifact: Artifact,
    stage: str,
    config: dict[str, Any],
    source: Artifact | None,
    seconds: float,
    metrics: dict[str, Any],
    history: list[dict[str, float]] | None = None,
) -> Artifact:
    """The artifact with its own line added to the lineage of its source."""
    entry = LineageEntry(
        stage=stage,
        config=config,
        parent=None if source is None else source.digest,
        output=artifact.digest,
        seconds=round(seconds, 3),
        metrics=metrics,
        history=history or [],
    )
    before = [] if source is None else source.metadata.lineage
    return artifact.with_metadata(lineage=[*before, entry])


def epochs_of(stage: Section) -> int:
    """How many a stage trains for; 0 where it does not train."""
    if isinstance(stage, TrainStage | FinetuneStage):
        return stage.epochs
    if isinstance(stage, PruneStage):
        return METHODS.build(stage.method).epochs if stage.epochs is None else stage.epochs
    if isinstance(stage, QuantizeStage) and stage.mode == "qat":
        return stage.epochs or QAT_EPOCHS
    return 0


def check_source(stage: Section, source: Artifact) -> None:
    """Raises InputError where a stage would change the weights of a quantized model, and so lose its integers."""
    if source.quantization and isinstance(stage, PruneStage | FinetuneStage | ShrinkStage):
        raise InputError("the model is quantized already", f"{stage.kind} the model that it was quantized from")


def check_stage(stage: Section, bench: Bench, arch: Architecture | None, source: Artifact | None = None) -> None:
    """Raises for a misspelt name, an architecture that cannot be built, a budget that cannot be met, a model that the
    stage does not take; runs nothing. ``source``: the model that the work starts from.
    """
    if source is not None:
        check_source(stage, source)
    if arch is not None and isinstance(stage, TrainStage):
        with torch.device("meta"):
            build(arch)
    objective: Any = getattr(stage, "objective", None)
    if objective is not None:
        _objective(objective, bench)
    if isinstance(stage, Trained):
        schedule(stage.schedule)
        check_optimizer(stage.optimizer)
    if isinstance(stage, PruneStage):
        allocation = getattr(METHODS.build(stage.method), "allocation", None)
        if isinstance(allocation, str):
            check_allocator(allocation)
        assert arch is not None
        with torch.device("meta" if stage.macs is None else "cpu"):
            budget_of(stage, build(arch), bench.data.shape)
    if isinstance(stage, ExportStage):
        check_formats(stage.formats)
        bench.suite(stage.suite)
    if arch is not None and (
        isinstance(stage, QuantizeStage | ShrinkStage)
        or (isinstance(stage, CertifyStage) and set(stage.methods) > {"smoothing"})
    ):
        trace(build(arch), bench.data.shape)
