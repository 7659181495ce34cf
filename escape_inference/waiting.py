"""The Gamma waiting time of mean 1/κ for conditions whose escapes are delayed: its likelihood as a table of log κ.

A run that starts at the minimum has to fill its well first, so that its waiting time is narrower than an exponential.
The law predicts the mean 1/κ; the shape a is unknown, with the prior log a ~ Normal(0, 1), and is integrated out once,
before any law is fitted, because it does not depend on the law.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.interpolate import CubicSpline
from scipy.special import logsumexp

from escape_inference.gamma_intervals import (
    LOG_SHAPE_RANGE,
    IntervalCounts,
    conditional_log_shape,
    interval_counts,
    maximum,
)

PRIOR_SD = 1.0
POINTS = 121
_NODES = np.linspace(-8.0, 8.0, 25)


@dataclass(frozen=True)
class GammaLikelihood:
    """Log-likelihood of one condition with the shape integrated out, and the posterior of the shape, over log κ.

    Attributes:
        log_rate: uniform grid of log κ (κ per unit time), centred on the maximum.
        log_likelihood: log of the probability of the observed intervals.
        log_shape: grid of the log shape for each log κ (its mode ± eight posterior standard deviations).
        log_shape_density: log posterior density of the log shape given log κ, on that grid.
    """

    log_rate: Float[np.ndarray, "point"]
    log_likelihood: Float[np.ndarray, "point"]
    log_shape: Float[np.ndarray, "point node"]
    log_shape_density: Float[np.ndarray, "point node"]

    def at(self, log_rate: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Log-likelihood between the points of the grid, by a cubic spline."""
        return np.asarray(CubicSpline(self.log_rate, self.log_likelihood)(log_rate))

    def sample_shape(self, log_rate: Float[np.ndarray, "..."], seed: int = 0) -> Float[np.ndarray, "..."]:
        """One shape from its posterior for each log κ given (clipped to the grid).

        >>> times = pd.DataFrame({"lower": 0.0, "upper": [1.0, 2.0, 4.0], "escapes": 9, "censored": 0})
        >>> table = gamma_likelihood(times, 1.0)
        >>> bool(np.all(table.sample_shape(np.zeros(5)) > 0))
        True
        """
        rng = np.random.default_rng(seed)
        step = self.log_rate[1] - self.log_rate[0]
        position = np.clip((np.asarray(log_rate) - self.log_rate[0]) / step, 0.0, len(self.log_rate) - 1.0)
        # a neighbour is chosen with the probability of its weight in linear interpolation
        row = np.minimum(np.floor(position + rng.random(position.shape)), len(self.log_rate) - 1.0).astype(np.int64)
        density = np.exp(self.log_shape_density)
        cumulative = np.cumsum(0.5 * (density[:, 1:] + density[:, :-1]) * np.diff(self.log_shape, axis=1), axis=1)
        cumulative = np.concatenate([np.zeros((len(density), 1)), cumulative], axis=1)
        flat, uniform = row.ravel(), rng.random(row.size)
        drawn = np.empty(row.size)
        for point in np.unique(flat):
            chosen = flat == point
            drawn[chosen] = np.interp(uniform[chosen] * cumulative[point, -1], cumulative[point], self.log_shape[point])
        return np.exp(drawn.reshape(row.shape))


def gamma_likelihood(
    times: pd.DataFrame, learning_rate: float, *, points: int = POINTS, half_width: float | None = None
) -> GammaLikelihood:
    """Tabulate the log-likelihood of one condition over log κ with the Gamma shape integrated out.

    Args:
        times: rows of ``Conditions.times`` for one condition (``lower``, ``upper`` in iterations, ``escapes``,
            ``censored``).
        learning_rate: η, time per iteration.
        points: size of the grid.
        half_width: distance in log κ from the maximum to either end. The default is 3, but at least 10 and at most 30
            posterior standard deviations, so that a cubic spline through 121 points is accurate to 1e-4.

    Returns:
        The table. At a fixed shape of 1 the integrand is ``d log(1 − exp(−κw)) − κe`` of the memoryless likelihood,
        with the same constants, as long as the rows are single looks.

    >>> times = pd.DataFrame({"lower": [0.0, 10.0], "upper": [10.0, 20.0], "escapes": [3, 9], "censored": [0, 0]})
    >>> table = gamma_likelihood(times, 0.1)
    >>> peak = np.argmax(table.log_likelihood)
    >>> round(float(np.exp(-table.log_rate[peak])), 2), bool(np.exp(table.log_shape[peak, 12]) > 2)
    (1.23, True)
    """
    counts = interval_counts(times, learning_rate)
    if counts.total_escapes > 0:
        center, _, hessian = maximum(counts, PRIOR_SD)
        information = hessian[0, 0] - hessian[0, 1] ** 2 / max(hessian[1, 1], 1e-6)
        sd = 1.0 / np.sqrt(max(information, 0.2))
    else:
        center, sd = float(np.log(0.5 / counts.exposure)), np.sqrt(2.0)
    reach = max(10.0 * sd, min(3.0, 30.0 * sd)) if half_width is None else half_width
    log_rate = np.linspace(center - reach, center + reach, points)
    mode, scale = _conditional_mode(counts, log_rate)
    log_shape = mode[:, None] + scale[:, None] * _NODES
    log_joint = _log_joint(counts, log_rate[:, None], log_shape)
    log_weight = np.log(_NODES[1] - _NODES[0]) + np.log(scale)
    log_likelihood = logsumexp(log_joint, axis=1) + log_weight
    return GammaLikelihood(log_rate, log_likelihood, log_shape, log_joint - log_likelihood[:, None])


def _log_joint(counts: IntervalCounts, log_rate: np.ndarray, log_shape: np.ndarray) -> np.ndarray:
    """Log-likelihood plus log prior of the log shape."""
    log_prior = -0.5 * (log_shape / PRIOR_SD) ** 2 - 0.5 * np.log(2 * np.pi) - np.log(PRIOR_SD)
    return np.nan_to_num(counts.log_likelihood(log_rate, log_shape) + log_prior, nan=-1e300, neginf=-1e300)


def _conditional_mode(counts: IntervalCounts, log_rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mode of the log shape given each log κ, and the width of its posterior there."""
    mode = (
        np.clip(conditional_log_shape(counts, log_rate), -3.0, 9.0) if counts.total_escapes else np.zeros_like(log_rate)
    )
    step = 1e-3
    scale = np.ones_like(mode)
    for _ in range(25):
        v = _log_joint(counts, log_rate, mode + step * np.array([[-1.0], [0.0], [1.0]]))
        gradient = (v[2] - v[0]) / (2 * step)
        curvature = np.maximum(-(v[2] - 2 * v[1] + v[0]) / step**2, 0.5 / PRIOR_SD**2)
        scale = 1.0 / np.sqrt(curvature)
        move = np.clip(gradient / curvature, -0.7, 0.7)
        mode = np.clip(mode + move, *LOG_SHAPE_RANGE)
        if (np.abs(move) < 0.05 * scale).all():
            break
    return mode, scale
