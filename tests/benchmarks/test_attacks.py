"""The gates of the attack oracle: with any seed as strong as reference AutoAttack, and the same samples left."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "attacks.py"
SEED = 7


@pytest.fixture(scope="module")
def benchmark(load_helper):
    return load_helper("../benchmarks/attacks.py")


@pytest.fixture(scope="module")
def reference(load_helper):
    return load_helper("oracles/attack_oracle.py").RESULTS


@pytest.mark.slow
def test_every_part_and_the_whole_are_as_strong_as_the_reference(benchmark, reference, tmp_path):
    """In a process of its own: the suite's checks of shapes would double its minute."""
    result = tmp_path / "result.json"
    command = [sys.executable, BENCHMARK, "--only", "oracle", "--seeds", str(SEED), "--output", result]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    rows = json.loads(result.read_text())["oracle"]["rows"]
    assert {row["seed"] for row in rows} == {SEED}
    left = {row["part"]: row["correct"] for row in rows}
    theirs = {name: value * 256 for name, value in reference.items() if isinstance(value, float)}
    starts = [theirs[name] for name in ("apgd-ce_s0", "apgd-ce_s1", "apgd-ce_s0_bs64")]
    assert max(starts) - 4 <= left["apgd-ce"] <= min(starts) + 4
    assert abs(left["apgd-dlr"] - theirs["apgd-dlr_s0"]) <= 4
    assert left["apgd-t"] <= theirs["apgd-t_s0"] + 2
    assert left["fab-t"] <= theirs["fab-t_s0"] + 2
    assert left["square"] <= theirs["square_s0"] + 6
    assert left["aa-standard"] <= min(left.values())
    robust = next(row["robust"] for row in rows if row["part"] == "aa-standard")
    assert int(robust, 16).bit_count() == left["aa-standard"]
    assert benchmark.apart(robust, reference["standard_robust"]) <= 2


def test_committed_results_pass_the_gates(reference, benchmark):
    """Over all seeds, in linf and in l2."""
    found = json.loads(benchmark.RESULT.read_text())
    rows = [row for row in found["oracle"]["rows"] if row["part"] == "aa-standard"]
    assert [row["seed"] for row in rows] == list(benchmark.SEEDS)
    assert all(benchmark.apart(row["robust"], reference["standard_robust"]) <= 2 for row in rows)
    libraries = [found["libraries"][name] for name in benchmark.LIBRARIES]
    full = [row for row in libraries if row["ours"] == "aa-standard"]
    assert {row["net"] for row in full} == {"oracle", "l2"}
    assert all(benchmark.apart(row["robust"], row["ours_robust"]) <= 2 for row in full)
    rows = [row for row in found["l2"]["rows"] if row["part"] == "aa-standard"]
    theirs = next(row["robust"] for row in full if row["net"] == "l2")
    assert all(benchmark.apart(row["robust"], theirs) <= 2 for row in rows)
