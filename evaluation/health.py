"""Attack health: signs that an attack is weak or a claim malformed. A claim with a failed check is unreliable.

The checks are the warnings of AutoAttack (Croce and Hein, ICML 2020; `flags_doc.md` of its code), the symptoms of
obfuscated gradients (Athalye et al., ICML 2018, section 3.1), the checklist of Carlini et al. (2019, section 5), and
what certified, pruned and 8-bit artifacts add to them. The limits are those at which, over eight small models, every
planted fault was caught and no honest model was (the project's fact sheet on attacks, section 4).

Where a limit is a share of samples, one sample alone does not exceed it: in a small set that is a sign of nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rprune.attacks.base import cross_entropy, frozen
from rprune.data.loaders import Batch
from rprune.evaluation.outcome import Robustness
from rprune.evaluation.probe import Probe, logits_of
from rprune.evaluation.robustness import grid_room
from rprune.evaluation.target import INVALID, Target
from rprune.seeds import derive
from rprune.threat import ThreatModel

REPEATS = 5  # of the forward pass; AutoAttack's number
COMPANY = 8  # samples that are looked at alone and in company
FLAT = 1e-3  # logits between the first and the third class: below it float32 and losses lose their meaning
WORSE = 0.01  # of the clean margin: by so much may 100 iterations end behind 10
STEEP = 3.0  # no curve of robust accuracy over eps falls faster, in units of the claim's eps

Finding = tuple[float | None, str]
"""The value of a check, None where it does not apply, and one sentence."""


@dataclass(frozen=True)
class Check:
    """One check of a claim, passed while ``value`` does not exceed ``limit`` or where it does not apply (None)."""

    id: str
    name: str
    value: float | None
    limit: float
    detail: str

    @property
    def passed(self) -> bool:
        return self.value is None or self.value <= self.limit


def examine(
    target: Target,
    probe: Batch,
    threat: ThreatModel,
    outcome: Robustness,
    seed: int = 0,
) -> tuple[Check, ...]:
    """All checks, in order of their ids.

    Args:
        probe: samples of ``outcome`` that the artifact gets right, some 128. Each costs about 200 gradients.
        outcome: what the suite did.
    """
    case = Probe(target, probe, threat, outcome, derive(seed, "health"))
    nets = [*case.functions, *target.parents]
    training = any(module.training for net in nets for module in net.modules())
    with ExitStack() as stack:
        for net in nets:
            stack.enter_context(frozen(net))
        checks = tuple(_check(rule, case) for rule in RULES)
    if not training:
        return checks
    seen = "a module is in training mode: its batch statistics or its dropout are at work"
    return tuple(replace(check, value=1.0, detail=seen) if check.id == "R12" else check for check in checks)


def _check(rule: Rule, case: Probe) -> Check:
    value: float | None = None
    if rule.needs == "gradients" and case.target.search is None:
        detail = "needs gradients, and there is no search net"
    elif rule.needs != "nothing" and case.n == 0:
        detail = "there is no sample that the artifact gets right"
    else:
        value, detail = rule.look(case)
    return Check(rule.id, rule.name, value, rule.limit, detail)


def share(count: int, n: int) -> float:
    """Of n samples; 0 for a single one, and where a difference is negative."""
    return count / n if count > 1 else 0.0


def _count(mask: Tensor) -> int:
    return int(mask.sum())


def relative_difference(a: Float[Tensor, "b k"], b: Float[Tensor, "b k"]) -> float:
    """The largest over samples of max |a - b| / max |a|; what is not finite counts as equal: R2 reports it."""
    difference = (a - b).abs().amax(1) / a.abs().amax(1).clamp_min(1e-30)
    return float(difference.nan_to_num(0.0, 0.0).max())


def randomised(case: Probe) -> Finding:
    worst = 0.0
    for net in case.functions:
        first = logits_of(net, case.batch.x)
        worst = max(worst, *(relative_difference(first, logits_of(net, case.batch.x)) for _ in range(REPEATS - 1)))
    return worst, f"{REPEATS} passes differ by {worst:.1g} of the largest logit"


def malformed(case: Probe) -> Finding:
    """Not by the runs: an attack never returns a point where the logits are no numbers."""
    invalid = sum(tally.invalid for tally in case.outcome.tallies) + _count(case.outcome.clean.predicted == INVALID)
    for net in case.functions:
        logits = torch.cat([logits_of(net, place) for place in case.places])
        invalid += _count(~logits.isfinite().all(1))
        if bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all()):
            return 1.0, "the net ends in a softmax: attacks need logits"
    return float(invalid), f"logits are not finite at {invalid} points"


def dead_gradient(case: Probe) -> Finding:
    x = case.batch.x.detach().requires_grad_()
    gradient = torch.zeros_like(x)
    with torch.enable_grad():
        logits = case.net(x)
        if logits.requires_grad:
            loss = cross_entropy(case.batch.y)(logits).sum()
            (gradient,) = torch.autograd.grad(loss, x, materialize_grads=True)
    flat = gradient.flatten(1)
    dead = _count((flat == 0).all(1) | ~flat.isfinite().all(1))
    return share(dead, case.n), f"cross-entropy has no gradient at {dead} of {case.n} images"


def black_box_wins(case: Probe) -> Finding:
    """Black-box attacks of the suite behind its last white-box attack, and a short one here where gradients failed."""
    kinds = [tally.kind for tally in case.outcome.tallies]
    behind = len(kinds) - kinds[::-1].index("white-box") if "white-box" in kinds else len(kinds)
    suite = sum(tally.broken for tally in case.outcome.tallies[behind:] if tally.kind == "black-box")
    here = _count(case.blind.broken)
    total = len(case.outcome.ids)
    return max(share(suite, total), share(here, case.n)), (
        f"what gradients left, random search breaks: {suite} of {total} in the suite, {here} of {case.n} in a short run"
    )


def noise_wins(case: Probe) -> Finding:
    noise, guided = _count(case.noise.broken), _count(case.ce.broken)
    return share(noise - guided, case.n), f"random points at distance eps break {noise}, gradients {guided}"


def survives_anything(case: Probe) -> Finding:
    """Counts only samples for which an answer is known: the grey image is in the ball and has another class."""
    doomed = _count(case.doomed)
    left = doomed - _count(case.far)
    return share(left, doomed), f"{left} of {doomed} survive the attack in a ball that is known to hold another class"


def rises_with_eps(case: Probe) -> Finding:
    broken = [_count(run.broken) for run in (case.half, case.ce, case.twice)]
    rise = max(broken[0] - broken[1], broken[1] - broken[2])
    return share(rise, case.n), f"one attack breaks {broken} of {case.n} at eps/2, eps and 2 eps"


def not_converged(case: Probe) -> Finding:
    """Restarts that still gain, or an attack that does not climb.

    The rule "100 iterations beat 10" alone would blame an attack that reached the optimum within 10, as it does on a
    net that is nearly linear in a small ball. So 100 may equal 10, but not fall behind, and must beat random corners,
    which an attack without a gradient does not. Losses are compared as margins, on what none of these attacks broke.
    """
    fresh = case.ce.broken | case.cw.broken | case.short.broken | case.long.broken
    more, rows = _count(fresh & case.left), case.left & ~fresh
    detail = f"short fresh attacks break {more} of {_count(case.left)} that the suite left"
    if bool(rows.any()) and case.threat.eps > 0:
        noise, short, long = (run.margin[rows].double() for run in (case.noise, case.short, case.long))
        behind, above = float((long - short).median()), float((long - noise).median())
        if above >= 0 or behind > WORSE * float(case.margin[rows].median()):
            return 1.0, (
                f"after 100 iterations the margin is {behind:+.2g} logits from that after 10, and {above:+.2g} from "
                "that of random corners"
            )
    return share(more, case.n), detail


def cross_entropy_fails(case: Probe) -> Finding:
    ce, margin = _count(case.ce.broken), _count(case.cw.broken)
    return share(margin - ce, case.n), f"of {case.n} the margin loss breaks {margin}, cross-entropy {ce}"


def transfer_wins(case: Probe) -> Finding:
    """Points of the parents against gradients of the search net, on balance.

    Where transfer is part of the suite its points count in the claim, and of two attacks of equal strength each breaks
    a few samples that the other does not: what transfer adds to an honest straight-through twin is no sign. It is one
    when transfer alone breaks more than all white-box attacks do together, or samples that the whole suite left.
    """
    if not case.target.parents:
        return None, "the artifact has no parent"
    lead = _count(case.transfer) - _count(case.white_box)
    missed = _count(case.transfer & case.left)
    return max(share(lead, case.n), share(missed, case.n)), (
        f"points of the parents break {_count(case.transfer)} of {case.n}, own gradients {_count(case.white_box)}; "
        f"the suite left {missed} of the former"
    )


def broken_proof(case: Probe) -> Finding:
    proved = case.outcome.ids[case.outcome.certified]
    if len(proved) == 0:
        return None, "no sample is certified"
    broken = torch.isin(proved, case.outcome.broken_ids)
    if case.target.search is not None:
        here = case.white_box | case.blind.broken | case.noise.broken
        broken |= torch.isin(proved, case.batch.ids[here].to(proved))
    return float(_count(broken)), f"{_count(broken)} of {len(proved)} certified samples were broken"


def depends_on_company(case: Probe) -> Finding:
    few = case.batch.x[:COMPANY]
    worst = 0.0
    for net in case.functions:
        alone = torch.cat([logits_of(net, row.expand(2, *row.shape))[:1] for row in few])
        worst = max(worst, relative_difference(alone, logits_of(net, torch.cat([few, 1 - few]))[: len(few)]))
    return worst, f"logits change by {worst:.1g} of the largest with the other images of a batch"


def inconsistent(case: Probe) -> Finding:
    outcome = case.outcome
    outside = outcome.size > case.threat.eps + 1e-6
    if len(outside) > 0:
        flat = outcome.points.flatten(1)
        outside |= ~((flat >= 0) & (flat <= 1)).all(1)
    own = [tally for tally in outcome.tallies if tally.kind != "transfer"]
    misses, successes = sum(t.misses for t in own), sum(t.broken + t.misses for t in own)
    if bool(outside.any()):
        return 1.0, f"{_count(outside)} points lie outside ball or box"
    return share(misses, successes), f"the artifact does not share {misses} of {successes} successes of the search"


def off_the_grid(case: Probe) -> Finding:
    """Samples broken only by points that are no 8-bit image, beyond what eps itself explains.

    An eps of 20.4 steps of a pixel holds points that no 8-bit image reaches. Robust accuracy in the ball that they do
    reach is higher by at most STEEP times the share of eps that is lost.
    """
    threat = case.threat
    lost = 1 - grid_room(threat, case.batch.x.shape[1:].numel()).eps / max(threat.eps, 1e-12)
    off, total = _count(~case.outcome.exact), len(case.outcome.ids)
    return max(share(off, total) - STEEP * lost, 0.0), (
        f"{off} of {total} samples are broken only by points that are no 8-bit images; "
        f"{100 * lost:.1f} % of eps are out of their reach"
    )


def logit_scale(case: Probe) -> Finding:
    top = case.logits.topk(min(3, case.logits.shape[1]), dim=1).values
    flat = top[:, 0] - top[:, -1] < FLAT
    saturated = case.logits.float().softmax(1).topk(2, dim=1).values[:, 1] == 0
    return float((flat | saturated).double().mean()), (
        f"of {case.n} images {_count(flat)} have top classes within {FLAT} logits, in {_count(saturated)} "
        "every class but one has a probability of 0 in float32"
    )


@dataclass(frozen=True)
class Rule:
    id: str
    name: str
    limit: float
    needs: Literal["nothing", "samples", "gradients"]
    look: Callable[[Probe], Finding]


RULES = (
    Rule("R1", "randomised", 1e-4, "samples", randomised),  # AutoAttack
    Rule("R2", "probabilities or no numbers", 0, "samples", malformed),  # AutoAttack
    Rule("R3", "zero gradient", 0.01, "gradients", dead_gradient),  # AutoAttack
    Rule("R4", "black-box beats white-box", 0.002, "gradients", black_box_wins),  # AutoAttack; Athalye et al.
    Rule("R5", "noise beats white-box", 0, "gradients", noise_wins),  # Athalye et al.
    Rule("R6", "robust at any eps", 0.01, "gradients", survives_anything),  # Athalye et al.
    Rule("R7", "rises with eps", 0.01, "gradients", rises_with_eps),  # Carlini et al.
    Rule("R8", "not converged", 0.005, "gradients", not_converged),  # Carlini et al.
    Rule("R9", "cross-entropy fails", 0.2, "gradients", cross_entropy_fails),  # Croce and Hein
    Rule("R10", "transfer beats white-box", 0.002, "gradients", transfer_wins),  # Carlini et al.
    Rule("R11", "certified sample broken", 0, "nothing", broken_proof),
    Rule("R12", "depends on its batch", 1e-4, "samples", depends_on_company),
    Rule("R13", "outside the threat, or not the artifact's", 0.001, "nothing", inconsistent),
    Rule("R14", "not realisable in 8 bits", 0.01, "nothing", off_the_grid),
    Rule("R15", "logit scale", 0.5, "samples", logit_scale),
)
