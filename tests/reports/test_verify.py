"""Whatever is changed in a bundle, some check must see it; sealing it again must not help.

The bundle is built once; a test copies it, changes files or the report, and seals it as its maker would have.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rprune.errors import InputError, IntegrityError
from rprune.evaluation.statistics import clopper_pearson
from rprune.files import digest_of, file_digest, write_json
from rprune.reports.evidence import COLUMNS, unit
from rprune.reports.gate import policy_of
from rprune.reports.verify import LEVELS, Verification, verify

N = 60
EPS = 0.05
POLICY = {"gate": [{"metric": "sparsity", "value": 0.5}, {"metric": "robust_accuracy", "value": 0.99}]}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    from rprune.pipeline.bench import Bench, architecture
    from rprune.pipeline.bundle import Source, export
    from rprune.pipeline.certifying import certify
    from rprune.pipeline.quantizing import quantize
    from rprune.pipeline.recipe import (
        CertifyStage,
        DataSection,
        ExportStage,
        ModelSection,
        PruneStage,
        QuantizeStage,
        TrainStage,
    )
    from rprune.pipeline.stages import prune, train
    from rprune.threat import ThreatModel

    bench = Bench.open(DataSection(source="digits"), ThreatModel.of("linf", str(EPS)), 0, "cpu")
    arch = architecture(ModelSection(), bench.data)
    made = train(bench, arch, TrainStage(objective="benign", epochs=3, batch_size=16, lr=0.05))
    made = quantize(bench, prune(bench, made, PruneStage(method="lwm", sparsity=0.5)), QuantizeStage())
    certificates = certify(bench, made, CertifyStage(eps="0.005", limit=N, n=100, smoothing_limit=8))
    folder = tmp_path_factory.mktemp("verify") / "bundle"
    folder.mkdir()
    source = Source("x", {"seed": 0}, policy_of(POLICY, "x"))
    report = export(bench, made, ExportStage(suite="pgd10", limit=N), folder, source, certificates)
    assert report.evidence.witness_count > 2
    assert report.claim("certified_accuracy").correct > 2
    assert report.claim("smoothed_certified_accuracy").correct > 1
    return folder


class Bundle:
    """A copy that a test may change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table: dict[str, Any] = json.loads((folder / "report.json").read_text())

    def claim(self, metric: str, artifact: str = "onnx-int8") -> dict[str, Any]:
        return next(c for c in self.table["claims"] if (c["metric"], c["artifact"]) == (metric, artifact))

    def count(self, metric: str, change: int, artifact: str = "onnx-int8") -> None:
        """Change a claim's count, with value and interval to match."""
        claim = self.claim(metric, artifact)
        claim["correct"] += change
        claim["value"] = claim["correct"] / claim["n"]
        claim["interval"]["lower"], claim["interval"]["upper"] = clopper_pearson(claim["correct"], claim["n"])

    def robust(self) -> dict[str, Any]:
        return self.claim("robust_accuracy")

    def forget(self) -> None:
        """Take away what the first reports did not say of attacks."""
        for claim in self.table["claims"]:
            for name in ("attacks", "health", "distances", "complete"):
                claim.pop(name, None)
            if claim["metric"] == "robust_accuracy":
                claim["curve"] = []

    def judge(self) -> None:
        """Let the gate follow from the changed report."""
        from rprune.reports.gate import judge
        from rprune.reports.schema import Report

        self.table["gate"] = judge(Report.model_validate(self.table), policy_of(POLICY, "x")).model_dump(mode="json")

    def write(self) -> None:
        """Write the report as it is, under its old id."""
        write_json(self.folder / "report.json", self.table)

    def seal(self) -> None:
        """Write it with the hashes of the files as they are now, and an id that fits."""
        for subject in self.table["subjects"]:
            path = self.folder / subject["name"]
            if path.is_file() and ".." not in subject["name"]:
                old, subject["sha256"] = subject["sha256"], file_digest(path)
                if subject["sha256"] != old:
                    subject["bytes"] = path.stat().st_size
                for claim in self.table["claims"]:
                    claim["sha256"] = subject["sha256"] if claim["sha256"] == old else claim["sha256"]
        self.table["id"] = digest_of(self.table | {"id": ""})
        self.write()

    def tensors(self, change: Callable[[dict[str, np.ndarray]], object]) -> None:
        """Change the stored witnesses, in place or to what is returned."""
        file = self.folder / "evidence" / "adversarial.safetensors"
        tensors = {name: tensor.copy() for name, tensor in load_file(file).items()}
        changed = change(tensors)
        save_file(changed if isinstance(changed, dict) else tensors, file)

    def witnesses(self, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
        """Change the witnesses, all of them as floats."""
        self.tensors(as_floats)
        self.samples(lambda rows: [row.update(witness="float") for row in rows if row["witness"]])

        def changed(tensors: dict[str, np.ndarray]) -> None:
            tensors["float_index"], tensors["float_x"] = change(tensors["float_index"], tensors["float_x"])

        self.tensors(changed)

    def samples(self, change: Callable[[list[dict[str, str]]], object]) -> None:
        file = self.folder / "evidence" / "samples.csv"
        with file.open(newline="") as handle:
            rows = list(csv.DictReader(handle))
        change(rows)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file.write_text(text.getvalue())

    def verify(self, level: str = "replay", **options: Any) -> Verification:
        return verify(self.folder, level, **options)


def as_floats(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    index = np.concatenate([tensors["index"], tensors["float_index"]])
    points = np.concatenate([unit(tensors["x"]), tensors["float_x"]])
    order = index.argsort()
    nothing = {"index": tensors["index"][:0], "x": tensors["x"][:0]}
    return nothing | {"float_index": index[order], "float_x": points[order]}


@pytest.fixture
def bundle(original, tmp_path):
    shutil.copytree(original, tmp_path / "bundle")
    return Bundle(tmp_path / "bundle")


def failed(result: Verification) -> set[str]:
    return {check.name for check in result.checks if not check.passed}


def refused_or_false(bundle: Bundle) -> bool:
    try:
        return not bundle.verify().passed
    except (InputError, IntegrityError):
        return True


@pytest.mark.parametrize("level", LEVELS)
def test_untouched_bundle_passes(original, level):
    result = verify(original, level, policy_of(POLICY, "x"))
    assert result.passed
    assert result.integrity
    assert failed(result) == set()


def test_levels_add_checks(original):
    names = [{check.name for check in verify(original, level).checks} for level in LEVELS]
    assert names[0] == {"files", "report id", "recipe"}
    assert (
        names[0] | {"sizes", "evidence", "sparsity", "zeros", "8 bit", "lineage", "gate", "robust_accuracy@onnx-int8"}
        <= names[1]
    )
    assert (
        names[1] | {"data", "samples", "certified", "witnesses in ball", "witnesses fool", "robust count"} <= names[2]
    )


def test_sealing_an_unchanged_bundle_changes_nothing(bundle):
    before = bundle.table["id"]
    bundle.seal()
    assert bundle.table["id"] == before
    assert bundle.verify().passed


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors", "masks.safetensors", "model.onnx", "model.int8.onnx", "evidence/samples.csv",
        "evidence/adversarial.safetensors",
    ],
)  # fmt: skip
@pytest.mark.parametrize("level", LEVELS)
def test_flipped_byte_is_an_integrity_failure(bundle, name, level):
    path = bundle.folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = bundle.verify(level)
    assert not result.integrity
    assert failed(result) == {"files"}
    assert name in result.checks[0].detail


