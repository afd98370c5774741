"""The packed file: the same network comes out, in few bytes, and nothing else ever does."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import tracemalloc
from dataclasses import replace

import brotli
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rprune.errors import InputError
from rprune.export import packed_table
from rprune.export.onnx import stamp
from rprune.export.packed import canonical_form, network_of, pack, pack_float, pack_int8
from rprune.export.qdq import qdq_model
from rprune.export.streams import compress, from_planes, from_zigzag, load, planes, save, zigzag
from rprune.export.unpack import Packed, sizes, unpack
from rprune.models.flat import canonical
from rprune.models.graph import trace
from rprune.quantization.ptq import Settings, quantize, simulated

METADATA = {"rprune.version": "1", "rprune.labels": "cat\ndog \u00e9"}
CASES = [
    ("cnn-small", 0.05),
    ("lenet normalised", 0.05),
    ("cifar-resnet18", 0.02),
    ("cifar-resnet18", 1.0),
    ("cifar-resnet18 normalised", 0.02),
    ("wrn-28-2", 0.02),
]
SMALL = (1, 6, 6)


class Odd(nn.Module):
    """Nodes whose names do not follow from the names of layers: another input, a layer called twice, functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.relu, self.relu_2, self.head = nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, picture):
        a = self.relu(self.first(picture))
        b = torch.max_pool2d(picture, 1) if False else self.relu(self.second(a))
        pooled = torch.nn.functional.max_pool2d(a + b, 3).flatten(1)
        return self.head(torch.relu(self.relu_2(pooled)))


@pytest.fixture(scope="module")
def nets(load_helper):
    return load_helper("quantization/nets.py")


@pytest.fixture(scope="module")
def quantised(nets):
    """(traced network, quantization) by case."""
    done = {}

    def make(case: str, keep: float):
        if (case, keep) not in done:
            done[case, keep] = nets.quantised(nets.make(case, keep))[:2]
        return done[case, keep]

    return make


def small(keep: float = 0.3, seed: int = 0, bits: int = 8):
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    model = nn.Sequential(*layers)
    for layer in (model[0], model[4]):
        layer.weight.data *= torch.rand_like(layer.weight) < keep
    network = trace(model, SMALL)
    return network, quantize(network, [torch.rand(16, *SMALL)], Settings(bits=bits))


@pytest.fixture(scope="module")
def file():
    return pack_int8(*small(), METADATA)


@pytest.fixture(scope="module")
def floats():
    return pack_float(small()[0], METADATA)


def onnx_bytes(network, quantization, shape, classes) -> bytes:
    model = qdq_model(simulated(network, quantization), shape, classes)
    stamp(model, METADATA)
    return model.SerializeToString(deterministic=True)


def raw(file: bytes) -> dict[str, bytes]:
    return {name: brotli.decompress(stream) for name, stream in load(file)[0].items()}


def made(streams: dict[str, bytes], table: dict | None = None, **header: str) -> bytes:
    """A file by hand. Its digest is none: tests that get that far say what it should be."""
    text = streams["graph"] if table is None else json.dumps(table).encode()
    packed = {name: compress(content) for name, content in (streams | {"graph": text}).items()}
    kind = json.loads(streams["graph"])["kind"]
    return save(packed, {"format": "rprune.packed/1", "kind": kind, "sha256": ""} | header)


def table_of(file: bytes) -> dict:
    return json.loads(raw(file)["graph"])


def bit_equal(a, b) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        np.array_equal(left[key].numpy().view(np.uint32), right[key].numpy().view(np.uint32)) for key in left
    )


# what comes out


@pytest.mark.parametrize(("case", "keep"), CASES)
def test_int8_network_gives_the_same_onnx_file(nets, quantised, case, keep):
    network, found = quantised(case, keep)
    again, integers = network_of(unpack(pack_int8(network, found, METADATA)))
    wanted = onnx_bytes(*canonical_form(network, found), nets.SHAPE, 10)
    assert onnx_bytes(again, integers, nets.SHAPE, 10) == wanted
    # built-in networks name their nodes after their layers, so that files of earlier versions were the same
    assert onnx_bytes(network, found, nets.SHAPE, 10) == wanted


