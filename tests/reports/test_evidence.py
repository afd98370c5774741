"""What evidence files hold, and what is refused; tests/reports/test_verify.py plays the forger."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from rprune.data.splits import ArraySplit
from rprune.errors import InputError
from rprune.reports.evidence import broken_samples, distances, read_samples, read_witnesses, unit

HEADER = "index,label,clean_prediction,adversarial_prediction,attack,certified"
MORE = ",queries,margin,distance,witness"
rng = np.random.default_rng(0)
PIXELS = rng.integers(0, 256, (3, 2, 5, 6), dtype=np.uint8)
FLOATS = rng.random((2, 2, 5, 6), dtype=np.float32)


def tensors(index, more):
    return {"index": np.array(index), "x": PIXELS, "float_index": np.array(more), "float_x": FLOATS}


def test_both_kinds_come_back_in_order_of_samples(tmp_path):
    save_file(tensors([9, 2, 5], [7, 0]), tmp_path / "x")
    found = read_witnesses(tmp_path / "x")
    assert found.index.tolist() == [0, 2, 5, 7, 9]
    assert found.exact.tolist() == [False, True, True, False, True]
    assert found.points.dtype == np.float32
    wanted = [FLOATS[1], unit(PIXELS[1]), unit(PIXELS[2]), FLOATS[0], unit(PIXELS[0])]
    np.testing.assert_array_equal(found.points, wanted)


def test_pixels_become_what_loaders_make_of_them():
    import torch

    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(unit(every), (torch.arange(256).float() / 255).numpy())


@pytest.mark.parametrize("count", [0, 3])
def test_either_pair_may_be_empty(tmp_path, count):
    index = np.arange(3)
    file = {"index": index[:count], "x": PIXELS[:count], "float_index": index[: 3 - count]}
    save_file(file | {"float_x": unit(PIXELS[: 3 - count])}, tmp_path / "x")
    found = read_witnesses(tmp_path / "x")
    np.testing.assert_array_equal(found.points, unit(PIXELS))
    assert found.exact.all() == (count == 3)


@pytest.mark.parametrize(("index", "more"), [([1, 1, 2], [3, 4]), ([1, 2, 3], [3, 4]), ([1, 2, 3], [4, 4])])
def test_sample_with_two_witnesses_is_refused(tmp_path, index, more):
    save_file(tensors(index, more), tmp_path / "x")
    with pytest.raises(ValueError, match="two witnesses"):
        read_witnesses(tmp_path / "x")


def test_first_format(tmp_path):
    save_file({"index": np.array([4, 1]), "x": FLOATS}, tmp_path / "x")
    found = read_witnesses(tmp_path / "x")
    np.testing.assert_array_equal(found.points, FLOATS[::-1])
    assert not found.exact.any()
    save_file({"index": np.array([4, 1, 2]), "x": PIXELS}, tmp_path / "x")
    with pytest.raises(ValueError, match="x is uint8"):
        read_witnesses(tmp_path / "x")


@pytest.mark.parametrize("count", [0, 1, 4])
def test_distances(count):
    delta = rng.normal(size=(count, 3, 4, 5)).astype(np.float32)
    rows = delta.reshape(count, 60).astype(np.float64)
    assert distances(delta, "linf").tolist() == [max(map(abs, row)) for row in rows.tolist()]
    np.testing.assert_allclose(distances(delta, "l2"), [np.linalg.norm(row) for row in rows])
    assert distances(delta, "l2").shape == (count,)


@pytest.mark.parametrize(
    "text",
    ["", "x\n", "index\n0\n", f"{HEADER},more\n0,1,1,,,,2\n", f"{HEADER}\n0,1,1\n", f"{HEADER}\n0,1,1,,,,,\n",
     f"{HEADER},queries\n0,1,1,,,,9\n", f"{HEADER}{MORE}\n0,1,1,,,\n"],
)  # fmt: skip
def test_rows_of_another_kind_are_refused(tmp_path, text):
    (tmp_path / "samples.csv").write_text(text)
    with pytest.raises(ValueError, match=r"samples\.csv"):
        read_samples(tmp_path / "samples.csv")


def test_rows_of_both_kinds_are_read(tmp_path):
    path = tmp_path / "samples.csv"
    path.write_text(f"{HEADER}\n0,1,1,,,1\n")
    assert read_samples(path)[0]["certified"] == "1"
    path.write_text(f"{HEADER}{MORE}\n0,1,1,2,square,,900,-0.1,0.03,uint8\n")
    assert read_samples(path)[0]["witness"] == "uint8"


def test_pictures_name_attack_and_size(load_helper, tmp_path):
    report = load_helper("reports/sample_report.py").sample_report(None, curves=False, history=False, profile=False)
    (tmp_path / "evidence").mkdir()
    images = rng.integers(20, 230, (3, 3, 5, 5), dtype=np.uint8)
    test = ArraySplit("test", images, np.array([3, 1, 4]))
    moved = images[1:2] + np.uint8(8)
    file = {"index": np.array([1]), "x": moved, "float_index": np.array([0]), "float_x": unit(images[:1])}
    save_file(file, tmp_path / "evidence" / "adversarial.safetensors")
    rows = ["0,3,3,5,square,,1,0.1,0.0,float", "1,1,1,9,apgd-t,,1,0.1,0.03,uint8", "2,4,4,,,1,1,0.1,,"]
    (tmp_path / "evidence" / "samples.csv").write_text("\n".join([HEADER + MORE, *rows, ""]))
    first, second = broken_samples(tmp_path, report, test)
    assert (first.index, first.attack, first.distance) == (0, "square", 0.0)
    assert (second.index, second.attack, second.adversarial_prediction) == (1, "apgd-t", "truck")
    assert second.distance == pytest.approx(8 / 255)
    np.testing.assert_array_equal(second.adversarial, unit(moved)[0])
    (tmp_path / "evidence" / "samples.csv").write_text("nothing\n")
    with pytest.raises(InputError, match="evidence"):
        broken_samples(tmp_path, report, test)