def test_missing_file_is_an_integrity_failure(bundle):
    (bundle.folder / "masks.safetensors").unlink()
    result = bundle.verify("hash")
    assert (result.integrity, failed(result)) == (False, {"files"})


def edit_claim_count(b: Bundle) -> None:
    b.claim("clean_accuracy")["correct"] -= 1


def edit_claim_value(b: Bundle) -> None:
    b.claim("robust_accuracy")["value"] += 0.01


def edit_interval_lower(b: Bundle) -> None:
    b.claim("robust_accuracy")["interval"]["lower"] += 1e-6


def edit_interval_upper(b: Bundle) -> None:
    b.claim("clean_accuracy")["interval"]["upper"] = 1.0


def count_beyond_n(b: Bundle) -> None:
    b.claim("clean_accuracy")["correct"] = 61


def edit_curve(b: Bundle) -> None:
    b.claim("certified_accuracy")["curve"][1]["value"] += 0.1


def edit_claim_file(b: Bundle) -> None:
    b.claim("clean_accuracy")["sha256"] = "0" * 64


def edit_layer(b: Bundle) -> None:
    b.table["sparsity"]["by_layer"][0]["nonzero"] -= 1


def edit_layer_sparsity(b: Bundle) -> None:
    b.table["sparsity"]["by_layer"][0]["sparsity"] += 0.01


