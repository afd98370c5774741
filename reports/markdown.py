"""The report as Markdown, as GitHub writes it. What stands in it of the report cannot become markup."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from rprune.errors import one_line
from rprune.reports.schema import Claim, Report
from rprune.reports.text import (
    BOUNDS,
    FORMS,
    KINDS,
    METRICS,
    SMOKE,
    architecture,
    data_name,
    doubts,
    duration,
    file_of,
    flags,
    image,
    judged,
    main_role,
    number,
    percent,
    sides,
    threat,
    verdict,
    what,
    words,
)

NAMED = 20  # classes that are named one by one


def render_markdown(report: Report) -> str:
    """The whole report but for its plots and pictures."""
    sections = (
        f"# {escape(report.name)}: integrity report",
        opening(report),
        claims(report),
        _gate(report),
        *(_attacks(report, claim) for claim in report.claims if claim.attacks or claim.health),
        usage(report),
        files(report),
        _layers(report),
        _lineage(report),
        _provenance(report),
        limitations(report),
        recheck(report),
    )
    return joined(*sections) + "\n"


def joined(*sections: str) -> str:
    """Sections with an empty line between them; those that have nothing to say are left out."""
    return "\n\n".join(section for section in sections if section)


def escape(text: object) -> str:
    """Text that shows itself, in one line: no HTML, emphasis, link, mention, list or cell of a table comes of it.

    Addresses are broken by an empty comment, since GitHub links them without any markup.
    """
    line = " ".join(one_line(str(text)).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;")
    line = re.sub(r"([\\`*_~$[\]])", r"\\\1", line).replace("|", "&#124;")
    line = re.sub(r"^([-+#=>])|^(\d+)(?=[.)](\s|$))", r"\2\\\1", line)
    return re.sub(r"(?<=:)(?=//)|(?<=www)(?=\.)|(?<=@)", "<!-- -->", line, flags=re.IGNORECASE)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Every cell is escaped; columns whose title ends in ``>`` stand to the right."""
    titles = [title.rstrip(">") for title in header]
    rule = ["---:" if title.endswith(">") else "---" for title in header]
    lines = [titles, rule, *([escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(lines: Sequence[object]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def opening(report: Report) -> str:
    """Verdict, rules that are not met, and everything that makes a number less than it seems."""
    missed = [] if report.gate is None else [rule for rule in report.gate.rules if not rule.passed]
    wrong = [f"{words(judged(rule))}, {form(rule.artifact)}: {rule.message}" for rule in missed]
    wrong += [f"{title(claim)}: {'; '.join(doubts(claim))}" for claim in report.claims if doubts(claim)]
    wrong += [f"Warning: {line}" for line in report.warnings]
    tool = f"{report.tool.get('name', '')} {report.tool.get('version', '')}"
    made = f"Report {report.id}, made {report.created} by {tool}; {threat(report.threat)} in {report.threat.space}; "
    smoke = f"**{SMOKE}.**" if report.smoke else ""
    return joined(smoke, f"**{verdict(report)[1]}.**", bullets(wrong), escape(f"{made}self-attested."))


def claims(report: Report) -> str:
    if not report.claims:
        return ""
    header = ["Claim", "File", "Value>", "Count>", "95 % interval", "Threat", "Kind", "Method"]
    proved = [claim for claim in report.claims if claim.kind.startswith("certified") and claim.sound_for]
    return joined(
        "## Claims",
        table(header, [_claim(claim, report) for claim in report.claims]),
        bullets([f"{title(claim)}, holds for: {claim.sound_for}" for claim in proved]),
    )


def _claim(claim: Claim, report: Report) -> list[str]:
    level = "" if claim.interval.level == 0.95 else f" ({claim.interval.level:g})"
    return [
        words(claim.metric),
        file_of(claim, report),
        " ".join([BOUNDS[claim.kind], percent(claim.value), *flags(claim)]),
        f"{number(claim.correct)} / {number(claim.n)}",
        f"{percent(claim.interval.lower)} to {percent(claim.interval.upper)}{level}",
        threat(claim.threat) if claim.threat else "",
        KINDS[claim.kind],
        claim.method,
    ]


def _gate(report: Report) -> str:
    if report.gate is None:
        return ""
    rows = []
    for rule in report.gate.rules:
        observed, threshold = sides(rule)
        result = "passed" if rule.passed else "FAILED"
        rows.append(
            [words(judged(rule)), form(rule.artifact), observed, f"{rule.op} {threshold}", result, rule.message]
        )
    return f"## Gate\n\n{table(['Rule', 'File', 'Observed>', 'Threshold>', 'Result', 'Note'], rows)}"


def _attacks(report: Report, claim: Claim) -> str:
    """What each attack added, and whether it was sound."""
    rows = [
        [row.name, row.kind, number(row.tried), number(row.broken), number(row.misses), number(row.queries)]
        if row.tried
        else [row.name, row.kind, "did not run", "", "", ""]
        for row in claim.attacks
    ]
    header = ["Attack", "Kind", "Tried>", "Broken>", "Only the search net>", "Forward passes>"]
    checks = [] if claim.health is None else claim.health.checks
    health = [
        f"{check.id} {check.name}: FAILED, {number(check.value)} of at most {number(check.limit)}; {check.detail}"
        for check in checks
        if not check.passed
    ]
    idle = sum(check.value is None for check in checks)
    passed = len(checks) - idle - len(health)
    said = f"Checks of its health: {passed} passed, {len(health)} failed, {idle} not applicable."
    return joined(
        f"## Attacks: {escape(title(claim))}",
        escape(f"{file_of(claim, report)}: {claim.sound_for}" if claim.sound_for else file_of(claim, report)),
        table(header, rows) if rows else "",
        said if checks else "The health of the attack was not examined.",
        bullets(health),
    )


def usage(report: Report) -> str:
    """What goes in and comes out."""
    taken, name, names = image(report), architecture(report), report.data.classes
    lines = [f"Input: {taken}"] if taken else []
    few = f": {', '.join(names)}" if len(names) <= NAMED else ""
    lines += [f"Output: logits of {number(len(names))} classes{few}"] if names else []
    lines += [f"Architecture: {name}"] if name else []
    return f"## Model\n\n{bullets(lines)}" if lines else ""


def files(report: Report, roles: Sequence[str] | None = None) -> str:
    """The files of the bundle, or those of the given roles."""
    ratios = report.footprint.ratios if report.footprint else {}
    rows = [
        [s.name, s.role, number(s.bytes), f"{ratios[s.name]:.1f}" if s.name in ratios else "", s.sha256]
        for s in report.subjects
        if roles is None or s.role in roles
    ]
    header = ["File", "Role", "Bytes>", "Dense float32 over it>", "sha256"]
    return f"## Files\n\n{table(header, rows)}" if rows else ""


def sparsity(report: Report) -> str:
    s = report.sparsity
    goal = "" if s.target is None else f", target {percent(s.target, 2)}"
    kept = f"{number(s.kept)} of {number(s.total)} weights in {form(s.measured_on)} are not zero"
    return escape(f"Sparsity {percent(s.overall, 2)}{goal}: {kept}. Definition: {s.definition}.")


def _layers(report: Report) -> str:
    rows = [
        [layer.name, "×".join(map(str, layer.shape)), number(layer.nonzero), percent(layer.sparsity, 2)]
        for layer in report.sparsity.by_layer
    ]
    header = ["Layer", "Shape", "Kept>", "Sparsity>"]
    return joined("## Sparsity", sparsity(report), table(header, rows) if rows else "")


def _lineage(report: Report) -> str:
    rows = [[entry.stage, what(entry), duration(entry.seconds), entry.output] for entry in report.lineage]
    return f"## How it was made\n\n{table(['Stage', 'What', 'Time>', 'Tensors after'], rows)}" if rows else ""


def _provenance(report: Report) -> str:
    data = report.data
    lines = [
        f"Data: {data_name(report)}",
        f"Images: {number(data.samples)} for testing, {number(data.validation_samples)} for validation",
        f"Test split: {data.sha256}",
        f"Validation split: {data.validation_sha256}",
        f"Training split: {data.train_sha256}",
        f"Selection: {data.selection}",
        f"Recipe: {report.recipe_sha256}",
    ]
    lines += [f"Policy of the run: {report.policy_sha256}"] if report.policy_sha256 else []
    lines += [f"Policy of the gate: {report.gate.policy_sha256}"] if report.gate else []
    lines += [f"Source of the tool: {report.tool['source_sha256']}"] if "source_sha256" in report.tool else []
    return f"## Provenance\n\nDigests are sha256.\n\n{bullets(lines)}"


def limitations(report: Report) -> str:
    return f"## Limitations\n\n{bullets(report.limitations)}" if report.limitations else ""


def recheck(report: Report) -> str:
    """The commands, of which each says more than the one before."""
    subject = report.subject(main_role(report))
    policy = " --policy gate.toml" if report.gate else ""
    commands = ["rprune verify DIR --level static", f"rprune verify DIR{policy}", "rprune verify DIR --level reattack"]
    commands += [f"rprune gate DIR{policy}"] if policy else []
    if subject is not None:
        file, eps = shlex.quote(f"DIR/{one_line(subject.name)}"), shlex.quote(one_line(report.threat.eps))
        commands.append(f"rprune attack {file} --norm {report.threat.norm} --eps {eps}")
    return joined(
        "## How to re-check this",
        "DIR is the folder with report.json and the files above. `verify` recomputes digests, sparsity, sizes and "
        "counts; with the test data (`--data`, where it lies elsewhere) it replays predictions and "
        f"{number(report.evidence.witness_count)} witnesses. `reattack` searches, proves and draws anew; `attack` "
        "takes any suite.",
        "```\n" + "\n".join(commands) + "\n```",
    )


def title(claim: Claim) -> str:
    return f"{METRICS[claim.metric]} accuracy, {form(claim.artifact)}"


def form(role: str) -> str:
    return FORMS.get(role, role)