@pytest.mark.parametrize(("case", "keep"), CASES)
def test_float_network_comes_back_bit_for_bit(quantised, case, keep):
    network, _ = quantised(case, keep)
    again, integers = network_of(unpack(pack_float(network, METADATA)))
    assert integers is None
    assert bit_equal(again, canonical(network))
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_names_of_nodes_do_not_matter(nets, bits):
    torch.manual_seed(1)
    network = trace(Odd(), SMALL)
    found = quantize(network, [torch.rand(16, *SMALL)], Settings(bits=bits))
    twin, integers = canonical_form(network, found)
    assert [node.name for node in twin.graph.nodes] != [node.name for node in network.graph.nodes]
    x = nets.noise(4, SMALL)
    assert torch.equal(simulated(twin, integers)(x), simulated(network, found)(x))
    again, back = network_of(unpack(pack_int8(network, found, METADATA)))
    assert back.bits == bits
    assert onnx_bytes(again, back, SMALL, 3) == onnx_bytes(twin, integers, SMALL, 3)
    # the exporter may get a network that is canonical already
    assert onnx_bytes(*canonical_form(twin, integers), SMALL, 3) == onnx_bytes(twin, integers, SMALL, 3)
    assert pack_int8(twin, integers, METADATA) == pack_int8(network, found, METADATA)


def test_canonical_network_computes_the_same_without_negative_zeros(nets):
    network, _ = small()
    network.get_submodule("0").weight.data[0, 0, 0, :] = -0.0
    twin = canonical(network)
    assert torch.equal(twin(nets.noise(3, SMALL)), network(nets.noise(3, SMALL)))
    weights = torch.cat([tensor.flatten() for tensor in twin.state_dict().values()])
    assert not bool((torch.signbit(weights) & (weights == 0)).any())
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert bool(torch.signbit(network.get_submodule("0").weight[0, 0, 0]).all())  # the network itself is not touched
    assert bit_equal(network_of(unpack(pack_float(network, METADATA)))[0], twin)


def test_file_depends_on_nothing_but_the_content(file):
    network, found = small()
    shuffled = replace(
        found,
        weights=dict(reversed(found.weights.items())),
        biases=dict(reversed(found.biases.items())),
        weight_scales=dict(reversed(found.weight_scales.items())),
        activations=dict(reversed(found.activations.items())),
    )
    assert pack_int8(network, shuffled, dict(reversed(METADATA.items()))) == file
    content = unpack(file)
    assert pack(content) == file
    assert content.metadata == METADATA
    assert content.input_shape == SMALL
    assert content.classes == 3


def test_any_safetensors_reader_opens_it(file):
    tensors = safetensors.numpy.load(file)
    assert {array.dtype.name for array in tensors.values()} == {"uint8"}
    found = sizes(file)
    assert found["total"] == len(file)
    assert sum(found.values()) == 2 * len(file)
    assert {name: array.size for name, array in tensors.items()}.items() <= found.items()


def numbers(content: bytes, width: int) -> list[bytes]:
    """Byte planes undone, one number at a time."""
    count = len(content) // width
    return [bytes(content[place + count * k] for k in range(width)) for place in range(count)]