def edit_kept(b: Bundle) -> None:
    b.table["sparsity"]["kept"] -= 1


def edit_overall(b: Bundle) -> None:
    b.table["sparsity"]["overall"] += 0.01


def edit_budget(b: Bundle) -> None:
    b.table["sparsity"]["budget"] += 1


def edit_float_nonzero(b: Bundle) -> None:
    b.table["sparsity"]["float_nonzero"] -= 1


def edit_zeros(b: Bundle) -> None:
    b.table["sparsity"]["int8_zeros_equal_float_zeros"] = False


def edit_radius(b: Bundle) -> None:
    row = next(r for r in b.claim("smoothed_certified_accuracy")["settings"]["samples"] if r["radius"] > 0)
    row["radius"] += 0.01


def edit_smoothing_count(b: Bundle) -> None:
    row = next(r for r in b.claim("smoothed_certified_accuracy")["settings"]["samples"] if r["radius"] > 0)
    row["count"] -= 1


def edit_abstained(b: Bundle) -> None:
    for row in b.claim("smoothed_certified_accuracy")["settings"]["samples"]:
        if row["prediction"] == -1:
            row["prediction"] = row["label"]
            return
    b.claim("smoothed_certified_accuracy")["settings"]["samples"][0]["prediction"] = -1


def edit_smoothing_claim(b: Bundle) -> None:
    b.count("smoothed_certified_accuracy", 1)


def edit_gate_result(b: Bundle) -> None:
    b.table["gate"]["result"] = "passed"


def edit_gate_rule(b: Bundle) -> None:
    b.table["gate"]["rules"][1]["passed"] = True


def edit_gate_observed(b: Bundle) -> None:
    b.table["gate"]["rules"][1]["observed"] = 0.999


def edit_gate_threshold(b: Bundle) -> None:
    b.table["gate"]["rules"][1]["threshold"] = 0.0


def edit_gate_dropped_rule(b: Bundle) -> None:
    del b.table["gate"]["rules"][1]
    b.table["gate"]["result"] = "passed"


def edit_parent(b: Bundle) -> None:
    b.table["lineage"][1]["parent"] = "0" * 64


def edit_output(b: Bundle) -> None:
    b.table["lineage"][0]["output"] = "0" * 64


def edit_subject_size(b: Bundle) -> None:
    next(s for s in b.table["subjects"] if s["role"] == "onnx-int8")["bytes"] //= 2


def edit_size_table(b: Bundle) -> None:
    b.table["size"]["model.int8.onnx"] //= 2


def edit_value_on_the_security_curve(b: Bundle) -> None:
    b.robust()["curve"][-1]["value"] += 0.1


def put(b: Bundle, place: int, count: int) -> None:
    """Another count at a point of the security curve."""
    point = b.robust()["curve"][place]
    point["correct"], point["value"] = count, count / N


def edit_security_curve_that_rises(b: Bundle) -> None:
    put(b, -1, b.robust()["curve"][-2]["correct"] + 1)


def edit_security_curve_from_less_than_clean(b: Bundle) -> None:
    put(b, 0, b.robust()["curve"][1]["correct"])


def edit_security_curve_without_zero(b: Bundle) -> None:
    del b.robust()["curve"][0]


def edit_security_curve_without_eps(b: Bundle) -> None:
    b.robust()["curve"] = [point for point in b.robust()["curve"] if point["at"] != EPS]


def edit_security_curve_beside_the_claim(b: Bundle) -> None:
    place = [point["at"] for point in b.robust()["curve"]].index(EPS)
    put(b, place, b.robust()["curve"][place + 1]["correct"])


def edit_security_curve_with_a_point_twice(b: Bundle) -> None:
    b.robust()["curve"].append(b.robust()["curve"][-1])


def edit_attack_that_breaks_more(b: Bundle) -> None:
    b.robust()["attacks"][0]["broken"] += 1


