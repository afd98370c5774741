"""Commands on image data that streams from tar shards."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from rprune.data import sources
from rprune.pipeline.artifact import load_artifact


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "RESIDENT_BYTES", 0)
    random = np.random.RandomState(0)
    for split, count in (("train", 20), ("val", 6)):
        with tarfile.open(tmp_path / f"{split}-000000.tar", "w") as archive:
            for i in range(count):
                image = io.BytesIO()
                Image.fromarray(random.randint(0, 256, (24, 30, 3)).astype(np.uint8)).save(image, "JPEG")
                for name, content in ((f"{i}.jpg", image.getvalue()), (f"{i}.cls", b"%d" % (i % 3))):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return tmp_path


def test_a_model_is_trained_and_pruned(call, shards):
    options = ("--epochs", 1, "--batch-size", 8, "--quiet")
    data = ("--data", "webdataset:.?size=16")
    said = call("train", *data, "--objective", "benign", *options, cwd=shards)
    assert said.code == 0, said.err
    record = load_artifact(shards / "model.pt").metadata.data
    assert (record.source, record.augment, record.classes) == ("webdataset:.?size=16", "crop-flip", ["0", "1", "2"])
    said = call("prune", "model.pt", "-s", 0.5, "-m", "lwm", "-q", cwd=shards)
    assert said.code == 0, said.err


def test_the_imagenet_recipe_can_be_asked_for_and_comes_by_default_with_large_images(call, shards):
    (shards / "r.toml").write_text(
        'rprune = 1\nname = "r"\n[data]\nsource = "webdataset:.?size=16"\naugment = "resized-crop-flip"\n'
        '[[stage]]\nkind = "train"\nobjective = "benign"\nepochs = 1\nbatch_size = 8\n'
    )
    said = call("run", "r.toml", "-o", "out", "-q", cwd=shards)
    assert said.code == 0, said.err
    assert load_artifact(shards / "out" / "01-train").metadata.data.augment == "resized-crop-flip"
    assert sources.load_data(f"webdataset:{shards}?size=64").augment == "resized-crop-flip"


def test_bad_shards_are_refused_in_one_line(call, shards):
    path = shards / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:3000])
    assert "cannot read shard" in call("train", "--data", "webdataset:.", "-o", "n.pt", cwd=shards).refused(3)
    assert "is not there" in call("train", "--data", "webdataset:none", "-o", "n.pt", cwd=shards).refused(3)
