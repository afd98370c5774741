"""The integrity report ``rprune.report/1``: what was made, how, and what is claimed of it, with the counts behind it.

Accuracies are fractions with their counts beside them; eps stands as it was written and as a float. An absent optional
field means that nothing is claimed. A field younger than the first reports is not written at its default, so that the
ids of reports without it still hold.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import BaseModel, ConfigDict

from rprune.errors import InputError, UsageError
from rprune.evaluation.statistics import clopper_pearson
from rprune.files import digest_of, read_json
from rprune.registry import first_problem
from rprune.threat import ThreatModel

SCHEMA = "rprune.report/1"
Role = Literal[
    "onnx-int8", "onnx", "onnx-compact", "packed", "c", "c-header", "weights", "masks", "evidence", "program"
]  # fmt: skip
KINDS = {
    "clean_accuracy": "accuracy",
    "robust_accuracy": "empirical-upper-bound",
    "certified_accuracy": "certified-lower-bound",
    "smoothed_certified_accuracy": "certified-probabilistic",
}
"""What each metric can be: an attack's number that calls itself a proof would need no health."""
Count = Annotated[int, pydantic.Field(ge=0)]
Distance = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Joules = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    # fields that are not written at their default
    YOUNGER: ClassVar[frozenset[str]] = frozenset()

    @pydantic.model_serializer(mode="wrap")
    def _write(self, write: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, write(self), self.YOUNGER)