def edit_attack_that_takes_anothers_credit(b: Bundle) -> None:
    first, second, *_ = b.robust()["attacks"]
    first["broken"], second["broken"] = first["broken"] - 1, second["broken"] + 1


def edit_attack_that_tried_fewer(b: Bundle) -> None:
    b.robust()["attacks"][1]["tried"] -= 1


def edit_attack_that_tried_more(b: Bundle) -> None:
    b.robust()["attacks"][0]["tried"] += 1


def edit_attack_with_more_misses_than_tries(b: Bundle) -> None:
    b.robust()["attacks"][0]["misses"] = N


def edit_attack_that_is_there_twice(b: Bundle) -> None:
    b.robust()["attacks"][1]["name"] = b.robust()["attacks"][0]["name"]


def edit_no_attack_that_ran(b: Bundle) -> None:
    clean = b.claim("clean_accuracy")["correct"]
    b.count("robust_accuracy", clean - b.robust()["correct"])
    for row in b.robust()["attacks"]:
        row["tried"] = row["broken"] = row["misses"] = 0
    for place in range(len(b.robust()["curve"])):
        put(b, place, clean)
    b.judge()


def edit_clean_count_of_other_samples(b: Bundle) -> None:
    claim = b.claim("clean_accuracy")
    claim["n"] -= 1
    b.count("clean_accuracy", 0)


def edit_more_distances_than_samples(b: Bundle) -> None:
    b.robust()["distances"] = [0.1] * (N + 1)


def edit_health_hidden_from_the_gate(b: Bundle) -> None:
    """The gate judged before the attack failed a check."""
    check = b.robust()["health"]["checks"][0]
    check |= {"value": check["limit"] + 1, "passed": False}
    b.robust()["health"]["status"] = "failed"


def edit_rule_allowed_after_the_fact(b: Bundle) -> None:
    b.table["gate"]["rules"][1]["allow_unreliable"] = True


STATIC = [edit for name, edit in sorted(globals().items()) if name.startswith("edit_")]


def edit_data_digest(b: Bundle) -> None:
    b.table["data"]["sha256"] = "0" * 64


def edit_fewer_clean_errors(b: Bundle) -> None:
    b.forget()
    b.count("clean_accuracy", 1)
    b.judge()


def edit_fewer_clean_errors_of_the_float_file(b: Bundle) -> None:
    b.forget()
    b.count("clean_accuracy", 1, "onnx")
    b.judge()


def edit_more_robust(b: Bundle) -> None:
    b.forget()
    b.count("robust_accuracy", 1)
    b.judge()


def edit_more_robust_with_all_that_follows(b: Bundle) -> None:
    """One sample that no attack broke, says everything but the evidence."""
    b.count("robust_accuracy", 1)
    curve, row = b.robust()["curve"], b.robust()["attacks"]
    for place, point in enumerate(curve):
        if point["at"] <= EPS:
            put(b, place, max(point["correct"], b.robust()["correct"]))
    row[0]["broken"] -= 1
    for later in row[1:]:
        later["tried"] += 1
    b.judge()


def edit_attack_renamed(b: Bundle) -> None:
    b.robust()["attacks"][0]["name"] = "square"


def edit_more_certified(b: Bundle) -> None:
    b.count("certified_accuracy", 1)
    curve = b.claim("certified_accuracy")["curve"]
    curve[0]["correct"] += 1
    curve[0]["value"] = curve[0]["correct"] / N


def edit_witness_count(b: Bundle) -> None:
    b.table["evidence"]["witness_count"] += 1


REPLAY = [
    edit_data_digest, edit_fewer_clean_errors, edit_fewer_clean_errors_of_the_float_file, edit_more_robust,
    edit_more_robust_with_all_that_follows, edit_attack_renamed, edit_more_certified, edit_witness_count,
]  # fmt: skip


@pytest.mark.parametrize("edit", STATIC + REPLAY, ids=lambda edit: edit.__name__)
def test_edited_report_does_not_match_its_id(bundle, edit):
    edit(bundle)
    bundle.write()
    result = bundle.verify()
    assert not result.integrity
    assert failed(result) == {"report id"}


