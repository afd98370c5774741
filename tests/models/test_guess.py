"""Architectures are told from names and shapes alone, or not at all."""

from __future__ import annotations

import pytest
import torchvision

from rprune.errors import InputError
from rprune.models import guess as guessing
from rprune.models.fingerprints import known, made
from rprune.models.guess import candidates, described, difference, fingerprint, guess, nearest, shapes_of, table
from rprune.models.registry import Architecture

IMAGES = (3, 32, 32)


@pytest.mark.parametrize(
    "arch",
    [
        Architecture("cifar-resnet18", 10, IMAGES),
        Architecture("cifar-resnet18", 100, (1, 32, 32), {"width": 16}),
        Architecture("cifar-resnet50", 10, IMAGES),
        Architecture("vgg16", 10, IMAGES),
        Architecture("vgg4", 43, IMAGES),
        Architecture("wrn-28-2", 10, IMAGES),
        Architecture("wrn-28-4", 10, IMAGES),
        Architecture("cnn-small", 10, IMAGES),
        Architecture("cnn-large", 10, (1, 28, 28)),
        Architecture("lenet", 10, (1, 28, 28), {"width": 4}),
        Architecture("torchvision:resnet18", 7, IMAGES),
        Architecture("torchvision:mobilenet_v3_small", 1000, IMAGES),
        Architecture("torchvision:shufflenet_v2_x1_0", 12, IMAGES),
        Architecture("torchvision:regnet_y_400mf", 12, IMAGES),
    ],
    ids=described,
)
def test_name_width_channels_and_classes_are_found(arch):
    shapes = shapes_of(arch)
    found = guess(dict(reversed(shapes.items())), arch.input_shape)  # whatever the order of the file
    assert found == arch
    alone = guess(shapes)
    assert (alone.name, alone.kwargs, alone.num_classes) == (arch.name, arch.kwargs, arch.num_classes)
    assert alone.input_shape[0] == arch.input_shape[0]


def test_the_size_of_images_is_found_where_the_weights_depend_on_it():
    assert guess(shapes_of(Architecture("cnn-small", 10, (1, 8, 8)))).input_shape == (1, 8, 8)
    assert guess(shapes_of(Architecture("cnn-large", 10, (3, 64, 64)))).input_shape == (3, 64, 64)


def test_weights_for_other_images_are_refused():
    with pytest.raises(InputError, match=r"classifier\.0\.weight"):
        guess(shapes_of(Architecture("cnn-small", 10, (1, 8, 8))), (1, 28, 28))


def test_counters_of_batch_norm_may_be_missing():
    shapes = shapes_of(Architecture("torchvision:resnet18", 10, IMAGES))
    assert guess({n: s for n, s in shapes.items() if "tracked" not in n}).name == "torchvision:resnet18"


def test_other_shapes_under_known_names_are_told():
    shapes = shapes_of(Architecture("torchvision:resnet18", 10, IMAGES)) | {"conv1.weight": (64, 3, 3, 3)}
    with pytest.raises(
        InputError, match=r"torchvision:resnet18.*conv1\.weight is \(64, 3, 3, 3\), not \(64, 3, 7, 7\)"
    ):
        guess(shapes)


def test_the_nearest_is_named_with_the_first_names_that_differ():
    shapes = shapes_of(Architecture("cifar-resnet18", 10, IMAGES))
    renamed = {name.replace("linear.", "fc."): shape for name, shape in shapes.items()}
    with pytest.raises(InputError, match=r"nearest is cifar-resnet18: missing linear\.weight.*unknown fc\.weight"):
        guess(renamed)


def test_names_of_nothing_known_are_refused_without_a_neighbour():
    with pytest.raises(InputError, match=r"\(encoder\.weight, \.\.\.\) are of no architecture"):
        guess({"encoder.weight": (3, 3)})


def test_several_that_fit_are_listed(monkeypatch):
    shapes = shapes_of(Architecture("cnn-small", 10, IMAGES))
    several = table() | {"candidates": {fingerprint(shapes): ["cnn-small", "torchvision:cnn"]}}
    monkeypatch.setattr(guessing, "table", lambda: several)
    monkeypatch.setattr(guessing, "shapes_of", lambda arch: shapes_of(Architecture("cnn-small", 10, IMAGES)))
    with pytest.raises(InputError, match="several architectures: cnn-small, torchvision:cnn"):
        guess(shapes)


def test_names_of_a_newer_torchvision_are_compared_all_the_same(monkeypatch):
    shapes = shapes_of(Architecture("cifar-resnet18", 10, IMAGES))
    monkeypatch.setattr(guessing, "table", lambda: table.__wrapped__() | {"candidates": {}})
    assert guess(shapes).name == "cifar-resnet18"


@pytest.mark.parametrize(
    "name", ["cifar-resnet18", "vgg16", "wrn-28-4", "torchvision:resnet50", "torchvision:densenet121"]
)
def test_entries_of_the_table_are_what_the_script_makes(name):
    new = made([name])
    ((digest, _),) = new["candidates"].items()
    assert name in table()["candidates"][digest]
    assert table()["sketches"][name] == new["sketches"][name]


def test_the_table_has_every_architecture():
    if not str(torchvision.__version__).startswith(table()["torchvision"]):
        pytest.skip(f"the table is of torchvision {table()['torchvision']}")
    assert set(table()["sketches"]) == set(known())
    assert sorted(name for names in table()["candidates"].values() for name in names) == sorted(known())


def test_sketches_tell_how_many_names_are_shared():
    shapes = shapes_of(Architecture("torchvision:resnet34", 10, IMAGES))
    assert nearest(shapes)[0] == ("torchvision:resnet34", 1.0)
    share = dict(nearest(shapes))["torchvision:resnet18"]
    other = shapes_of(Architecture("torchvision:resnet18", 10, IMAGES))
    mine, theirs = ({n for n in names if "tracked" not in n} for names in (shapes, other))
    assert share == pytest.approx(len(mine & theirs) / len(mine | theirs), abs=0.2)
    assert candidates(["a"]) == []


def test_differences_in_words():
    assert difference({"a": (1,)}, {"a": (1,)}) == ""
    assert difference({"a": (1,), "b": (2,)}, {"a": (3,), "\x1b[2J": (1,)}) == (
        "missing b; unknown \\x1b[2J; a is (3,), not (1,)"
    )
