from __future__ import annotations

import pytest

from rprune.errors import IntegrityError
from rprune.reports.renderings import RENDERINGS, rendered


@pytest.mark.parametrize("name", RENDERINGS)
def test_same_report_gives_the_same_bytes(sample, name):
    assert rendered(sample(), name) == rendered(sample(), name)


@pytest.mark.parametrize("name", RENDERINGS)
def test_every_rendering_marks_weak_and_unfinished_attacks(sample, name):
    text = rendered(sample(None, weak=True, complete=False), name)
    assert "UNRELIABLE" in text
    assert "INCOMPLETE" in text
    sound = rendered(sample(None), name)
    assert "UNRELIABLE" not in sound
    assert "INCOMPLETE" not in sound


@pytest.mark.parametrize("name", [name for name in RENDERINGS if name != "intoto"])
def test_a_smoke_run_says_so(sample, name):
    """An attestation holds the whole report, and the verdict of a gate that no smoke run passes."""
    assert "smoke" in rendered(sample(None, smoke=True), name).lower()
    assert "smoke" not in rendered(sample(None), name).lower()


@pytest.mark.parametrize("name", RENDERINGS)
def test_report_without_options_is_rendered(sample, name):
    bare = {
        "claims": [],
        "lineage": [],
        "limitations": [],
        "model": {},
        "recipe": {},
        "environment": {},
        "fidelity": [],
    }
    assert rendered(sample(None, **bare), name)


@pytest.mark.parametrize("change", [{"name": "another"}, {"recipe": {"x": float("nan")}}, {"recipe": {"x": "\ud800"}}])
def test_report_that_was_changed_has_no_rendering(sample, change):
    with pytest.raises(IntegrityError, match="its id"):
        rendered(sample().model_copy(update=change), "markdown")
