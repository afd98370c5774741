"""The integrity report ``rprune.report/1``: what was made, how, and what is claimed of it, with the counts behind it.

Accuracies are fractions with their counts beside them; eps stands as it was written and as a float. An absent optional
field means that nothing is claimed. A field younger than the first reports is not written at its default, so that the
ids of reports without it still hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import BaseModel, ConfigDict

from rprune.errors import InputError
from rprune.evaluation.statistics import clopper_pearson
from rprune.files import digest_of, read_json
from rprune.registry import first_problem
from rprune.threat import ThreatModel

SCHEMA = "rprune.report/1"
Role = Literal[
    "onnx-int8", "onnx", "onnx-compact", "packed", "c", "c-header", "weights", "masks", "evidence"
]  # fmt: skip
Count = Annotated[int, pydantic.Field(ge=0)]
Distance = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Joules = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    YOUNGER: ClassVar[frozenset[str]] = frozenset()  # fields that are not written at their default

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
    role: Role
    sha256: str
    bytes: int


class Interval(Part):
    method: Literal["clopper-pearson"] = "clopper-pearson"
    level: float = pydantic.Field(default=0.95, gt=0, lt=1)
    lower: float
    upper: float

    @classmethod
    def of(cls, correct: int, n: int, level: float = 0.95) -> Interval:
        lower, upper = clopper_pearson(correct, n, level)
        return cls(level=level, lower=lower, upper=upper)


class Threat(Part):
    norm: Literal["linf", "l2"]
    eps: str  # as the user wrote it
    eps_float: float
    space: Literal["[0,1] pixels"] = "[0,1] pixels"

    @classmethod
    def of(cls, threat: ThreatModel) -> Threat:
        return cls(norm=threat.norm, eps=threat.text, eps_float=threat.eps)

    def model(self) -> ThreatModel:
        return ThreatModel(self.norm, self.eps)

    def covers(self, other: Threat) -> bool:
        """What is proved under this threat holds under the other."""
        return self.norm == other.norm and self.eps_float >= other.eps_float


class Point(Part):
    """One point of a curve: certified or robust accuracy at another eps or radius."""

    at: float
    correct: int
    value: float


class HealthCheck(Part):
    """One sign that an attack was weak. ``value`` None: it did not apply, and ``detail`` says why."""

    id: str = pydantic.Field(pattern=r"^R([1-9]|1[0-5])$")
    name: str
    value: pydantic.FiniteFloat | None = None
    limit: pydantic.FiniteFloat
    passed: bool
    detail: str

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
    checks: list[HealthCheck]

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
    kind: Literal["white-box", "black-box", "transfer"]
    tried: Count
    broken: Count  # by the file's own verdict
    misses: Count  # fooled the search net only
    invalid: Count = 0  # points at which the file has no finite logits: no success
    queries: Count  # forward passes


class Claim(Part):
    """One machine-checkable statement about one file.

    For robust accuracy, ``curve`` is the security curve over eps (from 0 to a huge one, the claim's own among them),
    ``attacks`` has a row for each attack of the suite, in order, ``distances`` the smallest perturbation found for each
    of the first samples that are right, in the threat's norm (None: none was found), and ``complete`` is false when a
    time budget ended the attacks early, or attacks that need gradients found none.
    """

    YOUNGER = frozenset({"health", "attacks", "distances", "complete"})

    id: str
    artifact: Role
    sha256: str  # of that file
    kind: Literal["accuracy", "empirical-upper-bound", "certified-lower-bound", "certified-probabilistic"]
    metric: Literal["clean_accuracy", "robust_accuracy", "certified_accuracy", "smoothed_certified_accuracy"]
    correct: int = pydantic.Field(ge=0)
    n: int = pydantic.Field(ge=1)
    value: float
    interval: Interval
    threat: Threat | None = None
    method: str = ""  # suite or bound, in words
    settings: dict[str, Any] = {}
    sound_for: str = ""  # what exactly the number holds for
    curve: list[Point] = []
    health: Health | None = None  # None: not examined
    attacks: list[AttackRow] = []
    distances: list[Distance | None] = []
    complete: bool = True

    @property
    def reliable(self) -> bool:
        """Not an attack's number, or one whose health was checked and found in order."""
        return self.kind != "empirical-upper-bound" if self.health is None else self.health.status == "ok"

    @pydantic.model_validator(mode="after")
    def _counts_fit(self) -> Claim:
        if self.correct > self.n:
            raise ValueError(f"{self.id}: {self.correct} correct of {self.n}")
        return self


class Layer(Part):
    name: str
    shape: list[int]
    nonzero: int
    sparsity: float


class Sparsity(Part):
    definition: str = "zeros / weights of conv and linear layers; biases and norms excluded"
    target: float | None = None
    budget: int | None = None  # weights that may stay
    kept: int  # non-zero weights counted in the file
    total: int
    dense_total: int | None = None  # weights before physical shrinking; None: nothing was shrunk
    overall: float  # of dense_total, where there is one
    measured_on: Role
    float_nonzero: int  # the same count in model.onnx
    int8_zeros_equal_float_zeros: bool | None = None  # weight by weight, not only in number
    by_layer: list[Layer]


class Integers(Part):
    """What the integers of the int8 file guarantee, whatever the image.

    ``largest``: layer name -> the largest of (2^b - 1) sum |w| + |bias| over its filters, with 255 in 8 bits.
    ``exact``: all are below 2^24, so float32 computes every sum exactly, in any order. ``saturating_pairs``:
    neighbouring weights whose products x86 CPUs without VNNI may add up beyond 16 bits.
    """

    bits: int
    largest: dict[str, Count]
    exact: bool
    saturating_pairs: Count


class Bound(Part):
    """Bytes below which no coding of independent weights goes: of where they are, and of what they are."""

    mask: float
    values: float


class Footprint(Part):
    """What the main ONNX file's network takes; ``export.footprint.Footprint`` says what each number is."""

    kept: Count
    total: Count
    side: dict[str, Count]
    dense_weights: Count
    dense_parameters: Count
    dense_bytes: Count
    density: float
    bound: Bound
    sparse_macs: Count
    dense_macs: Count
    ratios: dict[str, float]


class Latency(Part):
    """Milliseconds a call on the machine of ``environment``; ``export.speed.Latency`` says what each number is."""

    file: str
    runtime: str
    batch: int
    threads: int
    calls: int
    p50: float
    p95: float
    ratio: float | None = None


class Fidelity(Part):
    """A file compared with what it was made from."""

    source: str
    file: str
    n: int
    top1_agreement: float
    max_abs_logit_diff: float
    bit_equal: bool


class Energy(Part):
    """What the counters of devices told of a stage; ``pipeline.energy`` says which. Whole devices, whoever used them.

    Of the processes that finished the stage, as the ``seconds`` of its entry are; where it was ``resumed``,
    interrupted ones drew more.
    """

    seconds: float = pydantic.Field(ge=0)  # that the counters were read over
    gpus: Count = 0  # of all processes
    gpu_joules: Joules = 0.0
    cpus: Count = 0  # packages
    cpu_joules: Joules = 0.0
    resumed: bool = False

    @property
    def joules(self) -> float:
        return self.gpu_joules + self.cpu_joules


class LineageEntry(Part):
    stage: str
    config: dict[str, Any]
    parent: str | None = None  # tensors digest of what went in
    output: str  # tensors digest of what came out
    seconds: float
    metrics: dict[str, Any] = {}
    history: list[dict[str, float]] = []  # one table an epoch: loss, score, ...
    energy: Energy | None = None  # None: no counter could be read

    YOUNGER = frozenset({"energy"})


class DataUsed(Part):
    source: str
    split: Literal["test"] = "test"
    limit: int | None = None  # samples of each split, at most; they are drawn from the source once and for all
    classes: list[str]
    samples: int  # in the test split
    sha256: str  # of the test split: pixels and labels
    train_sha256: str
    validation_sha256: str
    validation_samples: int
    selection: str = "checkpoints are selected on the validation split, never on the test split"

    YOUNGER = frozenset({"limit"})


class Evidence(Part):
    """Files that let others check the claims.

    Witnesses are points that the file misclassifies, each sample's in one of two pairs of tensors: ``index`` and ``x``
    (uint8, on the grid of 8-bit pixels), ``float_index`` and ``float_x`` (float32, where the grid has none).
    """

    samples: str = "evidence/samples.csv"
    witnesses: str = "evidence/adversarial.safetensors"
    witness_count: int


class Rule(Part):
    metric: str
    artifact: str
    op: str
    threshold: float
    bound: Literal["lower", "point"]
    observed: float | None = None
    passed: bool
    message: str
    allow_unreliable: bool = False

    YOUNGER = frozenset({"allow_unreliable"})


class Gate(Part):
    policy_sha256: str
    result: Literal["passed", "failed"]
    rules: list[Rule]


class Report(Part):
    schema_: Literal["rprune.report/1"] = pydantic.Field(default="rprune.report/1", alias="schema")
    id: str = ""  # sha256 of the canonical JSON without this field
    created: str
    name: str
    smoke: bool = False  # made to see whether the chain works: the numbers mean nothing, and no gate accepts them
    tool: dict[str, str]
    subjects: list[Subject]
    model: dict[str, Any]  # architecture, labels, counts
    data: DataUsed
    threat: Threat
    recipe: dict[str, Any]  # resolved
    recipe_sha256: str
    policy_sha256: str | None = None
    lineage: list[LineageEntry]
    sparsity: Sparsity
    integers: Integers | None = None
    footprint: Footprint | None = None
    size: dict[str, int]  # bytes of each form
    speed: list[Latency] = []
    fidelity: list[Fidelity]
    claims: list[Claim]
    evidence: Evidence
    gate: Gate | None = None
    environment: dict[str, Any]
    warnings: list[str] = []  # what is wrong with this model, against limitations, which hold for every one
    limitations: list[str]
    assurance: Literal["self_attested"] = "self_attested"

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    def to_json(self) -> dict[str, Any]:
        table = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return without_defaults(self, table, frozenset({"speed", "smoke"}))

    def computed_id(self) -> str:
        return digest_of(self.to_json() | {"id": ""})

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
