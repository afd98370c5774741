"""Which part of a checkpoint is taken, and what is stripped from its names."""

from __future__ import annotations

import pytest

from rprune.pipeline.states import STATE_KEYS, find_state

STATE = {"conv.weight": 1, "conv.bias": 2, "fc.weight": 3}


def named(prefix: str) -> dict[str, int]:
    return {prefix + name: value for name, value in STATE.items()}


@pytest.mark.parametrize("key", STATE_KEYS)
def test_a_state_dict_is_found_under_every_usual_key(key):
    found = find_state({"epoch": "3", "optimizer": {"lr": 0.1}, key: STATE}, int)
    assert (found.state, found.part, found.prefix) == (STATE, key, "")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "net.", "module._orig_mod.model.", "module.module."]
)
def test_prefixes_of_wrappers_are_taken_off_however_often(prefix):
    found = find_state(named(prefix), int)
    assert (found.state, found.part, found.prefix) == (STATE, "", prefix)


def test_a_prefix_of_some_names_only_is_part_of_them():
    state = named("model.") | {"head.weight": 4}
    assert find_state(state, int).state == state


def test_tables_in_tables():
    found = find_state({"net": {"state_dict": named("module.")}}, int)
    assert (found.state, found.part, found.prefix) == (STATE, "net.state_dict", "module.")


def test_the_first_usual_key_is_taken_and_the_others_are_told():
    found = find_state({"ema": STATE, "state_dict": named("module."), "other": STATE}, int)
    assert (found.part, found.others) == ("state_dict", ("ema",))
    assert str(found) == "'state_dict' of it, without the prefix module., not ema"


def test_the_only_table_of_tensors_is_taken_whatever_it_is_called():
    assert find_state({"resnet": STATE, "epoch": 3}, int).part == "resnet"


def test_the_counter_of_an_averaged_model_is_left_out():
    assert find_state(named("module.") | {"n_averaged": 7}, int).state == STATE


@pytest.mark.parametrize("content", [{}, [], 3, None, {"state_dict": {}}, {"model": {"a": "text"}}, {1: 2}])
def test_nothing_is_found_where_there_is_nothing(content):
    assert find_state(content, int) is None