def stranger(file: bytes) -> dict[str, np.ndarray]:
    """A decoder written from docs/formats.md, number by number."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    streams = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            streams[name] = brotli.decompress(file[8 + size + start : 8 + size + end])
    table = json.loads(streams["graph"])
    integers = table["kind"] == "int8"
    products = [layer for layer in table["layers"] if layer["kind"] in ("conv", "linear")]
    stored = list(zip(products, table["weights"], strict=True))
    gaps = streams.get("gaps", b"")
    small = sum(w["entries"] for _, w in stored if w["gaps"] == "uint8")
    bytewise, wide = list(gaps[:small]), [int.from_bytes(n, "little") for n in numbers(gaps[small:], 2)]
    single = sum(w["entries"] for _, w in stored if integers or w["levels"])
    codes = list(streams["values"][:single])
    floats = [np.frombuffer(n, "<f4")[0] for n in numbers(streams["values"][single:], 4)]
    found = {}
    for layer, w in stored:
        if layer["kind"] == "conv":
            shape = [layer["out_channels"], layer["in_channels"] // layer["groups"], *layer["kernel_size"]]
        else:
            shape = [layer["out_features"], layer["in_features"]]
        levels = [np.float32(0), *(floats.pop(0) for _ in range(w["levels"]))]
        dense = [np.float32(0)] * math.prod(shape)
        place = -1
        for _ in range(w["entries"]):
            gap = {"none": [0], "uint8": bytewise, "uint16": wide}[w["gaps"]]
            place += 1 + (gap[0] if w["gaps"] == "none" else gap.pop(0))
            if integers:
                value = codes.pop(0)
                value -= 256 * (value > 127)
            else:
                value = levels[codes.pop(0)] if w["levels"] else floats.pop(0)
            dense[place] = value
        found[f"{layer['name']}.weight"] = np.array(dense, np.int8 if integers else np.float32).reshape(shape)
    scale_type = {"float16": "<f2", "float32": "<f4", "none": "<f4"}[table["scales"]]
    scales = [np.frombuffer(n, scale_type)[0] for n in numbers(streams.get("scales", b""), int(scale_type[-1]))]
    biases = numbers(streams.get("biases", b""), 4)
    affine = [np.frombuffer(n, "<f4")[0] for n in numbers(streams.get("affine", b""), 4)]
    for layer in table["layers"]:
        name = layer["name"]
        if layer["kind"] == "affine":
            for part in ("scale", "shift"):
                count = math.prod(layer["shape"])
                found[f"{name}.{part}"] = np.array([affine.pop(0) for _ in range(count)]).reshape(layer["shape"])
        elif layer["kind"] in ("conv", "linear"):
            out = len(found[f"{name}.weight"])
            if integers:
                found[f"{name}.scales"] = np.array([scales.pop(0) for _ in range(out)], np.float32)
                zigzags = [int.from_bytes(biases.pop(0), "little") for _ in range(out)]
                found[f"{name}.bias"] = np.array([z // 2 if z % 2 == 0 else -(z + 1) // 2 for z in zigzags], np.int32)
            elif layer["bias"]:
                found[f"{name}.bias"] = np.array([np.frombuffer(biases.pop(0), "<f4")[0] for _ in range(out)])
    assert not any((bytewise, wide, codes, floats, scales, biases, affine))
    sha = hashlib.sha256(streams["graph"])
    for layer in table["layers"]:
        for part in ("weight", "scales", "bias", "scale", "shift"):
            array = found.get(f"{layer['name']}.{part}", np.zeros(0, np.uint8))
            sha.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    assert sha.hexdigest() == header["__metadata__"]["sha256"]
    return found


@pytest.mark.parametrize("kind", ["int8", "float32"])
@pytest.mark.parametrize(("case", "keep"), [("lenet normalised", 0.05), ("lenet", 1.0), ("cifar-resnet18", 0.005)])
def test_decoder_written_from_the_document_agrees(quantised, case, keep, kind):
    network, quantization = quantised(case, keep)
    file = pack_int8(network, quantization, METADATA) if kind == "int8" else pack_float(network, METADATA)
    found, content = stranger(file), unpack(file)
    wanted = {f"{name}.{part}": array for part, table in (
        ("weight", content.weights), ("bias", content.biases), ("scales", content.scales)
    ) for name, array in table.items()}  # fmt: skip
    wanted |= {
        f"{n}.{part}": pair[i] for n, pair in content.affine.items() for i, part in enumerate(("scale", "shift"))
    }
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        assert np.array_equal(found[name], array), name
    source = quantization.weights if kind == "int8" else {}
    for name, weight in source.items():
        assert np.array_equal(content.weights[name], weight.numpy())


@pytest.mark.parametrize(("levels", "codes"), [(3, True), (255, True), (256, False)])
def test_codebook_layers_take_a_byte_a_weight(levels, codes):
    rng = np.random.default_rng(levels)
    book = np.sort(rng.normal(size=levels).astype(np.float32))
    assert len(np.unique(book)) == levels
    weight = np.where(rng.random((3, 8000)) < 0.1, rng.choice(book, (3, 8000)), 0).astype(np.float32)
    weight[0, :levels] = book
    network = trace(nn.Sequential(nn.Flatten(), nn.Linear(8000, 3, bias=False)), (1, 80, 100))
    network.get_submodule("1").weight.data = torch.from_numpy(weight)
    file = pack_float(network, METADATA)
    (stored,) = table_of(file)["weights"]
    assert stored["levels"] == (levels if codes else 0)
    count = np.count_nonzero(weight)
    assert len(raw(file)["values"]) == (count + 4 * levels if codes else 4 * count)
    assert np.array_equal(unpack(file).weights["1"], weight)


def test_wide_gaps_and_dense_layers(quantised):
    weight = np.zeros((3, 200_000), np.float32)
    weight[[0, 1, 2], [7, 150_000, 199_999]] = [1.5, -2.0, 3.0]
    network = trace(nn.Sequential(nn.Flatten(), nn.Linear(200_000, 3)), (2, 1000, 100))
    network.get_submodule("1").weight.data = torch.from_numpy(weight)
    file = pack_float(network, METADATA)
    assert np.array_equal(unpack(file).weights["1"], weight)
    assert table_of(file)["weights"][0]["gaps"] == "uint16"
    assert len(file) < 1500
    network, found = quantised("cifar-resnet18", 1.0)
    file = pack_int8(network, found, METADATA)
    assert {stored["gaps"] for stored in table_of(file)["weights"]} == {"none"}
    assert len(file) < 1.05 * sum(weight.numel() for weight in found.weights.values())


@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_entries_are_placed_in_parts(quantised, monkeypatch, kind):
    network, found = quantised("cifar-resnet18", 0.02)
    file = pack_int8(network, found, METADATA) if kind == "int8" else pack_float(network, METADATA)
    whole = unpack(file)
    monkeypatch.setattr("rprune.export.unpack.CHUNK", 7)
    assert same(unpack(file), whole)


def test_scales_take_two_bytes_where_that_is_exact(file):
    content = unpack(file)
    assert table_of(file)["scales"] == "float16"
    name = next(iter(content.scales))
    fine = {name: np.nextafter(content.scales[name], np.float32(1))}
    again = unpack(wide := pack(replace(content, scales=content.scales | fine)))
    assert table_of(wide)["scales"] == "float32"
    assert np.array_equal(again.scales[name], fine[name])


@given(st.lists(st.integers(-(2**31) + 1, 2**31 - 1)))
def test_zigzag_and_planes_are_undone(values):
    array = np.array(values, np.int32)
    assert np.array_equal(from_zigzag(from_planes(planes(zigzag(array)), np.uint32)), array)
    for value, coded in zip(values, zigzag(array).tolist(), strict=True):
        assert coded == (2 * value if value >= 0 else -2 * value - 1)


# what must not be packed


def test_what_cannot_be_packed_is_refused():
    network, found = small()
    other, integers = small(seed=3)
    with pytest.raises(InputError, match="another network"):
        pack_int8(network, replace(found, weights={}), METADATA)
    with pytest.raises(InputError, match="another network"):
        pack_int8(network, replace(found, weights={name: w.flatten() for name, w in found.weights.items()}), METADATA)
    with pytest.raises(InputError, match="no int8 form"):
        pack_int8(*small(bits=9), METADATA)
    image = next(iter(network.graph.nodes)).name
    zero = {name: replace(scale, scale=0.0) for name, scale in found.activations.items() if name != image}
    with pytest.raises(InputError, match="unusable scale"):
        pack_int8(network, replace(found, activations=found.activations | zero), METADATA)
    bad = {name: torch.full_like(weight, -128) for name, weight in integers.weights.items()}
    with pytest.raises(InputError, match="-128"):
        pack_int8(other, replace(integers, weights=bad), METADATA)
    network.get_submodule("0").weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="not a finite"):
        pack_float(network, METADATA)


@pytest.mark.parametrize("name", ['x", print("run by a name")) or getattr(self, "x', "a b", "a..b", "", "a\n", "a."])
def test_names_that_torch_would_run_as_code_are_refused(name, capsys):
    from rprune.models.flat import flat

    with pytest.raises(InputError, match="cannot be the name of a layer"):
        flat(2, (2, 1, 1), [{"name": name, "kind": "flatten", "inputs": ["image"]}])
    assert not capsys.readouterr().out


# hostile files


def refused(content: bytes, reason: str | None = None, most: int = 32 << 20) -> None:
    """One line, exit code 3, and little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=reason) as caught:
            unpack(content)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < most, f"{peak >> 20} MiB"
    assert caught.value.exit_code == 3
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def changed(file: bytes, *path, to) -> bytes:
    """The file with one value of its table replaced."""
    streams, table = raw(file), table_of(file)
    place = table
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return made(streams, table)


