"""What a measurement hands back: rows for the table, the rate and its trend, and what to be wary of."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from escape_inference.trainers.burn_in import rate_change
from escape_inference.trainers.looks import CLOSE_LOOKS, scheduled
from escape_inference.trainers.rounds import Round

TREND_BINS = 8
LARGEST_INTERVAL = 0.2
"""Largest ``check_interval * learning_rate * hessian_minimum`` at which looks still see nearly every crossing."""
LARGEST_MISSED = 0.01
LARGEST_CHANGE = 3.0
"""Largest change of the rate between the halves of a measurement, in standard errors."""
LEAST_VARIANCE = (1 / CLOSE_LOOKS[0]) * (1 / CLOSE_LOOKS[0] - 1)
"""Variance of the number of missed crossings when none was found: that of one found by a close look."""


@dataclass(frozen=True)
class EscapeRecord:
    """Rows for the measured table, and what a reader needs to trust them.

    Attributes:
        rows: columns ``run``, ``learning_rate``, ``batch_size``, ``steps``, ``escaped``, ``check_interval``,
            ``barrier``, ``start``, ``loss_minimum``, ``loss_barrier`` and what else is known of the condition, such as
            ``hessian_minimum``. The caller adds ``minimum`` and other covariates. ``run`` is ``run_prefix`` and the
            slot ("007"), from the quasi-stationary state with the number of the gap ("007-0003"). A run of the same
            name in another condition would read as a ramp, so every condition needs its own ``run_prefix``.
        start: ``quasi_stationary`` or ``minimum``.
        escapes: rows that escaped.
        exposure: sum of ``learning_rate * steps`` over the rows, in time units.
        rate: escapes / exposure, per time unit; from the minimum it is the inverse of the mean passage time.
        rate_se: ``sqrt(escapes) / exposure`` (one escape if there was none).
        burn_in: iterations of each replica that are not in the rows.
        gelman_rubin: at the end of the burn-in: R-hat of ``log_loss`` and ``escape_frequency`` over replicas, and
            ``log_loss_drift`` and ``escape_drift``, the change within the later half of it in standard errors.
        rate_change: later half minus earlier half of the measured iterations, in standard errors (NaN from the
        minimum).
        settled: the burn-in ended by its test rather than by its maximum, and the rate did not change significantly.
        trend: one row for each period: ``step_from``, ``step_to`` (counted from the start), ``escapes``, ``exposure``,
            ``rate``, ``rate_se``, ``median_loss`` (over replicas, full-batch).
        missed_fraction: estimated fraction of the crossings that the screens missed; None if every look was exact.
        missed_fraction_se: its standard error from the looks that were drawn (if they found none, that of one found).
        full_looks: full-batch losses computed during the measured iterations.
        screens: sizes of the two screens, None if every look was exact.
        warnings: what a reader must know, in sentences.
        seconds: wall time.
        elsewhere: runs that left by another way than over the saddle that was watched; censored there.
    """

    rows: pd.DataFrame
    start: str
    escapes: int
    exposure: float
    rate: float
    rate_se: float
    burn_in: int
    gelman_rubin: dict[str, float]
    rate_change: float
    settled: bool
    trend: pd.DataFrame
    missed_fraction: float | None
    missed_fraction_se: float | None
    full_looks: int
    screens: tuple[int, int] | None
    warnings: tuple[str, ...]
    seconds: float
    elsewhere: int = 0


@dataclass(frozen=True)
class Condition:
    """What is the same in all rows."""

    learning_rate: float
    batch_size: int
    check_interval: int
    start: str
    loss_minimum: float
    loss_barrier: float
    hessian_minimum: float | None
    run_prefix: str
    barrier: str = "threshold"
    more: tuple[tuple[str, float], ...] = ()
    """Other columns, such as ``hessian_saddle``."""

    def row(self, run: str, steps: int, escaped: bool) -> dict[str, Any]:
        values: dict[str, Any] = {
            "run": self.run_prefix + run,
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "steps": steps,
            "escaped": escaped,
            "check_interval": self.check_interval,
            "barrier": self.barrier,
            "start": self.start,
            "loss_minimum": self.loss_minimum,
            "loss_barrier": self.loss_barrier,
        }
        known = {} if self.hessian_minimum is None else {"hessian_minimum": self.hessian_minimum}
        return values | known | dict(self.more)


@dataclass(frozen=True)
class Outcome:
    """What the replicas did: the measured rounds, from iteration ``begin`` to ``end``, and the burn-in before them."""

    rounds: list[Round]
    replicas: int
    begin: int
    end: int
    monitor: int
    turns: int
    screens: tuple[int, int] | None
    burn_in_test: dict[str, float]
    settled: bool
    elsewhere: tuple[tuple[int, int], ...] = ()
    """(iteration, slot) of every run that was lost to another way out: censored there, and replaced or ended."""

    def escapes(self) -> list[tuple[int, int]]:
        """(iteration, slot) of every measured escape, in order."""
        return [escape for done in self.rounds for escape in done.escapes]


def make_rows(condition: Condition, outcome: Outcome) -> pd.DataFrame:
    """One row for each gap between escapes of a slot (from the minimum: for each slot), the unfinished censored."""
    times: list[list[tuple[int, bool]]] = [[] for _ in range(outcome.replicas)]
    ended = [(step, slot, True) for step, slot in outcome.escapes()]
    asked = any(done.afterwards is not None for done in outcome.rounds)
    words = [word for done in outcome.rounds for word in done.afterwards or ()]
    became = {(slot, step): word for (step, slot, _), word in zip(ended, words, strict=asked)}
    for step, slot, escaped in sorted(ended + [(step, slot, False) for step, slot in outcome.elsewhere]):
        times[slot].append((step, escaped))
    quasi_stationary = condition.start == "quasi_stationary"
    followed = lambda word: {"afterwards": word} if asked else {}
    rows: list[dict[str, Any]] = []
    for slot, own in enumerate(times):
        last = outcome.begin
        for gap, (step, escaped) in enumerate(own):
            name = f"{slot:03d}-{gap:04d}" if quasi_stationary else f"{slot:03d}"
            rows.append(condition.row(name, step - last, escaped) | followed(became.get((slot, step), "")))
            last = step
        if last < outcome.end and (quasi_stationary or not own):
            name = f"{slot:03d}-{len(own):04d}" if quasi_stationary else f"{slot:03d}"
            rows.append(condition.row(name, outcome.end - last, False) | followed(""))
    return pd.DataFrame(rows)


def make_trend(condition: Condition, outcome: Outcome) -> pd.DataFrame:
    """Rate and median loss in a few periods of the measured iterations."""
    records = np.concatenate([done.records for done in outcome.rounds])
    due = scheduled(records[:, 0], records[:, 1], outcome.monitor, outcome.turns)
    looked = records[due & np.isfinite(records[:, 5])]
    length = outcome.end - outcome.begin
    bins = min(max(length // outcome.monitor, 1), TREND_BINS)
    edges = np.linspace(outcome.begin, outcome.end, bins + 1).astype(int)
    steps = np.array([step for step, _ in outcome.escapes()], dtype=int)
    ends = np.append(steps, [step for step, _ in outcome.elsewhere]).astype(int)
    rows = []
    for low, high in pairwise(edges):
        count = int(np.sum((steps > low) & (steps <= high)))
        iterations = float(outcome.replicas * (high - low))
        if condition.start == "minimum":
            iterations -= float(np.sum(np.clip(high - ends, 0, high - low)))
        exposure = condition.learning_rate * iterations
        losses = looked[(looked[:, 0] > low) & (looked[:, 0] <= high), 5]
        rows.append(
            {
                "step_from": int(low),
                "step_to": int(high),
                "escapes": count,
                "exposure": exposure,
                "rate": count / exposure if exposure > 0 else float("nan"),
                "rate_se": np.sqrt(max(count, 1)) / exposure if exposure > 0 else float("nan"),
                "median_loss": float(np.median(losses)) if len(losses) else float("nan"),
            }
        )
    return pd.DataFrame(rows)


def missed_crossings(outcome: Outcome) -> tuple[float | None, float | None]:
    """Estimated fraction of the crossings that the screens missed, and its standard error."""
    if outcome.screens is None:
        return None, None
    found = float(sum(done.tally.found.sum() for done in outcome.rounds))
    missed = float(sum(done.tally.missed.sum() for done in outcome.rounds))
    variance = float(sum(done.tally.missed_square.sum() for done in outcome.rounds))
    total = max(found + missed, 1.0)
    return missed / total, float(np.sqrt(max(variance, LEAST_VARIANCE))) / total


def make_warnings(condition: Condition, outcome: Outcome, change: float, missed: float | None) -> tuple[str, ...]:
    """What a reader must know, in sentences."""
    warnings = []
    if not outcome.settled:
        test = ", ".join(f"{name} {value:.3g}" for name, value in outcome.burn_in_test.items())
        warnings.append(f"The burn-in reached its maximum of {outcome.begin} iterations without settling: {test}.")
    if abs(change) > LARGEST_CHANGE:
        warnings.append(f"The rate changed by {change:+.1f} standard errors between the halves of the measurement.")
    interval = condition.check_interval * condition.learning_rate * (condition.hessian_minimum or 0.0)
    if condition.barrier == "saddle":
        interval = 0.0  # a run that has left over a saddle stays away, and it is seen at the next look
    if interval > LARGEST_INTERVAL:
        reason = (
            "crossings of the threshold that come back between two looks are missed"
            if condition.check_interval > 1
            else "one iteration moves SGD too far for a diffusion, so the threshold is overshot"
        )
        product = "check_interval * learning_rate * hessian_minimum"
        warnings.append(f"{product} is {interval:.2g}, above {LARGEST_INTERVAL}: {reason}.")
    if missed is not None and missed > LARGEST_MISSED:
        warnings.append(f"The screens missed an estimated {100 * missed:.1f} % of the crossings.")
    return tuple(warnings)


def make_record(condition: Condition, outcome: Outcome, seconds: float) -> EscapeRecord:
    """Everything together."""
    escapes, begin, end = outcome.escapes(), outcome.begin, outcome.end
    rows = make_rows(condition, outcome)
    exposure = condition.learning_rate * float(rows["steps"].sum())
    change = float("nan")
    if condition.start == "quasi_stationary" and end > begin + 1:
        middle = (begin + end) // 2
        late = sum(step > middle for step, _ in escapes)
        change = rate_change([len(escapes) - late, late], [middle - begin, end - middle])
    missed, missed_se = missed_crossings(outcome)
    return EscapeRecord(
        rows=rows,
        start=condition.start,
        escapes=len(escapes),
        exposure=exposure,
        rate=len(escapes) / exposure,
        rate_se=float(np.sqrt(max(len(escapes), 1))) / exposure,
        burn_in=begin,
        gelman_rubin=outcome.burn_in_test,
        rate_change=change,
        settled=outcome.settled and not abs(change) > LARGEST_CHANGE,
        trend=make_trend(condition, outcome),
        missed_fraction=missed,
        missed_fraction_se=missed_se,
        full_looks=int(sum(done.tally.looks.sum() for done in outcome.rounds)),
        screens=outcome.screens,
        warnings=make_warnings(condition, outcome, change, missed),
        seconds=seconds,
        elsewhere=len(outcome.elsewhere),
    )
