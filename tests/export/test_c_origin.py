"""A C source is run only where a network proves that it is rprune's own: any other may be anybody's program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from rprune.errors import InputError
from rprune.export.c.origin import is_written_of, need_origin
from rprune.export.c.writer import c_source
from rprune.export.compact_onnx import expanding
from rprune.export.onnx import plain_model
from rprune.export.packed import canonical_form
from rprune.export.qdq import qdq_model
from rprune.models.flat import canonical
from rprune.models.graph import trace
from rprune.quantization.ptq import quantize, simulated

CASES = ["lenet normalised", "cifar-resnet18", "wrn-28-2"]


@pytest.fixture(scope="module")
def nets(load_helper):
    return load_helper("quantization/nets.py")


def written(nets: Any, case: str, kind: str, folder: Path) -> tuple[Path, Path]:
    """The C source of a network and its ONNX file, as an export writes them."""
    network = trace(nets.make(case, 0.3), nets.SHAPE)
    if kind == "int8":
        made: Any = simulated(*canonical_form(network, quantize(network, [nets.digits(64)[0]])))
        model = qdq_model(made, nets.SHAPE, 10)
    else:
        made = canonical(network)
        model = plain_model(made, nets.SHAPE, 10)
    source = c_source(made, nets.SHAPE)
    (folder / "model.c").write_text(source.source)
    (folder / "model.h").write_text(source.header)
    file = folder / ("model.int8.onnx" if kind == "int8" else "model.onnx")
    onnx.save(model, file)
    return folder / "model.c", file


@pytest.fixture
def source(nets, tmp_path):
    return written(nets, "cnn-small", "int8", tmp_path)[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["int8", "float"])
def test_every_source_of_an_export_follows_from_its_onnx_file(nets, tmp_path, case, kind) -> None:
    source, file = written(nets, case, kind, tmp_path)
    assert is_written_of(source, file)
    need_origin(source)
    onnx.save(expanding(onnx.load(file)), file)
    assert is_written_of(source, file)


def test_a_renamed_source_keeps_its_origin(source) -> None:
    text = source.read_text().replace('#include "model.h"', '#include "net.h"')
    (source.parent / "net.c").write_text(text)
    (source.parent / "net.h").write_text(source.with_suffix(".h").read_text())
    need_origin(source.parent / "net.c")


EVIL = '__attribute__((constructor)) static void f(void) { system("touch /tmp/x"); }\n'
CHANGES = {
    "code behind the source": lambda c: c.write_text(c.read_text() + EVIL),
    "code in the header": lambda c: c.with_suffix(".h").write_text(c.with_suffix(".h").read_text() + EVIL),
    "one weight": lambda c: c.write_text(c.read_text().replace("1,", "2,", 1)),
    "an include of nothing": lambda c: c.write_text(c.read_text().replace('#include "model.h"', "", 1)),
    "no network": lambda c: c.with_name("model.int8.onnx").unlink(),
    "a damaged network": lambda c: c.with_name("model.int8.onnx").write_bytes(b"x"),
    "no header": lambda c: c.with_suffix(".h").unlink(),
    "bytes that are no text": lambda c: c.write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_changed_the_origin_is_lost(source, change) -> None:
    CHANGES[change](source)
    with pytest.raises(InputError) as error:
        need_origin(source)
    assert error.value.hint


def test_another_network_proves_nothing(nets, source, tmp_path) -> None:
    (tmp_path / "other").mkdir()
    _, other = written(nets, "lenet normalised", "int8", tmp_path / "other")
    other.replace(source.with_name("model.int8.onnx"))
    with pytest.raises(InputError, match="is code"):
        need_origin(source)