@functools.cache
def zeros(count: int) -> bytes:
    """A Brotli stream of very many zeros, made without holding them."""
    compressor = brotli.Compressor(quality=4)
    return b"".join([*(compressor.process(bytes(1 << 24)) for _ in range(count >> 24)), compressor.finish()])


@pytest.mark.parametrize("name", ["graph", "gaps", "values", "scales", "biases"])
def test_streams_must_have_exactly_their_length(file, name):
    streams, header = load(file)
    refused(save(streams | {name: zeros(1 << 30)}, header), "longer than")
    refused(save(streams | {name: streams[name] + b"\0"}, header), "damaged")
    refused(save(streams | {name: streams[name][:-1]}, header), "ends early|damaged")
    refused(save(streams | {name: b""}, header), "ends early")
    content = brotli.decompress(streams[name])
    if name != "graph":
        refused(save(streams | {name: compress(content + b"\0")}, header), "longer than")
        refused(save(streams | {name: compress(content[:-1])}, header), "bytes, its table says")
    refused(save({key: stream for key, stream in streams.items() if key != name}, header))
    refused(save(streams | {"more": b"x"}, header), "has the streams")


def test_header_is_read_strictly(file):
    streams, header = load(file)
    refused(b"")
    refused(file[:7])
    refused((1 << 62).to_bytes(8, "little") + file[8:], "header has")
    refused((1 << 16).to_bytes(8, "little") + file[8:], "JSON|safetensors")
    refused(file + b"\0", "safetensors")
    refused(file[:-1], "safetensors")
    refused(save(streams, header | {"format": "rprune.packed/2"}), "format")
    refused(save(streams, header | {"kind": "float32"}), "sha256")
    refused(save(streams, header | {"note": "hello"}), "sha256")
    refused(save(streams, header | {"sha256": "0" * 64}), "sha256")
    refused(safetensors.numpy.save({"graph": np.zeros(3, np.float32)}, header), "row of bytes")
    text = b'{"graph":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"graph":{"dtype":"U8","shape":[0],'
    text += b'"data_offsets":[0,0]}}'
    refused(len(text).to_bytes(8, "little") + text, "twice")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[]", "not an object"),
        (b"", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b'{"format": 1, "format": 1}', "twice"),
        (b'{"format": NaN}', "NaN"),
        (b'{"format": -Infinity}', "Infinity"),
        (b'{"classes": ' + b"9" * 5000 + b"}", "JSON"),
        (b"{}", "format"),
        (b'{"evil\\n\\u001b[31m": 1}', None),
    ],
)
def test_table_is_strict_json(file, text, reason):
    streams, header = load(file)
    refused(save(streams | {"graph": compress(text)}, header), reason)


