"""Programs of torch.export run as torch runs them, without torch.export.load; what is not known does not run."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch
from torch import nn

from rprune.errors import InputError
from rprune.models.registry import Architecture, build
from rprune.pipeline.exported import Exported, package_state

SHAPE = (3, 16, 16)


class Odd(nn.Module):
    """Several results of an operator, numbers computed from shapes, a buffer outside the state, writing in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(6 * 4, 5)
        self.register_buffer("shift", torch.ones(6, 1, 1), persistent=False)

    def forward(self, x):
        y = nn.functional.relu(self.norm(self.conv(x)), inplace=True)
        first, second = y.chunk(2, 1)
        y = torch.cat([first, (second + 0.5).mul_(2.0)], 1) + self.shift
        y = nn.functional.adaptive_avg_pool2d(y, 2)
        return self.linear(y.view(x.size(0), y.size(1) * 4))


def exported(net, folder, dynamic=True, decomposed=False):
    batch = ({0: torch.export.Dim("b", min=1, max=4096)},) if dynamic else None
    program = torch.export.export(net.eval(), (torch.rand(3, *SHAPE),), dynamic_shapes=batch)
    path = folder / "net.pt2"
    torch.export.save(program.run_decompositions() if decomposed else program, path)
    return path


@pytest.fixture(scope="session")
def nets():
    torch.manual_seed(0)
    named = {"cnn-small": build(Architecture("cnn-small", 5, SHAPE))}
    named |= {"resnet": build(Architecture("cifar-resnet18", 5, SHAPE, {"width": 4})), "odd": Odd()}
    return {name: net.eval() for name, net in named.items()}


