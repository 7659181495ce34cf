"""What a ramp hands back: rows for the table, and the critical learning rate of each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import binom

from escape_inference.errors import InputError
from escape_inference.trainers.record import Condition

COVERAGE = 0.95
"""Of the interval of the median critical learning rate."""


@dataclass(frozen=True)
class RampRecord:
    """Rows for the measured table, and the critical learning rate of each run.

    Attributes:
        rows: a row for each run and level, in order, with the columns of the measured table but ``minimum``; ``escaped``
            is true in the last row of a run that jumped, ``steps`` is then the iteration of the jump within that level.
            ``barrier`` is ``threshold`` and ``loss_barrier`` the loss above which the run had jumped.
        critical: a row for each run: ``run``, ``batch_size``, ``critical_learning_rate`` (the level of the jump; NaN if
            there was none), ``lower`` (the last level survived; 0 if none) and ``upper`` (the level of the jump; infinite
            if none) bound it, ``level`` counted from 1, ``step`` of the jump within it, ``jumped``, ``loss_barrier``,
            and ``afterwards``: where the loss was after one more level's iterations at the same eta, ``returned`` below
            the barrier, ``stayed`` above it, ``diverged`` to a loss that is not finite, or ``none``.
        median: the median critical learning rate over runs (infinite where most did not jump).
        median_lower, median_upper: the interval that holds it with 95 % probability, from the order of the runs, each
            end at the outer end of its level.
        warnings: what a reader must know, in sentences.
        seconds: wall time.
    """

    rows: pd.DataFrame
    critical: pd.DataFrame
    median: float
    median_lower: float
    median_upper: float
    warnings: tuple[str, ...]
    seconds: float


def learning_rate_levels(first: float, last: float, levels: int, spacing: str = "geometric") -> Float[np.ndarray, " j"]:
    """Rising learning rates, by equal ratios or by equal differences.

    Args:
        first: the lowest, time per iteration.
        last: the highest.
        levels: how many, at least 2.
        spacing: ``geometric`` or ``linear``.

    Raises:
        InputError: an argument that cannot be used.

    Examples:
        >>> learning_rate_levels(0.01, 0.16, 5).round(3).tolist(), learning_rate_levels(0.1, 0.4, 3, "linear").tolist()
        ([0.01, 0.02, 0.04, 0.08, 0.16], [0.1, 0.25, 0.4])
    """
    if not 0 < first < last < float("inf"):
        raise InputError(f"learning rates: need 0 < first < last, both finite, got {first} and {last}.")
    if int(levels) != levels or levels < 2:
        raise InputError(f"levels: must be an integer of at least 2, got {levels}.")
    if spacing not in ("geometric", "linear"):
        raise InputError(f"spacing: {spacing!r} is not known; allowed: geometric, linear.")
    return np.geomspace(first, last, levels) if spacing == "geometric" else np.linspace(first, last, levels)


def ramp_tables(
    condition: Condition,
    levels: np.ndarray,
    steps_per_level: int,
    runs: int,
    jumps: dict[int, int],
    barriers: Sequence[float],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of the measured table, and the critical learning rate of each run."""
    rows, critical = [], []
    for slot in range(runs):
        jump = jumps.get(slot)
        last = len(levels) - 1 if jump is None else (jump - 1) // steps_per_level
        level = {"loss_barrier": float(barriers[last])}
        for place in range(last + 1):
            escaped = jump is not None and place == last
            steps = jump - place * steps_per_level if jump is not None and escaped else steps_per_level
            row = condition.row(f"{slot:03d}", steps, escaped)
            rows.append(row | level | {"learning_rate": float(levels[place])})
        jumped = jump is not None
        critical.append(
            {
                "run": rows[-1]["run"],
                "batch_size": condition.batch_size,
                "critical_learning_rate": float(levels[last]) if jumped else float("nan"),
                "lower": (float(levels[last - 1]) if last else 0.0) if jumped else float(levels[-1]),
                "upper": float(levels[last]) if jumped else float("inf"),
                "level": last + 1,
                "step": rows[-1]["steps"],
                "jumped": jumped,
                **level,
            }
        )
    return pd.DataFrame(rows), pd.DataFrame(critical)


def critical_median(critical: pd.DataFrame) -> tuple[float, float, float]:
    """The median level of the jump over runs, and an interval that holds the median with 95 % probability.

    The ends are order statistics (binomial, free of any distribution); the lower one is the lower end of its level. With
    few runs the interval is that of the extremes, which then covers less.

    >>> table = pd.DataFrame({"lower": [0.0, 0.1, 0.1, 0.5, 0.5, 0.8], "upper": [0.1, 0.5, 0.5, 0.8, 0.8, np.inf]})
    >>> critical_median(table)
    (0.65, 0.0, inf)
    """
    lower, upper = np.sort(critical["lower"]), np.sort(critical["upper"])
    count = len(upper)
    rank = int(binom.ppf((1 - COVERAGE) / 2, count, 0.5))
    rank = max(rank - 1, 0)
    with np.errstate(invalid="ignore"):
        median = float(np.median(upper))
    return median, float(lower[rank]), float(upper[count - 1 - rank])


def ramp_warnings(critical: pd.DataFrame) -> tuple[str, ...]:
    """What a reader must know, in sentences."""
    warnings = []
    first = int((critical["jumped"] & (critical["level"] == 1)).sum())
    never = int((~critical["jumped"]).sum())
    if first:
        warnings.append(f"{first} of {len(critical)} runs jumped at the first level: begin lower.")
    if never:
        warnings.append(f"{never} of {len(critical)} runs never jumped: go higher.")
    back = int((critical["afterwards"] == "returned").sum())
    if back > len(critical) / 2:
        warnings.append(f"{back} of {len(critical)} runs came back below the barrier: it is too low for a jump.")
    return tuple(warnings)
