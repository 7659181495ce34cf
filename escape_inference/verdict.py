"""The verdict: which law wins, and when none may.

A law wins against a rival when its leave-one-condition-out score is better by at least 4 and by at least 4 standard errors (5 with
fewer than 100 conditions, where the normal approximation is not trusted; Sivula et al. 2025), and the Bayes factor, where both ways
to compute it agree, is at least 20 to 1 in the same direction, for prior widths ×½, ×1 and ×2. Between a law and its
generalisation the simpler one stands unless the general one wins by these margins. A law that wins only because each law may be a
little wrong (without the discrepancy its rival predicts better) does not win.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from escape_inference.escape_check import EscapeCheck

WIDTHS = (1.0, 0.5, 2.0)
NO_DISCREPANCY = 0.0  #: stands for the comparison of laws that are taken to be exact, at prior widths ×1
ELPD_MARGIN = 4.0
ERRORS_FEW, ERRORS_MANY, MANY_CONDITIONS = 5.0, 4.0, 100
LOG_BAYES_MARGIN = float(np.log(20.0))


class Pair(NamedTuple):
    """A law against a rival at one prior width: elpd difference, its standard error, log Bayes factor (NaN: withheld).

    Width 0 stands for laws that are taken to be exact, without a discrepancy.
    """

    width: float
    elpd_diff: float
    elpd_diff_se: float
    log_bayes_factor: float


@dataclass(frozen=True)
class Candidate:
    """A law in the contest."""

    name: str
    special_cases: tuple[str, ...]
    trustworthy: bool
    reason: str = ""


class Verdict(NamedTuple):
    """The name of the winning law, ``inconclusive`` or ``not_escape``, and one sentence that says why."""

    verdict: str
    reason: str


def required_errors(conditions: int) -> float:
    """How many standard errors the elpd difference must reach."""
    return ERRORS_MANY if conditions >= MANY_CONDITIONS else ERRORS_FEW


def shortfall(pairs: Sequence[Pair], conditions: int) -> str:
    """Empty if the first law wins against the second in every pair; else the first test that failed, with its numbers.

    >>> shortfall([Pair(1.0, 30.0, 3.0, 25.0)], 36)
    ''
    >>> shortfall([Pair(1.0, 3.0, 0.1, 25.0)], 36)
    'the elpd difference 3.0 is below 4'
    """
    errors = required_errors(conditions)
    for pair in pairs:
        if pair.width == NO_DISCREPANCY:
            if pair.elpd_diff < 0:
                return (
                    f"without the discrepancy it is worse by {-pair.elpd_diff:.1f} in elpd, so the verdict rests on it"
                )
            continue
        at = "" if pair.width == 1 else f" with prior widths ×{pair.width:g}"
        if not pair.elpd_diff >= ELPD_MARGIN:
            return f"the elpd difference {pair.elpd_diff:.1f} is below {ELPD_MARGIN:g}{at}"
        if not np.isfinite(pair.elpd_diff_se):
            return f"one condition gives no standard error of the elpd difference {pair.elpd_diff:.1f}{at}"
        if not pair.elpd_diff >= errors * pair.elpd_diff_se:
            return (
                f"the elpd difference {pair.elpd_diff:.1f} is {pair.elpd_diff / pair.elpd_diff_se:.1f} standard errors, "
                f"fewer than the {errors:g} needed with {conditions} conditions{at}"
            )
        if pair.log_bayes_factor < LOG_BAYES_MARGIN:
            return f"the log Bayes factor {pair.log_bayes_factor:.1f} is below {LOG_BAYES_MARGIN:.1f} (20 to 1){at}"
    return ""


def decide(
    check: EscapeCheck,
    candidates: Sequence[Candidate],
    pairs: dict[tuple[str, str], list[Pair]],
    conditions: int,
) -> Verdict:
    """Apply the rules in their order.

    Args:
        check: result of the escape check.
        candidates: the laws compared.
        pairs: for every ordered pair of trustworthy laws, one :class:`Pair` a prior width, the width ×1 first, and one
            without the discrepancy.
        conditions: number of conditions compared.
    """
    if check.grade == "not_escape":
        return Verdict("not_escape", check.sentence)
    fit = [c for c in candidates if c.trustworthy]
    if not candidates:
        return Verdict("inconclusive", f"no escape is left to fit a law to. {check.sentence}")
    if not fit:
        return Verdict(
            "inconclusive", "no fit is trustworthy: " + "; ".join(f"{c.name}: {c.reason}" for c in candidates)
        )
    if len(candidates) == 1:
        return Verdict(
            "inconclusive", f"{fit[0].name} is the only law that was fitted, so there is nothing to compare it with"
        )
    failures = {}
    for law in fit:
        failures[law.name] = next(
            (text for rival in fit if rival is not law and (text := _against(law, rival, pairs, conditions))), ""
        )
    winners = [law for law in fit if not failures[law.name]]
    doubtful = [c for c in candidates if not c.trustworthy]
    if winners and doubtful:
        names = "; ".join(f"{c.name}: {c.reason}" for c in doubtful)
        return Verdict("inconclusive", f"{winners[0].name} leads, but a rival's sampler did not converge ({names})")
    if winners:
        winner = winners[0]
        rivals = [r for r in fit if r is not winner]
        return Verdict(winner.name, f"{winner.name} " + "; ".join(_why(winner, r, pairs, conditions) for r in rivals))
    leader = max(fit, key=lambda c: sum(pairs[c.name, r.name][0].elpd_diff for r in fit if r is not c))
    return Verdict("inconclusive", f"{leader.name} has the highest elpd, but {failures[leader.name]}")


def _against(law: Candidate, rival: Candidate, pairs: dict[tuple[str, str], list[Pair]], conditions: int) -> str:
    if law.name in rival.special_cases:  # the rival is more general: the simpler law stands unless the rival wins
        if shortfall(pairs[rival.name, law.name], conditions):
            return ""
        return f"its generalisation {rival.name} wins against it"
    text = shortfall(pairs[law.name, rival.name], conditions)
    return f"against {rival.name} {text}" if text else ""


def _why(law: Candidate, rival: Candidate, pairs: dict[tuple[str, str], list[Pair]], conditions: int) -> str:
    own, other = pairs[law.name, rival.name][0], pairs[rival.name, law.name]
    if law.name in rival.special_cases:
        return f"stands against its generalisation {rival.name} ({shortfall(other, conditions)})"
    bayes = (
        "Bayes factor withheld: its two computations disagree"
        if np.isnan(own.log_bayes_factor)
        else f"log Bayes factor {own.log_bayes_factor:.1f}"
    )
    errors = own.elpd_diff / own.elpd_diff_se if own.elpd_diff_se > 0 else float("inf")
    return (
        f"predicts left-out conditions better than {rival.name} by {own.elpd_diff:.1f} in elpd "
        f"({errors:.1f} standard errors; {bayes}) at all three prior widths"
    )
