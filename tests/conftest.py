"""Shapes and types at the signatures of the numeric floors are checked in every test.

Not those of models/: torch.fx calls their forward with proxies instead of tensors.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import beartype
from beartype import BeartypeConf
from jaxtyping import install_import_hook

CHECKED = ("attacks", "certification", "data", "evaluation", "objectives", "pruning", "quantization", "training")
# an int may stand where a float is annotated (PEP 484's numeric tower)
beartype.beartype = beartype.beartype(conf=BeartypeConf(is_pep484_tower=True))
install_import_hook([f"rprune.{name}" for name in CHECKED], "beartype.beartype")

import pytest  # noqa: E402  the hook must come before the first import of rprune
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--rprune-method",
        action="append",
        default=[],
        metavar="FILE.py:CLASS",
        help="run the contract suite of pruning methods on this one alone; repeatable",
    )
    parser.addoption("--update-docs", action="store_true", help="write docs/errors.md from what the commands say")


def pytest_generate_tests(metafunc):
    if metafunc.definition.get_closest_marker("every_method"):
        from rprune.pruning.base import METHODS

        metafunc.parametrize("name", metafunc.config.getoption("--rprune-method") or list(METHODS.all()))


def pytest_collection_modifyitems(config, items):
    if config.getoption("--rprune-method"):
        chosen = [item for item in items if item.get_closest_marker("every_method")]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.fixture
def c_cache(tmp_path_factory, monkeypatch):
    """Compiled C goes to a folder of the tests' own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "c-cache"))


@pytest.fixture(scope="session")
def load_helper():
    """Import a helper file below tests/ (tests are no package)."""

    def load(name: str) -> ModuleType:
        path = Path(__file__).parent / name
        key = f"rprune_test_{path.stem}"
        if key not in sys.modules:
            spec = importlib.util.spec_from_file_location(key, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[key] = module
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[key]
                raise
        return sys.modules[key]

    return load


@pytest.fixture(scope="session")
def vectors():
    """The numeric vectors of HYDRA, HARP and Robust-ADMM."""
    import json

    return json.loads((Path(__file__).parent / "data" / "vectors-hydra-harp-admm.json").read_text())


@pytest.fixture(scope="session")
def vectors_others():
    """The numeric vectors of the other pruning systems and allocators."""
    import json

    return json.loads((Path(__file__).parent / "data" / "vectors-others.json").read_text())


@pytest.fixture(scope="session")
def oracle_net(load_helper):
    """(net, x, y): adversarially trained net and 256 images of the attack oracle (linf 0.08)."""
    return load_helper("oracles/attack_oracle.py").load()
