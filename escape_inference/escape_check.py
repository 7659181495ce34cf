"""Is this escape at all? Whether the times of each condition are those of a memoryless escape, before a law is fitted.

From the quasi-stationary state escape times are exponential, whatever the barrier. Two statistics ask whether they are:
the shape of a Gamma distribution with its profile-likelihood interval (coefficient of variation ``1/sqrt(shape)``), and
the Kolmogorov-Smirnov distance between the product-limit estimate and the fitted exponential (Salvalaglio, Tiwary,
Parrinello 2014), whose null distribution is simulated for each condition with its own censoring and check interval,
since fitting the rate makes the textbook p-value far too large.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import chdtrc, chdtri

from escape_inference.conditions import Conditions
from escape_inference.gamma_intervals import LOG_SHAPE_RANGE, IntervalCounts, interval_counts, maximum, profile
from escape_inference.goodness_of_fit import exponential_test
from escape_inference.life_table import TESTED_ESCAPES

LEVEL = 0.99
REPLICATES = 500
SMALLEST_CV, LARGEST_CV = 0.3, 2.0
GRADES = ("memoryless", "delayed", "not_escape")
_NOTHING = (np.nan,) * 8


@dataclass(frozen=True)
class EscapeCheck:
    """What the check found.

    Attributes:
        frame: one row for each condition: ``condition``, ``escapes``, ``tested``, ``coefficient_of_variation`` (of the
            fitted Gamma) with its 99 % interval ``coefficient_of_variation_low``, ``coefficient_of_variation_high``,
            ``shape``, ``shape_low``, ``shape_high``, ``ks_distance``, ``ks_p_value``, ``grade`` (``memoryless``,
            ``delayed``, ``not_escape`` or ``untested``).
        grade: ``not_escape`` if more than half of the tested conditions are; else ``delayed`` if more than half are
            delayed or worse; else ``memoryless``.
        p_value: of all tested conditions being exponential (Fisher's combination); None if none is tested.
    """

    frame: pd.DataFrame
    grade: str
    p_value: float | None

    def count(self, grade: str) -> int:
        """Number of conditions with a grade."""
        return int((self.frame["grade"] == grade).sum())

    @property
    def tested(self) -> int:
        """Number of tested conditions."""
        return int(self.frame["tested"].sum())

    def as_dict(self) -> dict[str, Any]:
        """The check as plain values for ``comparison.json``."""
        counts = {grade: self.count(grade) for grade in GRADES}
        return {"grade": self.grade, "conditions_tested": self.tested, **counts, "p_value": self.p_value}

    @property
    def sentence(self) -> str:
        """The result in one plain sentence."""
        total = len(self.frame)
        if not self.tested:
            return (
                f"None of the {total} conditions could be tested for memoryless escape (that takes {TESTED_ESCAPES} "
                "escapes at fixed settings, not all at the first look)."
            )
        median = float(self.frame.loc[self.frame["tested"], "coefficient_of_variation"].median())
        meaning = {
            "memoryless": "so the times look like memoryless escape",
            "delayed": "so the times are delayed and get a Gamma waiting time",
            "not_escape": "so the times are not those of escape",
        }[self.grade]
        if self.grade == "memoryless" and self.p_value is not None and self.p_value < 1 - LEVEL:
            meaning = "so some of the times are not quite memoryless, though most conditions look like escape"
        return (
            f"Of {total} conditions {self.tested} had enough escapes to be tested: {self.count('memoryless')} "
            f"memoryless, {self.count('delayed')} delayed, {self.count('not_escape')} not escape; the median "
            f"coefficient of variation is {median:.2g} (1 if memoryless) and p = {self.p_value:.2g} for all "
            f"being exponential, {meaning}."
        )


def check_escape(conditions: Conditions, seed: int = 0) -> EscapeCheck:
    """Test every condition with at least 20 escapes at fixed settings, and grade it.

    Args:
        conditions: what :func:`~escape_inference.conditions.aggregate` returns. Ramps, conditions with fewer escapes,
            and those where every run had escaped by the first look are not tested and count as memoryless.
        seed: of the simulated null distributions; the condition's position is mixed in.

    >>> from escape_inference.conditions import aggregate
    >>> steps = np.random.default_rng(1).exponential(500.0, 60).astype(int) + 1
    >>> table = pd.DataFrame({"minimum": "m1", "run": range(60), "learning_rate": 0.1, "batch_size": 8, "steps": steps,
    ...     "escaped": True})
    >>> check_escape(aggregate(table)).as_dict()["grade"]
    'memoryless'
    >>> check_escape(aggregate(table.assign(steps=2000 + steps // 10))).as_dict()["grade"]
    'not_escape'
    """
    life, times = (dict(list(long.groupby("condition"))) for long in (conditions.life_table, conditions.times))
    frame, rows = conditions.frame, []
    for i in range(len(frame)):
        learning_rate, interval = float(frame["learning_rate"].iloc[i]), int(frame["check_interval"].iloc[i])
        if i not in life:
            rows.append((False, *_NOTHING, "untested"))
            continue
        shape, low, high = shape_interval(interval_counts(times[i], learning_rate))
        distance, p_value = exponential_test(life[i], interval, REPLICATES, np.random.default_rng([seed, i]))
        cv = (shape**-0.5, high**-0.5, low**-0.5 if low > 0 else np.inf)
        rows.append((True, *cv, shape, low, high, distance, p_value, grade_of(shape, low, high)))
    names = ["tested", "coefficient_of_variation", "coefficient_of_variation_low", "coefficient_of_variation_high"]
    names += ["shape", "shape_low", "shape_high", "ks_distance", "ks_p_value", "grade"]
    result = pd.DataFrame(rows, columns=names)
    result.insert(0, "condition", frame["condition"].to_numpy())
    result.insert(1, "escapes", frame["escapes"].to_numpy())
    tested = result[result["tested"]]
    return EscapeCheck(result, _overall(list(tested["grade"])), _combine(tested["ks_p_value"].to_numpy(float)))


def grade_of(shape: float, low: float, high: float) -> str:
    """Grade from the Gamma shape and its interval.

    >>> grade_of(1.2, 0.8, 1.7), grade_of(5.0, 3.0, 8.0), grade_of(100.0, 60.0, 160.0), grade_of(0.1, 0.05, 0.2)
    ('memoryless', 'delayed', 'not_escape', 'not_escape')
    """
    if low <= 1.0 <= high:
        return "memoryless"
    return "delayed" if SMALLEST_CV <= shape**-0.5 <= LARGEST_CV else "not_escape"


def shape_interval(counts: IntervalCounts, level: float = LEVEL) -> tuple[float, float, float]:
    """Gamma shape of greatest likelihood and its profile-likelihood interval, censoring and coarse looks included.

    Args:
        counts: escapes and censored runs of one condition.
        level: probability of the interval.

    Returns:
        Shape, lower end (0 if open), upper end (∞ if open).

    >>> times = pd.DataFrame({"lower": range(0, 60), "upper": range(1, 61), "escapes": 1, "censored": 0})
    >>> [round(value, 1) for value in shape_interval(interval_counts(times, 1.0))]
    [1.8, 1.1, 2.8]
    """
    log_rate, log_shape, hessian = maximum(counts)
    sd = float(np.clip(1.0 / np.sqrt(max(hessian[1, 1], 1e-4)), 1e-3, 2.0))
    threshold = float(np.sqrt(chdtri(1, 1 - level)))
    reach = sd * np.array([0.0, 0.7, 1.4, 2.0, 2.5, 3.0, 3.6, 4.5])
    low = _end(counts, log_rate, log_shape, -reach, threshold)
    high = _end(counts, log_rate, log_shape, reach, threshold)
    return float(np.exp(log_shape)), 0.0 if low is None else low, np.inf if high is None else high


def _end(
    counts: IntervalCounts, log_rate: float, log_shape: float, offsets: np.ndarray, threshold: float
) -> float | None:
    """Shape at which the signed root of the profile deviance reaches the threshold, or None if it never does."""
    while True:
        points = np.unique(np.clip(log_shape + offsets, *LOG_SHAPE_RANGE))
        points = points if offsets[-1] > 0 else points[::-1]
        heights = profile(counts, points, log_rate)
        root = np.sqrt(2.0 * np.maximum(heights[0] - heights, 0.0))
        outside = np.flatnonzero(root > threshold)
        if outside.size:
            k = int(outside[0])
            share = (threshold - root[k - 1]) / (root[k] - root[k - 1])
            return float(np.exp(points[k - 1] + share * (points[k] - points[k - 1])))
        if points[-1] in LOG_SHAPE_RANGE:
            return None
        offsets = 3.0 * offsets


def _overall(grades: list[str]) -> str:
    """Grade of the whole table."""
    half = len(grades) / 2
    not_escape = grades.count("not_escape")
    if not_escape > half:
        return "not_escape"
    return "delayed" if not_escape + grades.count("delayed") > half else "memoryless"


def _combine(p_values: np.ndarray) -> float | None:
    """Fisher's combination of independent p-values."""
    if not p_values.size:
        return None
    return float(chdtrc(2 * p_values.size, -2.0 * np.log(p_values).sum()))
