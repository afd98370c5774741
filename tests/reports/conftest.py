"""Reports to render and to compare."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def sample(load_helper):
    """``sample(gate, ...)``: a report."""
    return load_helper("reports/sample_report.py").sample_report


@pytest.fixture(scope="session")
def hostile(load_helper):
    """Strings of a stranger's, and a report full of them."""
    return load_helper("reports/hostile.py")


@pytest.fixture(scope="session")
def helper(load_helper):
    """Two reports of the same samples."""
    return load_helper("reports/paired_reports.py")


@pytest.fixture
def write(helper, sample, tmp_path):
    """``write(name, clean, robust, ...)``: a bundle in a folder of that name."""

    def make(name, *shares, **more):
        helper.write_bundle(tmp_path / name, sample, *shares, **more)
        return tmp_path / name

    return make
