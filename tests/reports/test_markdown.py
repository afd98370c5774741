"""The Markdown, read by a parser of it."""

from __future__ import annotations

import re

import pytest
from markdown_it import MarkdownIt

from rprune.reports.gate import Policy, judge
from rprune.reports.markdown import escape, render_markdown, table

MARKUP = ("link_open", "image", "em_open", "strong_open", "s_open", "code_inline", "html_block", "hr")


def parsed(text):
    """Tokens, those inside of lines among them."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    return [inner for token in tokens for inner in (token, *(token.children or []))]


def shown(text):
    return "".join(token.content for token in parsed(text) if token.type == "text")


def cells(text):
    """Number of cells in every row of every table."""
    rows = []
    for token in parsed(text):
        if token.type == "tr_open":
            rows.append(0)
        elif token.type in ("th_open", "td_open"):
            rows[-1] += 1
    return rows


def test_verdict_stands_before_claims_and_claims_before_all_else(sample):
    text = render_markdown(sample("failed"))
    order = [
        "Gate failed: 1 of 4 rules",
        "is not >= 0.48",
        "## Claims",
        "at most 43.9 %",
        "## Gate",
        "## Attacks",
        "## Files",
    ]
    places = [text.index(part) for part in [*order, "## How it was made", "## Limitations", "rprune verify DIR"]]
    assert places == sorted(places)


def test_every_claim_has_count_interval_and_threat(sample):
    report = sample()
    text = render_markdown(report)
    for claim in report.claims:
        row = next(line for line in text.splitlines() if line.startswith(f"| {claim.metric.replace('_', ' ')}") and
                   f"{claim.correct} / {claim.n:,}" in line)  # fmt: skip
        assert f"{100 * claim.interval.lower:.1f} % to {100 * claim.interval.upper:.1f} %" in row
        assert (claim.threat is None) == ("eps" not in row)


def test_every_digest_is_written_out(sample):
    report = sample()
    text = render_markdown(report)
    for digest in [report.id, report.data.sha256, report.recipe_sha256, *(s.sha256 for s in report.subjects)]:
        assert digest in text


def test_weak_and_unfinished_attacks_are_named_first_and_beside_the_number(sample):
    text = render_markdown(sample(None, weak=True, complete=False))
    before, after = text.split("## Claims")
    assert "UNRELIABLE: R4 black-box beats white-box" in before
    assert "INCOMPLETE: not every attack" in before
    assert "at most 43.9 % UNRELIABLE INCOMPLETE" in after


def test_attack_whose_health_nobody_looked_at_is_marked(sample):
    assert "43.9 % UNEXAMINED" in render_markdown(sample(None, attacked=False))


def test_what_the_report_does_not_say_is_left_out(sample):
    text = render_markdown(sample(None, claims=[], lineage=[], limitations=[], model={}))
    for heading in (
        "## Claims",
        "## Gate",
        "## Attacks",
        "## How it was made",
        "## Limitations",
        "Architecture",
        "Input",
    ):
        assert heading not in text
    assert "No gate" in text


def test_bar_of_a_gate_is_named_where_there_is_one(sample):
    assert "--policy gate.toml" in render_markdown(sample())
    assert "--policy" not in render_markdown(sample(None))


@pytest.mark.parametrize("evil", ["EVIL", "BROKEN"])
def test_no_text_of_the_report_becomes_markup(sample, hostile, evil):
    honest, report = sample("failed"), hostile.hostile(sample("failed"), getattr(hostile, evil))
    text = render_markdown(report)
    kinds = [[token.type for token in parsed(page)] for page in (render_markdown(honest), text)]
    for kind in (
        *MARKUP,
        "heading_open",
        "bullet_list_open",
        "blockquote_open",
        "ordered_list_open",
        "table_open",
        "fence",
    ):
        assert kinds[0].count(kind) == kinds[1].count(kind), kind
    assert {token.content for token in parsed(text) if token.type == "html_inline"} <= {"<!-- -->"}
    assert set(cells(text)) <= set(cells(render_markdown(honest)))
    if evil == "EVIL":
        assert hostile.EVIL in shown(text)


def test_addresses_and_mentions_are_no_links_on_github(hostile):
    text = escape(hostile.EVIL)
    assert not re.search(r"://|www\.|@\w", text)
    assert shown(text) == hostile.EVIL


@pytest.mark.parametrize(
    "text", ["a|b", "a\\|b", "\\", "|", "a\n|b|\n|--|", "<b>", "- x", "1. x", "12) x", "# x", "> x", "=="]
)
def test_cell_shows_its_text_and_nothing_else(text):
    page = table(["One", "Two>"], [[text, "1"]])
    assert cells(page) == [2, 2]
    assert shown(page) == f"OneTwo{' '.join(text.split())}1"
    assert shown(f"- {escape(text)}") == " ".join(text.split())


def test_numbers_are_not_escaped():
    assert escape("0.2312, 95 % bound") == "0.2312, 95 % bound"


def test_same_report_gives_the_same_text(sample):
    assert render_markdown(sample()) == render_markdown(sample())


def test_rule_that_allows_it_passes_with_the_flag_in_its_note(sample):
    report = sample(None, weak=True)
    policy = Policy.model_validate({"gate": [{"metric": "robust_accuracy", "value": 0.4, "allow_unreliable": True}]})
    text = render_markdown(report.model_copy(update={"gate": judge(report, policy)}))
    assert "UNRELIABLE" in next(line for line in text.splitlines() if "passed |" in line)