@pytest.mark.parametrize("edit", STATIC, ids=lambda edit: edit.__name__)
def test_sealed_again_a_static_check_fails(bundle, edit):
    edit(bundle)
    bundle.seal()
    result = bundle.verify("static")
    assert result.integrity
    assert not result.passed
    for start, check in (("edit_security_curve_", "curve"), ("edit_attack_", "attacks"), ("edit_no_attack", "attacks")):
        if edit.__name__.startswith(start):
            assert failed(result) == {f"{check} of robust_accuracy@onnx-int8"}


@pytest.mark.parametrize("edit", REPLAY, ids=lambda edit: edit.__name__)
def test_sealed_again_a_replay_check_fails(bundle, edit):
    edit(bundle)
    bundle.seal()
    assert bundle.verify("static").passed
    result = bundle.verify("replay")
    assert result.integrity
    assert not result.passed


def test_changed_recipe_does_not_match_its_digest(bundle):
    bundle.table["recipe"]["seed"] = 1
    bundle.seal()
    assert failed(bundle.verify("hash")) == {"recipe"}
    bundle.table["recipe_sha256"] = digest_of(bundle.table["recipe"])
    bundle.seal()
    assert bundle.verify("hash").passed


def test_gate_made_under_a_softer_policy(bundle):
    soft = {"gate": [{"metric": "sparsity", "value": 0.1}]}
    bundle.table["policy_sha256"] = policy_of(soft, "x").sha256
    bundle.table["gate"]["policy_sha256"] = policy_of(soft, "x").sha256
    bundle.table["gate"]["rules"] = bundle.table["gate"]["rules"][:1]
    said = bundle.table["gate"]["rules"][0]["message"].partition(" ")[0]
    bundle.table["gate"]["rules"][0] |= {"threshold": 0.1, "message": f"{said} >= 0.1"}
    bundle.table["gate"]["result"] = "passed"
    bundle.seal()
    assert bundle.verify("static").passed
    assert "policy" in failed(bundle.verify("static", policy=policy_of(POLICY, "x")))


def test_gate_left_out_is_seen_by_who_holds_the_policy(bundle):
    del bundle.table["gate"]
    bundle.seal()
    assert not bundle.verify("static", policy=policy_of(POLICY, "x")).passed


def clean_pixels(index: np.ndarray) -> np.ndarray:
    from rprune.data.sources import load_data

    return load_data("digits").test.pixels(0, N)[index].astype(np.float32) / np.float32(255)


def test_witness_replaced_by_the_clean_image(bundle):
    def change(index, points):
        points[0] = clean_pixels(index)[0]
        return index, points

    bundle.witnesses(change)
    bundle.seal()
    assert failed(bundle.verify()) == {"witnesses fool", "samples"}
    assert bundle.verify("static").passed


@pytest.mark.parametrize("step", [1.01 * EPS, 0.5])
def test_witness_outside_the_ball(bundle, step):
    def change(index, points):
        far = clean_pixels(index)[0]
        points[0] = np.where(far < 0.5, far + np.float32(step), far - np.float32(step))
        return index, points

    bundle.witnesses(change)
    bundle.seal()
    assert "witnesses in ball" in failed(bundle.verify())


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan])
def test_witness_outside_the_pixel_range(bundle, value):
    def change(index, points):
        points[0, 0, 0, 0] = value
        return index, points

    bundle.witnesses(change)
    bundle.seal()
    assert "witnesses in ball" in failed(bundle.verify())


def test_same_witnesses_as_floats(bundle):
    bundle.witnesses(lambda index, points: (index, points))
    bundle.seal()
    assert bundle.verify().passed


def test_witnesses_of_both_kinds(bundle):
    def move(tensors):
        tensors["float_index"] = np.append(tensors["float_index"], tensors["index"][:1])
        tensors["float_x"] = np.concatenate([tensors["float_x"], unit(tensors["x"][:1])])
        tensors["index"], tensors["x"] = tensors["index"][1:].copy(), tensors["x"][1:].copy()

    def follow(rows):
        next(row for row in rows if row["witness"] == "uint8").update(witness="float")

    bundle.tensors(move)
    bundle.seal()
    assert failed(bundle.verify()) == {"samples"}
    bundle.samples(follow)
    bundle.seal()
    assert bundle.verify().passed