def without_defaults(model: BaseModel, table: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """The dumped ``table`` of a model without those of ``names`` that are at their default."""
    kept = {name for name in names if getattr(model, name) != type(model).model_fields[name].default}
    return {name: value for name, value in table.items() if name not in names or name in kept}


class Subject(Part):
    """A file of the bundle."""

    name: str
    """Path below the bundle's folder."""
    role: Role
    """What the file is; ``c`` and ``c-header`` are source code."""
    sha256: str
    """Of its bytes."""
    bytes: int
    """Its size."""


class Interval(Part):
    """A two-sided confidence interval of a share."""

    method: Literal["clopper-pearson"] = "clopper-pearson"
    """Exact binomial."""
    level: float = pydantic.Field(default=0.95, gt=0, lt=1)
    """Coverage."""
    lower: float
    """Lower end, in [0, 1]."""
    upper: float
    """Upper end, in [0, 1]."""

    @classmethod
    def of(cls, correct: int, n: int, level: float = 0.95) -> Interval:
        lower, upper = clopper_pearson(correct, n, level)
        return cls(level=level, lower=lower, upper=upper)


class Threat(Part):
    """What an adversary may do to an image."""

    norm: Literal["linf", "l2"]
    """Norm of the perturbation."""
    eps: str
    """Its largest size, as the user wrote it."""
    eps_float: float
    """The same as a number."""
    space: Literal["[0,1] pixels"] = "[0,1] pixels"
    """What eps is measured in; perturbed pixels stay in it."""

    @classmethod
    def of(cls, threat: ThreatModel) -> Threat:
        return cls(norm=threat.norm, eps=threat.text, eps_float=threat.eps)

    def model(self) -> ThreatModel:
        return ThreatModel(self.norm, self.eps)

    @pydantic.model_validator(mode="after")
    def _is_one(self) -> Threat:
        """Checks compute with the number, people read the text."""
        try:
            same = self.model().eps == self.eps_float
        except UsageError as error:
            raise ValueError(error.message) from None
        if not same:
            raise ValueError(f"eps {self.eps} is not {self.eps_float}")
        return self

    def covers(self, other: Threat) -> bool:
        """What is proved under this threat holds under the other."""
        return self.norm == other.norm and self.eps_float >= other.eps_float


class Point(Part):
    """One point of a curve: certified or robust accuracy at another eps or radius."""

    at: float
    """eps or radius, in [0,1] pixels."""
    correct: int
    """Samples that are right, or proved, there."""
    value: float
    """The same over ``n`` of the claim."""


class HealthCheck(Part):
    """One sign that an attack was weak. ``value`` None: it did not apply, and ``detail`` says why."""

    id: str = pydantic.Field(pattern=r"^R([1-9]|1[0-5])$")
    """R1 to R15, of ``evaluation.health``."""
    name: str
    """What a failure means."""
    value: pydantic.FiniteFloat | None = None
    """What was measured."""
    limit: pydantic.FiniteFloat
    """The largest value that passes."""
    passed: bool
    """Whether the value is at most the limit, or there is none."""
    detail: str
    """The counts behind it."""

    @classmethod
    def of(cls, id: str, name: str, value: float | None, limit: float, detail: str = "") -> HealthCheck:
        return cls(id=id, name=name, value=value, limit=limit, passed=value is None or value <= limit, detail=detail)

    @pydantic.model_validator(mode="after")
    def _follows(self) -> HealthCheck:
        if self.passed != (self.value is None or self.value <= self.limit):
            raise ValueError(f"{self.id}: passed={self.passed} at {self.value} of at most {self.limit}")
        return self


class Health(Part):
    """Whether the attack behind a claim can be trusted to have been strong: every check passed."""

    status: Literal["ok", "failed"]
    """Follows from the checks."""
    checks: list[HealthCheck]
    """Each at most once."""

    @classmethod
    def of(cls, checks: list[HealthCheck]) -> Health:
        return cls(status="ok" if all(check.passed for check in checks) else "failed", checks=checks)

    @pydantic.model_validator(mode="after")
    def _follows(self) -> Health:
        if len({check.id for check in self.checks}) < len(self.checks):
            raise ValueError("a health check is there twice")
        if (self.status == "ok") != (not self.failed):
            raise ValueError(f"health is {self.status}, and {len(self.failed)} checks failed")
        return self

    @property
    def failed(self) -> list[HealthCheck]:
        return [check for check in self.checks if not check.passed]


class AttackRow(Part):
    """One attack of a suite, run on the samples that the attacks before it left."""

    name: str
    """Its name in the suite."""
    kind: Literal["white-box", "black-box", "transfer"]
    """Uses gradients of the search net, queries of the file, or points found on a parent."""
    tried: Count
    """Samples that were attacked; 0: it did not run."""
    broken: Count
    """Samples that fell, by the file's own verdict."""
    misses: Count
    """Points that fool the search net only."""
    invalid: Count = 0
    """Points at which the file has no finite logits: no success."""
    queries: Count
    """Forward passes."""


class Claim(Part):
    """One machine-checkable statement about one file.

    The curve of a robust accuracy goes from eps 0 to a huge one, the claim's own among them.
    """

    YOUNGER = frozenset({"health", "attacks", "distances", "complete"})

    id: str
    """``metric@artifact``."""
    artifact: Role
    """Role of the file that it speaks of."""
    sha256: str
    """Digest of that file."""
    kind: Literal["accuracy", "empirical-upper-bound", "certified-lower-bound", "certified-probabilistic"]
    """Measured; at most this (attack); at least this (proof); at least this, likely (smoothing)."""
    metric: Literal["clean_accuracy", "robust_accuracy", "certified_accuracy", "smoothed_certified_accuracy"]
    """What is counted."""
    correct: int = pydantic.Field(ge=0)
    """Samples for which it holds."""
    n: int = pydantic.Field(ge=1)
    """Samples that were looked at, the first ones of the test split."""
    value: float
    """``correct`` over ``n``."""
    interval: Interval
    """Of ``value``, over the draw of the samples."""
    threat: Threat | None = None
    """Under which it holds; none for clean accuracy."""
    method: str = ""
    """Runtime, suite or bound."""
    settings: dict[str, Any] = {}
    """Seeds, budgets and counts of the method."""
    sound_for: str = ""
    """What exactly the number holds for."""
    curve: list[Point] = []
    """The same at other eps or radii."""
    health: Health | None = None
    """Checks of the attack itself; absent: not examined."""
    attacks: list[AttackRow] = []
    """A row for each attack of the suite, in order."""
    distances: list[Distance | None] = []
    """Smallest perturbations found for the first samples that are right, in [0,1] pixels; null: none was found."""
    complete: bool = True
    """False: the attacks ended early, or those that need gradients found none."""

    @property
    def reliable(self) -> bool:
        """Not an attack's number, or one whose health was checked and found in order."""
        return self.kind != "empirical-upper-bound" if self.health is None else self.health.status == "ok"

    @pydantic.model_validator(mode="after")
    def _counts_fit(self) -> Claim:
        if self.correct > self.n:
            raise ValueError(f"{self.id}: {self.correct} correct of {self.n}")
        return self

    @pydantic.model_validator(mode="after")
    def _says_what_it_is(self) -> Claim:
        if self.id != f"{self.metric}@{self.artifact}":
            raise ValueError(f"{self.id} claims {self.metric} of {self.artifact}")
        if self.kind != KINDS[self.metric]:
            raise ValueError(f"{self.id} is no {self.kind}")
        if (self.threat is None) != (self.metric == "clean_accuracy"):
            raise ValueError(f"{self.id} has {'no' if self.threat is None else 'a'} threat")
        return self


class Layer(Part):
    """The weights of a conv or linear layer."""

    name: str
    """Name of the tensor."""
    shape: list[int]
    """Its shape."""
    nonzero: int
    """Weights that are not zero."""
    sparsity: float
    """Share of zeros."""


class Sparsity(Part):
    """Counted in the file, not taken from a mask."""

    definition: str = "zeros / weights of conv and linear layers; biases and norms excluded"
    """What is counted."""
    target: float | None = None
    """What was asked for."""
    budget: int | None = None
    """Weights that may stay."""
    kept: int
    """Weights that are not zero."""
    total: int
    """Weights in the file."""
    dense_total: int | None = None
    """Weights before channels were removed; absent: none were."""
    overall: float
    """Share of zeros, of ``dense_total`` where there is one."""
    measured_on: Role
    """Role of the file."""
    float_nonzero: int
    """The count of ``kept`` in model.onnx."""
    int8_zeros_equal_float_zeros: bool | None = None
    """Whether both files have the same zeros, weight by weight."""
    by_layer: list[Layer]
    """In the order of the network."""


class Integers(Part):
    """What the integers of the int8 file guarantee, whatever the image."""

    bits: int
    """Of weights and activations."""
    largest: dict[str, Count]
    """By layer, the largest of (2^b - 1) sum abs(w) + abs(bias) over its filters, with 255 in 8 bits."""
    exact: bool
    """All of these are below 2^24: float32 computes every sum exactly, in any order."""
    saturating_pairs: Count
    """Neighbouring weights whose products x86 CPUs without VNNI may add up beyond 16 bits."""


class Bound(Part):
    """Bytes below which no coding of independent weights goes: of where they are, and of what they are."""

    mask: float
    """For where they are."""
    values: float
    """For what they are."""


class Footprint(Part):
    """What the main ONNX file's network takes, beside the dense one that it was made from."""

    kept: Count
    """Weights that are not zero."""
    total: Count
    """Weights."""
    side: dict[str, Count]
    """Numbers beside the weights, by kind."""
    dense_weights: Count
    """Weights of the dense network."""
    dense_parameters: Count
    """All its parameters."""
    dense_bytes: Count
    """The same in float32."""
    density: float
    """``kept`` and ``side`` over ``dense_parameters``."""
    bound: Bound
    """The least that these weights take."""
    sparse_macs: Count
    """Multiply-accumulates for an image, without those by zero."""
    dense_macs: Count
    """Multiply-accumulates of the dense network."""
    ratios: dict[str, float]
    """By file, ``dense_bytes`` over its size."""


class Latency(Part):
    """Time of a call on the machine of ``environment``."""

    file: str
    """Name of the file."""
    runtime: str
    """What ran it."""
    batch: int
    """Images a call."""
    threads: int
    """Threads."""
    calls: int
    """Calls that were timed."""
    p50: float
    """Median, in ms."""
    p95: float
    """95th percentile, in ms."""
    ratio: float | None = None
    """Times as fast as ONNX Runtime on model.onnx."""


class Fidelity(Part):
    """A file compared with what it was made from."""

    source: str
    """What it was made from."""
    file: str
    """Name of the file."""
    n: int
    """Inputs that both were given."""
    top1_agreement: float
    """Share of them with the same label."""
    max_abs_logit_diff: float
    """Largest difference of a logit."""
    bit_equal: bool
    """Whether all logits are the same bits."""


class Energy(Part):
    """What the counters of devices told of a stage; ``pipeline.energy`` says which. Whole devices, whoever used them.

    Of the processes that finished the stage, as the ``seconds`` of its entry are; where it was ``resumed``,
    interrupted ones drew more.
    """

    seconds: float = pydantic.Field(ge=0)
    """That the counters were read over."""
    gpus: Count = 0
    """GPUs of all processes."""
    gpu_joules: Joules = 0.0
    """What they drew."""
    cpus: Count = 0
    """CPU packages."""
    cpu_joules: Joules = 0.0
    """What they drew."""
    resumed: bool = False
    """The stage was interrupted, so more was drawn."""

    @property
    def joules(self) -> float:
        return self.gpu_joules + self.cpu_joules


class LineageEntry(Part):
    """A stage that the model went through."""

    stage: str
    """Its kind: train, prune, finetune, ..."""
    config: dict[str, Any]
    """Its settings, resolved."""
    parent: str | None = None
    """Digest of the tensors that went in."""
    output: str
    """Digest of the tensors that came out."""
    seconds: float
    """How long it took."""
    metrics: dict[str, Any] = {}
    """What it counted, on the validation split."""
    history: list[dict[str, float]] = []
    """A table an epoch: loss, score, ..."""
    energy: Energy | None = None
    """What it drew; absent: no counter could be read."""

    YOUNGER = frozenset({"energy"})


class DataUsed(Part):
    """The data set, by digests of pixels and labels."""

    source: str
    """As ``--data`` takes it."""
    split: Literal["test"] = "test"
    """The split that claims are counted on."""
    limit: int | None = None
    """Samples of each split, at most; they are drawn from the source once and for all."""
    classes: list[str]
    """Their names, in the order of the logits."""
    samples: int
    """In the test split."""
    sha256: str
    """Of the test split."""
    train_sha256: str
    """Of the training split."""
    validation_sha256: str
    """Of the validation split, held out of the training data."""
    validation_samples: int
    """In the validation split."""
    selection: str = "checkpoints are selected on the validation split, never on the test split"
    """How checkpoints were chosen."""

    YOUNGER = frozenset({"limit"})


class Evidence(Part):
    """Files that let others check the claims.

    Witnesses are points that the file misclassifies, each sample's in one of two pairs of tensors: ``index`` and ``x``
    (uint8, on the grid of 8-bit pixels), ``float_index`` and ``float_x`` (float32, where the grid has none).
    """

    samples: str = "evidence/samples.csv"
    """File with a row a sample."""
    witnesses: str = "evidence/adversarial.safetensors"
    """File with the witnesses."""
    witness_count: int
    """How many there are."""


class Rule(Part):
    """A rule of the policy, and what came of it."""

    metric: str
    """A metric of a claim, or sparsity, kept, bytes, macs, latency (ms), attack_health."""
    artifact: str
    """Role of the file."""
    op: str
    """``>=``, ``<=`` or ``==``."""
    threshold: float | str
    """What is compared with."""
    bound: Literal["lower", "point"]
    """Whether the 95 % bound on the strict side is judged, or the value."""
    observed: float | str | None = None
    """What was judged; absent: the report does not claim it."""
    passed: bool
    """The outcome."""
    message: str
    """Why."""
    allow_unreliable: bool = False
    """Numbers of weak attacks, or of attacks cut short, count as well."""
    drop: bool = False
    """Judged is not the metric, but its drop against the baseline."""
    norm: str | None = None
    """Norm of the threat that the rule names."""
    eps: str | None = None
    """Its radius, as the policy has it."""

    YOUNGER = frozenset({"allow_unreliable", "drop", "norm", "eps"})


class PairedTest(Part):
    """A share compared with the baseline's, sample by sample."""

    metric: str
    """A metric of a claim."""
    artifact: str
    """Role of the file."""
    n: int
    """Samples of both."""
    delta: float
    """Below 0: the share dropped. ``(c - b) / n``."""
    lower: float
    """95 % interval of ``delta``."""
    upper: float
    """Its other end."""
    test: Literal["mcnemar-exact"] = "mcnemar-exact"
    """The test."""
    b: Count
    """Samples that count in the baseline alone."""
    c: Count
    """Samples that count in this report alone."""
    p: float
    """Its two-sided p-value."""


class Baseline(Part):
    """The report that drops were judged against."""

    report: str
    """Its id."""
    tests: list[PairedTest]
    """One for each claim that could be paired."""


class Gate(Part):
    """The report held against a policy."""

    policy_sha256: str
    """Digest of the policy's canonical JSON."""
    result: Literal["passed", "failed"]
    """Passed when all rules are."""
    rules: list[Rule]
    """In the order of the policy."""
    baseline: Baseline | None = None
    """Absent: no rule compares with one."""

    YOUNGER = frozenset({"baseline"})


class Report(Part):
    """The whole document."""

    schema_: Literal["rprune.report/1"] = pydantic.Field(default="rprune.report/1", alias="schema")
    """Another one is refused."""
    id: str = ""
    """sha256 of the canonical JSON of all else."""
    created: str
    """Time of the export, UTC."""
    name: str
    """Of the run or model."""
    smoke: bool = False
    """Made to see whether the chain works: the numbers mean nothing, and no gate accepts them."""
    tool: dict[str, str]
    """Name, version and digest of the source of what made it."""
    subjects: list[Subject]
    """Every file of the bundle."""
    model: dict[str, Any]
    """Architecture, input, labels, number of parameters, digest of the tensors."""
    data: DataUsed
    """What it was trained and judged on."""
    threat: Threat
    """The threat that the run was for."""
    recipe: dict[str, Any]
    """What was asked for, resolved."""
    recipe_sha256: str
    """Digest of its canonical JSON."""
    policy_sha256: str | None = None
    """The policy, fixed before the first stage."""
    lineage: list[LineageEntry]
    """Every stage, in order; each one's parent is the output of the one before."""
    sparsity: Sparsity
    """Zeros, by layer."""
    integers: Integers | None = None
    """Of the int8 file."""
    footprint: Footprint | None = None
    """Sizes and multiply-accumulates against the dense network's."""
    size: dict[str, int]
    """Bytes by file, and of the dense float32 weights."""
    speed: list[Latency] = []
    """Measured where it was asked for."""
    fidelity: list[Fidelity]
    """Each file against its source."""
    claims: list[Claim]
    """What is said of accuracy and robustness."""
    evidence: Evidence
    """Where the witnesses lie."""
    gate: Gate | None = None
    """Absent: the report was not held against a policy."""
    environment: dict[str, Any]
    """Python, packages, operating system, CPU and device."""
    warnings: list[str] = []
    """What is wrong with this model, against limitations, which hold for every one."""
    limitations: list[str]
    """What the numbers do not say."""
    assurance: Literal["self_attested"] = "self_attested"
    """Whose word it is: the maker's."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @pydantic.model_validator(mode="after")
    def _has_one_meaning(self) -> Report:
        """Nothing is there twice: the one would be checked, and the other be read."""
        names = [f"file {subject.name}" for subject in self.subjects]
        names += [f"a file of role {subject.role}" for subject in self.subjects if subject.role != "evidence"]
        names += [f"claim {claim.id}" for claim in self.claims]
        for name, count in Counter(names).most_common(1):
            if count > 1:
                raise ValueError(f"{name} is there twice")
        return self

    def to_json(self) -> dict[str, Any]:
        table = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return without_defaults(self, table, frozenset({"speed", "smoke"}))

    def computed_id(self) -> str:
        return digest_of(self.to_json() | {"id": ""})

    def intact(self) -> bool:
        """Whether the id is that of the content."""
        try:
            return self.id == self.computed_id()
        except ValueError:  # what no canonical JSON holds: NaN, half a character
            return False

    def sealed(self) -> Report:
        """The report with its own digest filled in."""
        return self.model_copy(update={"id": self.computed_id()})

    def claim(self, metric: str, artifact: str = "onnx-int8") -> Claim | None:
        """The claim of a metric for a file role, if there is one."""
        return next((c for c in self.claims if c.metric == metric and c.artifact == artifact), None)

    def subject(self, role: str) -> Subject | None:
        return next((s for s in self.subjects if s.role == role), None)


def read_report(path: Path) -> Report:
    """The report of a file, or of ``report.json`` in a folder. Raises InputError when it is not one."""
    path = path / "report.json" if path.is_dir() else path
    table = read_json(path, "report")
    schema = table.get("schema") if isinstance(table, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{path} has schema {schema!r}", f"this version reads {SCHEMA}")
    try:
        return Report.model_validate(table)
    except pydantic.ValidationError as error:
        raise InputError(
            f"{path} is not a valid report: {first_problem(error)}", "make it again with 'rprune export'"
        ) from None