BIG = 2**40
WORDS = ["conv", "linear", "relu", "flatten", "add", "affine", "image", "0", "1", "4", "none", "uint8"]
OWN_PARTS = ["graph", "forward", "training", "_modules", "_parameters", "__class__", "__dict__", "eval", "class"]
OWN_PARTS += ["code", "x", "_1", "a-b", "load_state_dict", "parameters", "weight", "T", "torch", "self"]
MISTAKES = [
    (("format",), "rprune.packed/2", "format"),
    (("kind",), "int4", "kind"),
    (("kind",), "float32", None),
    (("bits",), 9, "bits"),
    (("bits",), None, "scales"),
    (("bits",), True, "bits"),
    (("classes",), 4, "logits"),
    (("classes",), BIG, "classes"),
    (("classes",), 3.0, "classes"),
    (("input_shape",), [1, 6], "input_shape"),
    (("input_shape",), [1, BIG, BIG], "input_shape"),
    (("input_shape",), [2**20, 2**20, 1], "image is too large"),
    (("input_shape",), [1, 6, 8], "features"),
    (("input_shape",), [2, 6, 6], "channels"),
    (("layers",), [], "layers"),
    (("layers", 0, "kind"), "exec", "layers.0"),
    (("layers", 0, "kind"), None, "layers.0"),
    (("layers", 0, "extra"), 1, "extra"),
    (("layers", 0, "name"), 'a"b', "name"),
    (("layers", 0, "name"), "a\n", "name"),
    (("layers", 0, "name"), "a" * 257, "name"),
    (("layers", 0, "name"), "image", "twice"),
    (("layers", 0, "name"), "1", "twice|earlier"),
    (("layers", 1, "inputs"), ["nowhere"], "earlier"),
    (("layers", 1, "inputs"), ["1"], "earlier"),
    (("layers", 0, "inputs"), ["4"], "earlier"),
    (("layers", 1, "inputs"), ["0", "0"], "inputs"),
    (("layers", 1, "inputs"), [], "inputs"),
    (("layers", 0, "out_channels"), BIG, "out_channels"),
    (("layers", 0, "out_channels"), 2**29, "too many|more than"),
    (("layers", 0, "out_channels"), 0, "out_channels"),
    (("layers", 0, "out_channels"), -1, "out_channels"),
    (("layers", 0, "out_channels"), "4", "out_channels"),
    (("layers", 0, "groups"), 3, "groups"),
    (("layers", 0, "kernel_size"), [2**15, 2**15], "kernel is larger"),
    (("layers", 0, "kernel_size"), [3], "kernel_size"),
    (("layers", 0, "kernel_size"), 3, "kernel_size"),
    (("layers", 0, "padding"), [2**20, 2**20], "padded input is too large"),
    (("layers", 0, "padding"), "same", "padding"),
    (("layers", 0, "dilation"), [2**28, 1], "kernel is larger"),
    (("layers", 0, "stride"), [0, 1], "stride"),
    (("layers", 0, "bias"), 1, "bias"),
    (("layers", 2, "padding"), 2, "half the kernel"),
    (("layers", 2, "kernel_size"), 7, "kernel is larger"),
    (("layers", 4, "in_features"), BIG, "in_features"),
    (("layers", 4, "in_features"), 35, "features"),
    (("weights",), [], "one entry a layer"),
    (("weights", 0, "entries"), BIG, "entries"),
    (("weights", 0, "entries"), 37, "not 37 entries"),
    (("weights", 0, "entries"), 0, "bytes|longer"),
    (("weights", 1, "gaps"), "none", "entries"),
    (("weights", 1, "gaps"), "uint16", "bytes"),
    (("weights", 1, "gaps"), "int8", "gaps"),
    (("weights", 1, "levels"), 3, "codebook"),
    (("scales",), "float32", "bytes"),
    (("scales",), "none", "scales"),
    (("activations", "nowhere"), {"scale": 1.0, "zero_point": 0, "top": 255}, "no layer"),
    (("activations", "0", "zero_point"), 256, "zero_point"),
    (("activations", "0", "zero_point"), -1, "zero_point"),
    (("activations", "0", "zero_point"), 0.5, "zero_point"),
    (("activations", "0", "top"), 256, "top"),
    (("activations", "0", "scale"), 0.0, "scale"),
    (("activations", "0", "scale"), -1.0, "scale"),
    (("activations", "0", "scale"), 1e300, "scale"),
    (("activations", "0", "scale"), 1e-300, "float32"),
    (("activations", "0", "scale"), 0.1, "float32"),
    (("activations", "0", "scale"), "1", "scale"),
    (("metadata",), {"a": 1}, "metadata"),
    (("metadata",), {"\ud800": "a"}, "metadata"),
    (("metadata",), {str(i): "" for i in range(65)}, "metadata"),
    (("more",), 1, "more"),
]