def test_bundle_of_the_first_kind(bundle):
    """Witnesses in floats, six columns, no word of attacks: as rprune wrote them at first."""
    bundle.tensors(as_floats)
    bundle.tensors(lambda tensors: {"index": tensors["float_index"], "x": tensors["float_x"]})
    bundle.samples(lambda rows: rows.__setitem__(slice(None), [{name: row[name] for name in COLUMNS} for row in rows]))
    bundle.forget()
    bundle.seal()
    assert failed(bundle.verify()) == {"gate"}  # which now asks for the health of the attack
    bundle.judge()
    bundle.seal()
    assert bundle.verify().passed
    bundle.samples(lambda rows: next(row for row in rows if row["attack"]).update(attack=""))
    bundle.seal()
    assert failed(bundle.verify()) == {"samples"}


@pytest.mark.parametrize("step", [13, 128])  # 12.75 are allowed
def test_8_bit_witness_outside_the_ball(bundle, step):
    def change(tensors):
        pixel = int(clean_pixels(tensors["index"])[0, 0, 0, 0] * 255 + 0.5)
        tensors["x"][0, 0, 0, 0] = pixel + step if pixel < 128 else pixel - step

    bundle.tensors(change)
    bundle.seal()
    assert "witnesses in ball" in failed(bundle.verify())


def test_8_bit_witness_replaced_by_the_clean_image(bundle):
    def change(tensors):
        tensors["x"][0] = np.rint(clean_pixels(tensors["index"])[0] * 255)

    bundle.tensors(change)
    bundle.seal()
    assert failed(bundle.verify()) == {"witnesses fool", "samples"}