@pytest.mark.parametrize(
    ("name", "decomposed", "dynamic"),
    [("resnet", True, True), ("resnet", False, False), ("odd", False, True), ("odd", True, False), ("odd", True, True)],
)
def test_logits_and_gradients_are_those_of_the_net(nets, tmp_path, name, decomposed, dynamic):
    net = nets[name]
    found = Exported(exported(net, tmp_path, dynamic, decomposed))
    assert found.input_shape == SHAPE
    x = torch.rand(7, *SHAPE)
    kept = x.clone()
    torch.testing.assert_close(found(x), net(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(x, kept)
    images = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(found(images).square().sum(), images)
    same = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(net(same).square().sum(), same)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5)


def test_weights_are_the_state_dict(nets, tmp_path):
    state = package_state(exported(nets["resnet"], tmp_path))
    wanted = nets["resnet"].state_dict()
    assert set(state) == set(wanted)
    assert all(torch.equal(state[name], wanted[name]) and state[name].dtype == wanted[name].dtype for name in wanted)


def edited(path, change):
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            if name.endswith("models/model.json"):
                table = json.loads(data)
                change(table["graph_module"])
                data = json.dumps(table).encode()
            archive.writestr(name, data)
    return path


def _target(name):
    def change(module):
        module["graph"]["nodes"][1]["target"] = name

    return change


def _argument(arg):
    def change(module):
        module["graph"]["nodes"][1]["inputs"][0]["arg"] = arg

    return change


def _huge(module):
    node = next(n for n in module["graph"]["nodes"] if "conv2d" in n["target"])
    padding = next(entry for entry in node["inputs"] if entry["name"] == "padding")
    padding["arg"] = {"as_ints": [10**8, 10**8]}


def _without_memory(module):
    node = module["graph"]["nodes"][1]
    node["target"] = "torch.ops.aten.full.default"
    node["inputs"] = [
        {"name": "size", "arg": {"as_ints": [10**6, 10**6]}, "kind": 1},
        {"name": "fill_value", "arg": {"as_float": 1.0}, "kind": 1},
    ]


def _writes(module):
    node = {"target": "torch.ops.aten.mul_.Scalar", "outputs": [{"as_tensor": {"name": "unused"}}], "metadata": {}}
    module["graph"]["nodes"].insert(1, node)
    weight = module["signature"]["input_specs"][0]["parameter"]["arg"]["name"]
    node["inputs"] = [
        {"name": "self", "arg": {"as_tensor": {"name": weight}}, "kind": 1},
        {"name": "other", "arg": {"as_float": 2.0}, "kind": 1},
    ]


def _text_times_a_number(module):
    given = [("a", {"as_string": "x"}), ("b", {"as_int": 10**12})]
    inputs = [{"name": name, "arg": arg, "kind": 1} for name, arg in given]
    outputs = [{"as_sym_int": {"as_name": "unused"}}]
    module["graph"]["nodes"].insert(0, {"target": "_operator.mul", "inputs": inputs, "outputs": outputs})


def _square_of_squares(module):
    nodes = module["graph"]["nodes"]
    value = {"as_int": 10**9}
    for step in range(60):
        inputs = [{"name": name, "arg": value, "kind": 1} for name in "ab"]
        outputs = [{"as_sym_int": {"as_name": f"n{step}"}}]
        nodes.insert(step, {"target": "_operator.mul", "inputs": inputs, "outputs": outputs})
        value = {"as_sym_int": {"as_name": f"n{step}"}}


def _two_results(module):
    module["signature"]["output_specs"] *= 2


def _mutates(module):
    module["signature"]["output_specs"] = [{"buffer_mutation": {"arg": {"name": "x"}, "buffer_name": "y"}}]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (_target("torch.load"), "is not known"),
        (_target("torch.hub.load"), "is not known"),
        (_target("torch.ops.aten.from_file.default"), "is not known"),
        (_target("torch.ops.aten.save.default"), "is not known"),
        (_target("torch.ops.mine.relu.default"), "is not known"),
        (_target("torch.ops.aten.relu.__class__"), "is not known"),
        (_target("torch.ops.aten.relu.default.__globals__"), "is not known"),
        (_target("_operator.methodcaller"), "is not known"),
        (_target("math.sqrt"), "is not known"),
        (_target("#torchbind:x"), "is not known"),
        (_argument({"as_custom_obj": {"name": "x", "class_fqn": "y"}}), "is not known"),
        (_argument({"as_tensor": {"name": "nothing"}}), "nothing"),
        (_argument({}), "cannot be run"),
        (_huge, "too large"),
        (_without_memory, "too large"),
        (_text_times_a_number, "no number"),
        (_square_of_squares, "size that is too large"),
        (_writes, "changes its weights"),
        (_two_results, "gives 2"),
        (_mutates, "user_output"),
    ],
)
def test_what_is_not_known_to_be_harmless_is_refused(nets, tmp_path, change, wanted):
    with pytest.raises(InputError, match=wanted):
        Exported(edited(exported(nets["cnn-small"], tmp_path), change))


def test_symbolic_shapes_are_never_evaluated(nets, tmp_path):
    """torch.export.load hands such texts to sympy, which evaluates them as Python."""
    trap = tmp_path / "trap"

    def change(module):
        for value in module["graph"]["tensor_values"].values():
            for size in value["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = f"__import__('os').mkdir({str(trap)!r})"

    path = edited(exported(nets["cnn-small"], tmp_path), change)
    assert Exported(path)(torch.rand(2, *SHAPE)).shape == (2, 5)
    assert not trap.exists()


def test_a_program_that_was_exported_in_training_mode_is_refused(tmp_path):
    net = build(Architecture("cifar-resnet18", 5, SHAPE, {"width": 4})).train()
    program = torch.export.export(net, (torch.rand(3, *SHAPE),))
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(InputError, match="its program cannot be run"):
        Exported(tmp_path / "net.pt2")


def test_programs_of_something_else_are_refused(tmp_path):
    for net, inputs in ((nn.Linear(4, 2), torch.rand(3, 4)), (nn.Conv2d(3, 2, 3), torch.rand(3, *SHAPE))):
        torch.export.save(torch.export.export(net, (inputs,)), tmp_path / "net.pt2")
        with pytest.raises(InputError, match=r"its program cannot be run: it (takes|gives)"):
            Exported(tmp_path / "net.pt2")