@pytest.mark.parametrize(("path", "value", "reason"), MISTAKES, ids=[f"{p[-1]}={str(v)[:9]!r}" for p, v, _ in MISTAKES])
def test_mistakes_of_the_table(file, path, value, reason):
    refused(changed(file, *path, to=value), reason)


def test_infinite_number_in_the_table(file):
    streams = raw(file)
    scale = json.dumps(table_of(file)["activations"]["0"]["scale"]).encode()
    assert streams["graph"].count(scale) == 1
    refused(made(streams | {"graph": streams["graph"].replace(scale, b"1e999")}), "scale")


def test_sums_of_sizes_are_capped(file):
    streams, table = raw(file), table_of(file)
    table["layers"][4] |= {"in_features": 36, "out_features": 2**23}
    table["layers"].append({"name": "5", "kind": "linear", "inputs": ["4"], "in_features": 2**23, "out_features": 60,
                            "bias": True})  # fmt: skip
    table["classes"] = 60
    table["weights"].append({"entries": 0, "gaps": "uint8", "levels": 0})
    refused(made(streams, table), "more than 536870912 weights")
    table = table_of(file)
    table["layers"][0] |= {"out_channels": 2**25}
    table["layers"][4] |= {"in_features": 9 * 2**25}
    refused(made(streams, table), "values are too many")
    table = table_of(file)
    table["classes"] = table["layers"][4]["out_features"] = 2**29 // 36 - 1
    table["weights"][1] = {"entries": 36 * table["classes"], "gaps": "none", "levels": 0}
    refused(made(streams, table), "streams have more than 536870912 bytes")
    table = table_of(file)
    relu = table["layers"][1]
    table["layers"][2:2] = [relu | {"name": f"r{i}", "inputs": ["1"]} for i in range(packed_table.MOST_LAYERS)]
    refused(made(streams, table), "layers", most=256 << 20)


