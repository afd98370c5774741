from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from rprune.reports.canvas import DARK, LIGHT
from rprune.reports.html import render_html
from rprune.reports.schema import Claim, Health, HealthCheck, Threat
from rprune.reports.text import length, percent, size
from rprune.threat import ThreatModel


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sample_report", Path(__file__).with_name("sample_report.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sample = _load()
SHORT = {"curves": False, "history": False, "profile": False}  # for tests that look at no plot
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Outline(HTMLParser):
    """Ids, addresses and text of a page; fails on tags that are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.addresses: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "action", "srcset"):
                self.addresses.append(value or "")
            self.targets += re.findall(r"url\(#([^)]+)\)", value or "")
        self.targets += [address[1:] for address in self.addresses if address.startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def page() -> str:
    return render_html(sample.sample_report(), sample.sample_images())


def test_key_figures_come_before_the_details(page: str) -> None:
    text = Outline(page).text
    figures = ["Gate passed", "77.2\u00a0%", "43.9\u00a0%", "11.2\u00a0%", "11.3\u00a0MB"]
    checks = ["rprune verify DIR", "rprune gate DIR/report.json --policy gate.toml", "Limitations"]
    order = [*figures, "Adversarial examples", "Claims", "Provenance", *checks]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_page_needs_nothing_from_outside(page: str) -> None:
    outline = Outline(page)
    assert not re.findall(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", page))
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in outline.addresses)
    assert not outline.tags & {"script", "link", "iframe", "object", "metadata"}
    assert "@import" not in page
    assert len(page.encode()) < 400_000


def test_page_forbids_itself_to_load_anything(page: str) -> None:
    head = page.partition("<style>")[0]
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', head)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert set(rules) == {"default-src", "img-src", "style-src", "base-uri", "form-action"}


def test_every_string_of_the_report_is_escaped(load_helper: Callable[[str], ModuleType]) -> None:
    hostile = load_helper("reports/hostile.py")
    report = hostile.hostile(sample.sample_report("failed"))
    images = [replace(image, label=hostile.EVIL, attack=hostile.EVIL) for image in sample.sample_images(2)]
    outline = Outline(render_html(report, images))
    assert not outline.tags & {"script", "link", "iframe", "object", "metadata", "a", "form", "base"}
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in outline.addresses)
    assert not [name for name in outline.attributes if name.startswith("on")]
    assert outline.text.count(hostile.EVIL) > 50


def test_outcome_of_a_stage_names_what_was_counted() -> None:
    entry = sample.sample_report().lineage[1]
    counts = {"macs": {"dense": 50, "sparse": 5}, "validation": {"score": 0.4, "validation_accuracy": 0.5}}
    report = sample.sample_report(lineage=[entry.model_copy(update={"metrics": counts})], **SHORT)
    text = " ".join(Outline(render_html(report)).text.split())
    assert "macs dense 50; macs sparse 5; validation accuracy 50.0\u00a0%" in text.replace("50.0 %", "50.0\u00a0%")


def test_ids_are_unique_and_every_reference_has_a_target(page: str) -> None:
    outline = Outline(page)
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.targets) <= set(outline.ids)


def test_no_plot_keeps_a_fixed_colour(page: str) -> None:
    plots = "".join(re.findall(r"<svg.*?</svg>", page, re.S))
    assert (
        page.count("<svg") == 12
    )  # accuracy, three curves, two of distances, density, three histories, the search, weights
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", plots)) == set()


def test_colours_of_light_and_dark_come_from_one_place(page: str) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", page, re.S)
    for block, palette in ((light, LIGHT), (dark, DARK)):
        for name, colour in palette.items():
            assert block.count(f"--{name}: {colour};") == 1
    used = set(re.findall(r"var\(--([\w-]+)\)", page))
    assert used <= set(re.findall(r"--([\w-]+):", light))


def test_every_plot_has_a_text(page: str) -> None:
    labels = re.findall(r'<div role="img" aria-label="([^"]+)"><svg', page)
    assert len(labels) == len(set(labels)) == page.count("<svg")


def test_what_the_plots_show_is_not_written_out_as_well(page: str) -> None:
    text = Outline(page).text
    assert "selected epoch 17" in text
    for word in ("kept_by_layer", "allocations", "edges"):
        assert word not in text


def test_digests_and_claims_are_all_there(page: str) -> None:
    report = sample.sample_report()
    data = report.data
    digests = [report.id, report.recipe_sha256, report.policy_sha256, data.sha256, data.train_sha256]
    digests += [data.validation_sha256, *(s.sha256 for s in report.subjects), *(e.output for e in report.lineage)]
    for digest in digests:
        assert digest in page
    text = Outline(page).text
    for claim in report.claims:
        assert claim.id in text
        assert claim.sound_for in text
        assert f"{claim.correct:,} / {claim.n:,}" in text
    for layer in report.sparsity.by_layer:
        assert f'title="{layer.name}"' in page


def test_names_are_escaped_everywhere() -> None:
    evil = "<script>alert('$x$')</script>"
    report = sample.sample_report()
    layers = [layer.model_copy(update={"name": evil}) for layer in report.sparsity.by_layer]
    claims = [claim.model_copy(update={"id": f"{evil}{i}", "method": evil}) for i, claim in enumerate(report.claims)]
    claims = [_with_evil_attack(claim, evil) if claim.attacks else claim for claim in claims]
    lineage = [entry.model_copy(update={"stage": evil}) for entry in report.lineage]
    report = sample.sample_report(
        name=evil,
        claims=claims,
        lineage=lineage,
        sparsity=report.sparsity.model_copy(update={"by_layer": layers}),
        environment={evil: {evil: evil}},
    )
    images = [type(s)(s.index, evil, evil, evil, s.clean, s.adversarial, evil) for s in sample.sample_images(2)]
    outline = Outline(render_html(report, images))
    assert "script" not in outline.tags
    assert evil in outline.text


def _with_evil_attack(claim: Claim, evil: str) -> Claim:
    check = HealthCheck.of("R1", evil, 2.0, 1.0, evil)
    rows = [row.model_copy(update={"name": evil}) for row in claim.attacks]
    return claim.model_copy(update={"attacks": rows, "health": Health.of([check])})


def test_same_report_gives_the_same_bytes(page: str) -> None:
    assert render_html(sample.sample_report(), sample.sample_images()) == page


def test_rendering_leaves_the_plot_settings_alone() -> None:
    import matplotlib

    before = {key: value for key, value in matplotlib.rcParams.items() if key != "backend"}
    render_html(sample.sample_report(**SHORT))
    assert {key: value for key, value in matplotlib.rcParams.items() if key != "backend"} == before


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ("passed", "Gate passed: all 4 rules are met"),
        ("failed", "Gate failed: 1 of 4 rules is not met"),
        (None, "No gate: this report was not held against a policy"),
    ],
)
def test_verdict(gate: str | None, words: str) -> None:
    text = Outline(render_html(sample.sample_report(gate, **SHORT))).text
    assert words in text
    assert sum(part in text for part in ("Gate passed", "Gate failed", "No gate")) == 1
    assert ("✗ fail" in text) == (gate == "failed")


def test_attacks_show_what_each_added(page: str) -> None:
    text = Outline(page).text.replace("\u00a0", " ")
    rows = [re.findall(r"<td[^>]*>([^<]*)", row.replace("\u00a0", " ")) for row in re.findall(r"<tr>.*?</tr>", page)]
    assert "Robust accuracy, int8 ONNX: 43.9 % L∞, eps 8/255, aa-quant" in text
    assert ["apgd-ce", "white-box", "660", "291", "29.1 %", "48.1 %", "3", "56,300"] in rows
    assert ["square", "black-box", "329", "2", "0.2 %", "43.9 %", "0", "1,640,000"] in rows
    assert ["R4", "✓ ok", "black-box beats white-box", "0.002", "0.002", "square after apgd-t"] in rows
    assert text.count("✓ ok") == 28
    assert text.count("does not apply") == 2
    assert text.count("certified ones are skipped") == 1  # of the int8 file alone
    for word in ("UNRELIABLE", "INCOMPLETE", "✗ failed"):
        assert word not in text


def test_attack_that_did_not_run_says_so() -> None:
    report = sample.sample_report(**SHORT)
    claim = report.claim("robust_accuracy")
    rows = [row.model_copy(update={"tried": 0, "broken": 0}) for row in claim.attacks]
    claims = [claim.model_copy(update={"attacks": rows, "complete": False})]
    text = Outline(render_html(sample.sample_report(claims=claims, **SHORT))).text
    assert text.count("did not run") == 4


@pytest.mark.parametrize(
    ("gate", "weak", "complete"), [("passed", True, True), ("passed", False, False), (None, True, False)]
)
def test_weak_attack_is_marked_beside_its_number_everywhere(gate: str | None, weak: bool, complete: bool) -> None:
    report = sample.sample_report(gate, weak=weak, complete=complete, curves=True, history=False, profile=False)
    page = render_html(report)
    marks = ["UNRELIABLE"] * weak + ["INCOMPLETE"] * (not complete)
    badges = " ".join(f'<b class="badge">{mark}</b>' for mark in marks)
    assert page.count(badges) == 3  # the card, the attacks, the claims
    svg = re.findall(r"<svg.*?</svg>", page, re.S)
    for mark in marks:
        assert [mark in plot for plot in svg] == [True, False, True, False, False, True, False]
    top = page[page.index("<header>") : page.index('<p class="meta">')]
    assert ("UNRELIABLE: R4 black-box beats white-box, R6 right at a huge eps, R10" in top) == weak
    assert ("INCOMPLETE: not every attack of the suite ran to its end" in top) == (not complete)
    assert ("Gate failed: 1 of 4 rules is not met" in top) == (gate is not None)
    text = Outline(page).text
    assert text.count("✗ failed") == 3 * weak


def test_marks_stay_when_the_gate_allows_them() -> None:
    from rprune.reports.gate import Policy, judge

    report = sample.sample_report(None, weak=True, **SHORT)
    rules = [{"metric": "robust_accuracy", "value": 0.4, "allow_unreliable": True}]
    gate = judge(report, Policy.model_validate({"gate": rules}))
    page = render_html(report.model_copy(update={"gate": gate}))
    assert "Gate passed: the only rule is met" in page
    assert page.count('<b class="badge">UNRELIABLE</b>') == 3
    assert "allowed: 0.4390" in Outline(page).text


def test_strip_says_which_attack_and_how_far(page: str) -> None:
    text = Outline(page).text
    for name in ("by apgd-ce", "by apgd-t", "by transfer of apgd-t", "by square"):
        assert text.count(name) >= 2
    assert text.count("L∞ 8/255") == 8


def test_reports_of_the_first_kind_render() -> None:
    text = Outline(render_html(sample.sample_report(attacked=False, **SHORT))).text
    assert "UNEXAMINED" in text
    assert "Check of the attack's health" not in text


def test_absent_parts_are_left_out() -> None:
    report = sample.sample_report(None, fidelity=[], limitations=[], attacked=False, **SHORT)
    page = render_html(report)
    text = Outline(page).text
    assert page.count("<svg") == 2
    for heading in ("Adversarial examples", "Still right", "Limitations", "Files against their sources", "Judged by"):
        assert heading not in text


def test_a_report_with_hardly_anything_renders() -> None:
    sparsity = sample.sample_report().sparsity.model_copy(update={"by_layer": [], "target": None, "budget": None})
    report = sample.sample_report(None, claims=[], lineage=[], subjects=[], sparsity=sparsity, size={})
    assert "<svg" not in render_html(report)


def test_float_only_bundle_shows_the_float_file() -> None:
    report = sample.sample_report()
    keep = [claim for claim in report.claims if claim.artifact == "onnx"]
    subjects = [subject for subject in report.subjects if subject.role == "onnx"]
    text = Outline(render_html(sample.sample_report(None, claims=keep, subjects=subjects, **SHORT))).text
    assert "77.8\u00a0%" in text
    assert "File size, float ONNX" in text


def test_metric_that_is_not_claimed_is_said_so() -> None:
    from rprune.reports.gate import Policy, judge

    report = sample.sample_report(None, claims=[], **SHORT)
    gate = judge(report, Policy.model_validate({"gate": [{"metric": "robust_accuracy", "value": 0.4}]}))
    text = Outline(render_html(report.model_copy(update={"gate": gate}))).text
    assert "Gate failed: 1 of 1 rules is not met" in text
    assert "not claimed" in text


def test_dead_and_dense_layers_render() -> None:
    report = sample.sample_report()
    first, second, *_ = report.sparsity.by_layer
    layers = [first.model_copy(update={"nonzero": 0, "sparsity": 1.0}), second]
    for chosen in (layers, layers[:1]):
        sparsity = report.sparsity.model_copy(update={"by_layer": chosen})
        page = render_html(sample.sample_report(sparsity=sparsity, **SHORT))
        assert "0.0\u00a0%" in Outline(page).text


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_hold_the_pixels(channels: int) -> None:
    import base64
    import io

    from matplotlib.image import imread

    images = sample.sample_images(9, channels)
    page = render_html(sample.sample_report(**SHORT), images)
    found = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(found) == 3 * 8
    clean, added, adversarial = (imread(io.BytesIO(base64.b64decode(text)))[..., :3] for text in found[:3])
    wanted = np.broadcast_to(images[0].clean.transpose(1, 2, 0), clean.shape)
    assert np.abs(clean - wanted).max() <= 0.5 / 255 + 1e-6
    factor = int(re.search(r"× (\d+)", page).group(1))  # type: ignore[union-attr]
    moved = np.abs(adversarial - clean) * factor
    assert np.abs(np.abs(added - 0.5) - moved).max() <= (factor + 1) / 255
    assert float(np.abs(added - 0.5).max()) <= 0.51


@pytest.mark.parametrize(
    ("share", "text"), [(0.772, "77.2 %"), (0.99996, "99.996 %"), (1.0, "100.0 %"), (0.0, "0.0 %"), (0.0001, "0.01 %")]
)
def test_percent_never_rounds_to_all_or_nothing(share: float, text: str) -> None:
    assert percent(share).replace("\u00a0", " ") == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (12_345, "12.3 KB"), (999_900, "1 MB"), (44e6, "44 MB")],
)
def test_size(count: float, text: str) -> None:
    assert size(count).replace("\u00a0", " ") == text


@pytest.mark.parametrize(
    ("norm", "eps", "distance", "text"),
    [("linf", "8/255", 8 / 255, "8/255"), ("linf", "8 / 255", 0.03, "7.65/255"), ("l2", "0.5", 0.4837, "0.484")],
)
def test_length_is_written_in_the_unit_of_eps(norm: str, eps: str, distance: float, text: str) -> None:
    assert length(distance, Threat.of(ThreatModel.of(norm, eps))) == text


def test_rendering_needs_no_torch() -> None:
    code = (
        "import runpy, sys; from rprune.reports.html import render_html; "
        "assert 'matplotlib' not in sys.modules and 'jinja2' not in sys.modules; "
        f"sample = runpy.run_path({str(Path(sample.__file__ or ''))!r}); "
        "render_html(sample['sample_report'](), sample['sample_images'](1)); "
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
