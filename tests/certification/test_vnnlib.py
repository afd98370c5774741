"""VNN-LIB files, read back by a small parser of their own: boxes to the last bit, and the negated property."""

from __future__ import annotations

import re

import numpy as np
import pytest

from rprune.certification.vnnlib import property_text

SHAPE = (2, 3, 4)


def parsed(text: str):
    """Nested lists of a file's expressions, comments left out."""
    tokens = re.findall(r"[()]|[^\s()]+", re.sub(r";.*", "", text))
    stack: list[list] = [[]]
    for token in tokens:
        if token == "(":
            stack.append([])
        elif token == ")":
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(token)
    assert len(stack) == 1
    return stack[0]


def box():
    lo = np.random.RandomState(0).rand(*SHAPE) * 10.0 ** -np.random.RandomState(1).randint(0, 12, SHAPE)
    return lo, lo + 0.1


def test_version_1() -> None:
    lo, hi = box()
    found = parsed(property_text(lo, hi, 2, 4, "1.0", "a title"))
    declared = [line[1] for line in found if line[0] == "declare-const"]
    assert declared == [f"X_{i}" for i in range(24)] + [f"Y_{i}" for i in range(4)]
    asserted = [line[1] for line in found if line[0] == "assert"]
    bounds = {(kind, name): float(value) for kind, name, value in asserted[:-1]}
    assert [bounds[">=", f"X_{i}"] for i in range(24)] == lo.ravel().tolist()
    assert [bounds["<=", f"X_{i}"] for i in range(24)] == hi.ravel().tolist()
    assert asserted[-1] == ["or", *[["and", [">=", f"Y_{j}", "Y_2"]] for j in (0, 1, 3)]]


def test_version_2() -> None:
    lo, hi = box()
    text = property_text(lo, hi, 0, 2, "2.0")
    assert text.startswith("(vnnlib-version <2.0>)\n(declare-network f (declare-input X float32 [1, 2, 3, 4])")
    found = dict(re.findall(r"\(assert \(>= X\[0, (\d, \d, \d)\] ([\d.]+)\)\)", text))
    assert len(found) == 24
    assert all(float(value) == lo[tuple(map(int, place.split(", ")))] for place, value in found.items())
    highs = dict(re.findall(r"\(assert \(<= X\[0, (\d, \d, \d)\] ([\d.]+)\)\)", text))
    assert all(float(value) == hi[tuple(map(int, place.split(", ")))] for place, value in highs.items())
    assert not re.search(r"\de-?\d", text)
    assert text.endswith("(assert (>= Y[0, 1] Y[0, 0]))\n")


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_titles_are_comments(version) -> None:
    lo, hi = box()
    text = property_text(lo, hi, 0, 3, version, "one\ntwo")
    assert text.startswith("; one\n; two\n(")