def test_layers_inside_layers_are_refused(file):
    streams, table = raw(file), table_of(file)
    table["layers"][1]["name"] = "0.weight"
    table["layers"][2]["inputs"] = ["0.weight"]
    refused(made(streams, table), "inside another")


def with_values(file: bytes, change) -> bytes:
    """The file with its streams, as arrays of bytes, changed in place."""
    streams = {name: bytearray(content) for name, content in raw(file).items()}
    change(streams)
    return made({name: bytes(content) for name, content in streams.items()})


def test_numbers_are_checked(file, floats):
    def put(name, place, *values):
        def change(streams):
            for offset, value in enumerate(values):
                streams[name][place + offset] = value

        return change

    def planes_of(name, width, value):
        count = len(raw(file)[name]) // width
        return lambda streams: [streams[name].__setitem__(k * count, byte) for k, byte in enumerate(value)]

    refused(with_values(file, put("values", 0, 0x80)), "-128")
    refused(with_values(file, put("values", 0, 0)), "entry is zero")
    refused(with_values(file, lambda s: s["gaps"].__setitem__(slice(None), b"\xff" * len(s["gaps"]))), "array has")
    for number in (0, -1.0, np.inf, np.nan):
        refused(with_values(file, planes_of("scales", 2, np.float16(number).tobytes())), "scale")
    for number in ((1 << 31) + 1, (1 << 31) + 2, (1 << 32) - 1):
        refused(with_values(file, planes_of("biases", 4, np.uint32(number).tobytes())), "2\\^30")
    count = len(raw(floats)["biases"]) // 4
    refused(with_values(floats, put("biases", 3 * count, 0x7F) if count == 0 else lambda s: [
        s["biases"].__setitem__(k * count, byte) for k, byte in enumerate(np.float32(np.nan).tobytes())
    ]), "not finite")  # fmt: skip


