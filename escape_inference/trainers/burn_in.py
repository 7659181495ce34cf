"""When has a set of replicas reached the quasi-stationary state?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from escape_inference.trainers.rounds import Round

LARGEST_R_HAT = 1.1
"""Binder, Lelievre and Simpson (2015) end the stages of their algorithm at such a tolerance."""
LARGEST_DRIFT = 2.5
"""Largest difference between two halves, in standard errors."""
NEGLIGIBLE_DRIFT = 0.03
"""A drift of the mean log loss below this is accepted, however significant."""


def gelman_rubin(
    count: Float[np.ndarray, " replicas"], total: Float[np.ndarray, " replicas"], square: Float[np.ndarray, " replicas"]
) -> float:
    """Gelman and Rubin's R-hat from each replica's number of values, their sum, and the sum of their squares.

    ``R^2 = ((n - 1)/n W + B) / W`` with B the variance of the replicas' means and W their mean variance. Values that do
    not vary at all agree (1); without values it is infinite.

    >>> round(gelman_rubin(np.array([4., 4.]), np.array([4., 8.]), np.array([6., 18.])), 3)
    1.225
    """
    if np.any(count < 2):
        return float("inf")
    mean = total / count
    within = float(np.mean((square - count * mean**2) / (count - 1)))
    between = float(np.var(mean, ddof=1)) if len(mean) > 1 else 0.0
    if within <= 0:
        return 1.0 if between <= 0 else float("inf")
    n = float(count.mean())
    return float(np.sqrt(((n - 1) / n * within + between) / within))


@dataclass
class BurnIn:
    """Collects rounds and tests the later half of them."""

    ends: list[int] = field(default_factory=list)
    count: list[np.ndarray] = field(default_factory=list)
    total: list[np.ndarray] = field(default_factory=list)
    square: list[np.ndarray] = field(default_factory=list)
    escapes: list[np.ndarray] = field(default_factory=list)

    def add(self, end: int, round_: Round) -> None:
        """One more round, which ended at iteration ``end``."""
        tally = round_.tally
        self.ends.append(end)
        self.count.append(np.asarray(tally.estimates, float))
        self.total.append(np.asarray(tally.log_loss, float))
        self.square.append(np.asarray(tally.log_loss_square, float))
        escaped = np.zeros(len(self.count[-1]))
        np.add.at(escaped, [slot for _, slot in round_.escapes], 1)
        self.escapes.append(escaped)

    def test(self) -> dict[str, float]:
        """R-hat of the log loss and of the escape frequency, and the drifts between the two halves of the window.

        The window is the later half of the rounds. ``log_loss_drift`` and ``escape_drift`` are in standard errors.
        """
        first = len(self.ends) // 2
        middle = (first + len(self.ends)) // 2
        window = slice(first, None)
        infinite = float("inf")
        if middle == first or middle == len(self.ends):
            return dict.fromkeys(("log_loss", "escape_frequency", "log_loss_drift", "escape_drift"), infinite)
        count, total, square = (np.sum(values[window], axis=0) for values in (self.count, self.total, self.square))
        starts = [0, *self.ends]
        escapes = np.sum(self.escapes[window], axis=0)
        iterations = np.full(len(escapes), float(self.ends[-1] - starts[first]))
        early, late = (
            (np.sum(self.total[part], axis=0) / np.maximum(np.sum(self.count[part], axis=0), 1))
            for part in (slice(first, middle), slice(middle, None))
        )
        change = late - early
        error = np.std(change, ddof=1) / np.sqrt(len(change)) if len(change) > 1 else 0.0
        mean = abs(float(change.mean()))
        drift = 0.0 if mean < NEGLIGIBLE_DRIFT else mean / float(error) if error > 0 else infinite
        counts = [float(np.sum(self.escapes[part])) for part in (slice(first, middle), slice(middle, None))]
        lengths = [self.ends[middle - 1] - starts[first], self.ends[-1] - self.ends[middle - 1]]
        return {
            "log_loss": gelman_rubin(count, total, square),
            "escape_frequency": gelman_rubin(iterations, escapes, escapes),
            "log_loss_drift": drift,
            "escape_drift": abs(rate_change(counts, lengths)),
        }

    def settled(self) -> bool:
        """Do all four tests pass?"""
        test = self.test()
        alike = max(test["log_loss"], test["escape_frequency"]) < LARGEST_R_HAT
        return alike and max(test["log_loss_drift"], test["escape_drift"]) < LARGEST_DRIFT


def rate_change(counts: Sequence[float], lengths: Sequence[float]) -> float:
    """Difference of two Poisson rates, later minus earlier, in standard errors (square-root transform).

    >>> round(rate_change([25, 36], [100, 100]), 3)
    1.405
    """
    early, late = (np.sqrt((count + 0.375) / length) for count, length in zip(counts, lengths, strict=True))
    return float((late - early) / np.sqrt(0.25 / lengths[0] + 0.25 / lengths[1]))