def both_kinds_of_one_sample(t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    floats = {"float_index": t["index"][:1].copy(), "float_x": unit(t["x"][:1])}
    return t | floats


def floats_in_the_place_of_pixels(t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return t | {"x": unit(t["x"])}


def doubles(t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return t | {"float_x": t["float_x"].astype(np.float64)}


def short_indices(t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return t | {"index": t["index"].astype(np.int32)}


def indices_for_some(t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return t | {"index": t["index"][1:].copy()}


def one_pair_alone(t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"index": t["index"], "x": t["x"]}


def more_tensors(t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return t | {"more": t["index"]}


def other_shape(t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return t | {"float_x": np.zeros((0, 1, 4, 8), np.float32)}


@pytest.mark.parametrize(
    "change",
    [
        both_kinds_of_one_sample, floats_in_the_place_of_pixels, doubles, short_indices, indices_for_some,
        one_pair_alone, more_tensors, other_shape,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_witnesses_stored_in_another_way(bundle, change):
    bundle.tensors(change)
    bundle.seal()
    assert "witnesses" in failed(bundle.verify())


@pytest.mark.parametrize("other", [1, -1, N])
def test_witness_index_twice_or_out_of_range(bundle, other):
    def change(index, points):
        index[0] = index[1] if other == 1 else other
        return index, points

    bundle.witnesses(change)
    bundle.seal()
    assert "witnesses" in failed(bundle.verify())


def test_witness_left_out(bundle):
    bundle.witnesses(lambda index, points: (index[1:].copy(), points[1:].copy()))
    bundle.table["evidence"]["witness_count"] -= 1
    bundle.seal()
    assert failed(bundle.verify()) == {"robust count", "samples"}


def test_no_witness_at_all_is_no_error(bundle):
    bundle.witnesses(lambda index, points: (index[:0].copy(), points[:0].copy()))
    bundle.table["evidence"]["witness_count"] = 0
    bundle.seal()
    assert failed(bundle.verify()) == {"robust count", "samples"}


@pytest.mark.parametrize("column", ["clean_prediction", "label"])
def test_changed_sample_row(bundle, column):
    bundle.samples(lambda rows: rows[3].update({column: str((int(rows[3][column]) + 1) % 10)}))
    bundle.seal()
    assert bundle.verify("static").passed
    assert "samples" in failed(bundle.verify())


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("distance", "0.001"), ("distance", ""), ("distance", "-0.05"), ("distance", "nan"), ("distance", "inf"),
        ("distance", "far"), ("witness", "float"), ("witness", ""), ("witness", "uint16"), ("margin", "low"),
        ("margin", "nan"), ("queries", "-1"), ("queries", "many"), ("queries", ""), ("certified", "2"),
        ("attack", "none"),
    ],
)  # fmt: skip
def test_changed_column_of_a_broken_sample(bundle, column, value):
    bundle.samples(lambda rows: next(row for row in rows if row["attack"]).update({column: value}))
    bundle.seal()
    assert failed(bundle.verify()) & {"samples", "sample rows"}


@pytest.mark.parametrize(("column", "value"), [("distance", "0.05"), ("witness", "uint8")])
def test_witness_columns_of_a_sample_that_stands(bundle, column, value):
    bundle.samples(lambda rows: next(row for row in rows if not row["attack"]).update({column: value}))
    bundle.seal()
    assert {"samples", "sample rows"} <= failed(bundle.verify())


@pytest.mark.parametrize("column", ["queries", "witness", "attack"])
def test_column_left_out(bundle, column):
    bundle.samples(lambda rows: [row.pop(column) for row in rows])
    bundle.seal()
    assert {"samples", "sample rows"} <= failed(bundle.verify())


def test_row_left_out(bundle):
    bundle.samples(lambda rows: rows.pop())
    bundle.seal()
    assert "samples" in failed(bundle.verify())


def test_changed_index_of_a_row(bundle):
    bundle.samples(lambda rows: rows[3].update(index="57"))
    bundle.seal()
    assert not bundle.verify().passed


def test_changed_adversarial_prediction(bundle):
    def change(rows):
        row = next(row for row in rows if row["attack"])
        row["adversarial_prediction"] = str((int(row["adversarial_prediction"]) + 1) % 10)

    bundle.samples(change)
    bundle.seal()
    assert not bundle.verify().passed


def test_attack_left_out_of_the_samples(bundle):
    def change(rows):
        next(row for row in rows if row["attack"]).update(attack="", adversarial_prediction="")

    bundle.samples(change)
    bundle.seal()
    assert not bundle.verify().passed


def test_certificate_for_a_sample_that_is_wrong(bundle):
    """A certificate moved from one sample to another that the file gets wrong: the count stays."""

    def change(rows):
        next(row for row in rows if row["certified"] == "1")["certified"] = "0"
        next(row for row in rows if row["label"] != row["clean_prediction"])["certified"] = "1"

    bundle.samples(change)
    bundle.seal()
    assert "certified" in failed(bundle.verify())


def test_other_model_under_the_old_claims(bundle):
    """The float file in place of the integer file, with fresh hashes."""
    shutil.copy(bundle.folder / "model.onnx", bundle.folder / "model.int8.onnx")
    bundle.seal()
    assert not bundle.verify().passed


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname", "evidence/../../outside.txt"])
@pytest.mark.parametrize("level", ["hash", "replay"])
def test_names_outside_the_folder_are_refused(bundle, name, level):
    (bundle.folder.parent / "outside.txt").write_text("x")
    bundle.table["subjects"][0]["name"] = name
    bundle.seal()
    with pytest.raises(IntegrityError, match="outside") as error:
        bundle.verify(level)
    assert error.value.exit_code == 5


def test_link_that_leads_outside_is_refused(bundle):
    file = bundle.folder / "model.safetensors"
    shutil.move(file, bundle.folder.parent / "outside")
    file.symlink_to(bundle.folder.parent / "outside")
    with pytest.raises(IntegrityError, match="outside"):
        bundle.verify("hash")


@pytest.mark.parametrize("key", ["samples", "witnesses"])
def test_evidence_must_be_one_of_the_hashed_files(bundle, key):
    """Evidence that no subject names could be changed at will."""
    name = bundle.table["evidence"][key]
    bundle.table["evidence"][key] = f"../{Path(name).name}"
    shutil.copy(bundle.folder / name, bundle.folder.parent / Path(name).name)
    bundle.seal()
    assert refused_or_false(bundle)


def drop_int8_subject(b: Bundle) -> None:
    b.table["subjects"] = [s for s in b.table["subjects"] if s["role"] != "onnx-int8"]


def drop_float_subject(b: Bundle) -> None:
    b.table["subjects"] = [s for s in b.table["subjects"] if s["role"] != "onnx"]


def drop_clean_claims(b: Bundle) -> None:
    b.table["claims"] = [c for c in b.table["claims"] if c["metric"] != "clean_accuracy"]


def no_samples_at_all(b: Bundle) -> None:
    b.claim("clean_accuracy")["n"] = 0


def more_samples_than_data(b: Bundle) -> None:
    b.claim("clean_accuracy")["n"] = 10**6


def health_that_passes_what_failed(b: Bundle) -> None:
    check = b.robust()["health"]["checks"][0]
    check["value"] = check["limit"] + 1


def health_that_is_ok_though_a_check_failed(b: Bundle) -> None:
    check = b.robust()["health"]["checks"][0]
    check |= {"value": check["limit"] + 1, "passed": False}


def health_with_a_check_twice(b: Bundle) -> None:
    b.robust()["health"]["checks"][1] = b.robust()["health"]["checks"][0]


def health_check_that_nobody_knows(b: Bundle) -> None:
    b.robust()["health"]["checks"][0]["id"] = "R16"


def negative_distance(b: Bundle) -> None:
    b.robust()["distances"] = [-0.1]


def no_smoothing_settings(b: Bundle) -> None:
    b.claim("smoothed_certified_accuracy")["settings"] = {}


def measured_on_weights(b: Bundle) -> None:
    b.table["sparsity"]["measured_on"] = "weights"


def interval_of_impossible_level(b: Bundle) -> None:
    b.claim("clean_accuracy")["interval"]["level"] = 2.0


def text_for_samples(b: Bundle) -> None:
    (b.folder / "evidence" / "samples.csv").write_text("nothing\n")


def text_for_witnesses(b: Bundle) -> None:
    (b.folder / "evidence" / "adversarial.safetensors").write_text("nothing")


def witnesses_of_another_shape(b: Bundle) -> None:
    b.witnesses(lambda index, points: (index, points[:, :, :4].copy()))


def text_for_the_model(b: Bundle) -> None:
    (b.folder / "model.int8.onnx").write_text("nothing")


@pytest.mark.parametrize(
    "damage",
    [
        drop_int8_subject, drop_float_subject, drop_clean_claims, count_beyond_n, no_samples_at_all,
        health_that_passes_what_failed, health_that_is_ok_though_a_check_failed, health_with_a_check_twice,
        health_check_that_nobody_knows, negative_distance, more_samples_than_data, no_smoothing_settings,
        measured_on_weights, interval_of_impossible_level,
        text_for_samples,
        text_for_witnesses, witnesses_of_another_shape, text_for_the_model,
    ],
    ids=lambda damage: damage.__name__,
)  # fmt: skip
def test_malformed_bundle_is_not_an_internal_error(bundle, damage):
    """A report that its maker sealed, and that makes no sense: a false claim or a refusal, never a crash."""
    damage(bundle)
    bundle.seal()
    assert refused_or_false(bundle)


def test_other_data_is_seen(bundle, tmp_path):
    images, labels = np.zeros((40, 8, 8), np.uint8), np.arange(40) % 10
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    assert failed(bundle.verify(data=f"npz:{tmp_path / 'x.npz'}")) == {"data"}


def test_data_that_is_not_there(bundle):
    with pytest.raises(InputError):
        bundle.verify(data="npz:none.npz")
    assert bundle.verify("static", data="npz:none.npz").passed


def test_same_data_from_another_source(bundle, tmp_path):
    from rprune.data.sources import load_data

    data = load_data("digits")
    np.savez(
        tmp_path / "digits.npz",
        train_images=data.train.pixels(0, 100)[:, 0], train_labels=data.train.labels[:100],
        test_images=data.test.pixels(0, len(data.test))[:, 0], test_labels=data.test.labels,
    )  # fmt: skip
    assert bundle.verify(data=f"npz:{tmp_path / 'digits.npz'}").passed


def test_number_of_a_weak_attack_is_marked_here_too(bundle):
    edit_health_hidden_from_the_gate(bundle)
    bundle.judge()
    bundle.seal()
    result = bundle.verify("static")
    assert result.passed
    assert [c.name for c in result.checks if "UNRELIABLE" in c.detail] == ["robust_accuracy@onnx-int8"]


def test_no_report(tmp_path):
    with pytest.raises(InputError):
        verify(tmp_path)