def test_codebooks_are_checked():
    network = trace(nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False)), (1, 8, 8))
    network.get_submodule("1").weight.data = torch.tensor([0.0, 0.5, -1.0, 2.0]).repeat(32).view(2, 64)
    file = pack_float(network, METADATA)
    assert table_of(file)["weights"][0]["levels"] == 3
    for levels in ([-1.0, 0.5, 0.5], [-1.0, 0.0, 2.0], [2.0, 0.5, -1.0], [-1.0, 0.5, np.inf], [np.nan] * 3):
        change = planes(np.array(levels, np.float32))
        refused(with_values(file, lambda s, c=change: s["values"].__setitem__(slice(-12, None), c)), "levels")
    refused(with_values(file, lambda s: s["values"].__setitem__(0, 4)), "has no level")


# whatever comes, InputError or the content


def outcome(compute):
    """The result, or None where a mistake was told in one line; anything else fails the test."""
    try:
        return compute()
    except InputError as error:
        message = str(error)
    assert message.isprintable()
    return None


def same(a: Packed, b: Packed) -> bool:
    tables = ("weights", "biases", "scales")
    return a.layers == b.layers and all(
        np.array_equal(getattr(a, kind)[name], array) for kind in tables for name, array in getattr(b, kind).items()
    )


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_damaged_bytes(file, floats, data):
    source = data.draw(st.sampled_from([file, floats]))
    content = bytearray(source)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        action = data.draw(st.sampled_from(["flip", "cut", "insert", "delete", "set"]))
        if action == "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif action == "set":
            content[place] = data.draw(st.integers(0, 255))
        elif action == "cut":
            del content[max(place, 1) :]
        elif action == "insert":
            content[place:place] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            del content[place : place + data.draw(st.integers(1, 8))]
        if not content:
            break
    tracemalloc.start()
    try:
        found = outcome(lambda: unpack(bytes(content)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found is None or same(found, unpack(source))
    assert peak < 32 << 20


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 70), st.sampled_from([2**29 + 1, 2**31, 2**63, 2**64, 10**40]),
        st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=6),
        st.sampled_from(WORDS), st.sampled_from(OWN_PARTS),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


def paths(value, before=()):
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*before, key)
        yield from paths(inner, (*before, key))


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_changed_tables(file, floats, data):
    """With a digest that says yes to all: what the table allows must make a network that can be used, or InputError."""
    streams, table = raw(source := data.draw(st.sampled_from([file, floats]))), None
    table = table_of(source)
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from(list(paths(table))))
        place = table
        for key in path:
            place = place[key]
        if data.draw(st.integers(0, 9)):
            place[last] = data.draw(VALUES)
        else:
            del place[last]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Packed, "digest", lambda self, text: "")
        found = outcome(lambda: network_of(unpack(made(streams, table))))
    if found is None:
        return
    network, integers = found
    if integers is not None:
        network = simulated(network, integers)
        qdq_model(network, tuple(table["input_shape"]), table["classes"])
    logits = network(torch.zeros(1, *table["input_shape"]))
    assert logits.shape == (1, table["classes"])


@pytest.mark.parametrize("name", OWN_PARTS)
def test_names_of_a_modules_own_parts(file, name):
    streams, table = raw(file), table_of(file)
    table["layers"][1]["name"] = name
    table["layers"][2]["inputs"] = [name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Packed, "digest", lambda self, text: "")
        content = unpack(made(streams, table))
    found = outcome(lambda: network_of(content))
    x = torch.full((1, *SMALL), 0.5)
    assert found is None or torch.equal(simulated(*found)(x), simulated(*network_of(unpack(file)))(x))
