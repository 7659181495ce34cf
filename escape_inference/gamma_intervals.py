"""Gamma waiting times known to intervals: log-probabilities that are safe in both tails, and their maximum.

A waiting time of mean 1/κ and shape a has the density ``(aκ)^a t^(a−1) exp(−aκt) / Γ(a)``; a = 1 is the exponential. In
this parametrisation κ and a are orthogonal (Cox and Reid 1987), so that the maximum is found in a few Newton steps.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.special import gammainc, gammaincc, gammaln

_TINY = 1e-280
_NARROW = 1e-4
LOG_SHAPE_RANGE = (-7.0, 11.0)


def log_gamma_tails(
    shape: Float[np.ndarray, "..."], x: Float[np.ndarray, "..."]
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """``log P(a, x)`` and ``log Q(a, x)``, the log distribution function and log survival of a standard Gamma variable.

    Where the functions of SciPy underflow, the series 6.5.29 and the continued fraction 6.5.31 of Abramowitz and Stegun
    take over.

    >>> below, above = log_gamma_tails(np.array([1.0, 3.0]), np.array([1000.0, 1e-150]))
    >>> [float(round(value, 6)) for value in (*below, *above)]
    [-0.0, -1037.955051, -1000.0, -0.0]
    """
    shape, x = np.broadcast_arrays(np.asarray(shape, dtype=np.float64), np.asarray(x, dtype=np.float64))
    lower = x <= np.maximum(shape, 1.0)
    small = np.empty(x.shape)
    small[lower] = gammainc(shape[lower], x[lower])
    small[~lower] = gammaincc(shape[~lower], x[~lower])
    with np.errstate(divide="ignore"):
        log_small, log_other = np.log(small), np.log1p(-np.minimum(small, 1.0))
    far = (small < _TINY) & (x > 0) & np.isfinite(x)
    if far.any():
        for part, function in ((far & lower, _log_series), (far & ~lower, _log_fraction)):
            log_small[part] = function(shape[part], x[part])
    return np.where(lower, log_small, log_other), np.where(lower, log_other, log_small)


def _log_series(shape: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log P for x far below a: ``x^a e^(−x) / Γ(a+1) · Σ x^k / ((a+1)…(a+k))``."""
    term, total, k = np.ones_like(x), np.ones_like(x), 0
    while x.size and k < 5000 and (term > 1e-17 * total).any():
        k += 1
        term = term * x / (shape + k)
        total = total + term
    return shape * np.log(x) - x - gammaln(shape + 1.0) + np.log(total)


def _log_fraction(shape: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log Q for x far above a, by the modified Lentz algorithm."""
    b = x + 1.0 - shape
    c, d = np.full_like(x, 1e300), 1.0 / b
    value, k = d.copy(), 0
    while x.size and k < 5000:
        k += 1
        factor = -k * (k - shape)
        b = b + 2.0
        d = 1.0 / (factor * d + b)
        c = b + factor / c
        value = value * d * c
        if (np.abs(d * c - 1.0) < 1e-15).all():
            break
    return shape * np.log(x) - x - gammaln(shape) + np.log(value)


@dataclass(frozen=True)
class IntervalCounts:
    """Counts of one condition: escapes in ``(edges[low], edges[high]]``, censored runs at ``edges[end]``."""

    # edges in time units

    edges: Float[np.ndarray, "edge"]
    low: Int[np.ndarray, "interval"]
    high: Int[np.ndarray, "interval"]
    escapes: Float[np.ndarray, "interval"]
    end: Int[np.ndarray, "length"]
    censored: Float[np.ndarray, "length"]

    @property
    def total_escapes(self) -> float:
        """Number of escapes."""
        return float(self.escapes.sum())

    @property
    def exposure(self) -> float:
        """Time under observation, escapes taken in the middle of their intervals."""
        middle = 0.5 * (self.edges[self.low] + self.edges[self.high])
        return float(self.escapes @ middle + self.censored @ self.edges[self.end])

    def log_likelihood(
        self, log_rate: Float[np.ndarray, "..."], log_shape: Float[np.ndarray, "..."]
    ) -> Float[np.ndarray, "..."]:
        """Log-likelihood for broadcast arrays of log κ (κ per unit time) and log shape.

        >>> counts = interval_counts(pd.DataFrame(
        ...     {"lower": [0.0, 3.0], "upper": [2.0, 5.0], "escapes": [1, 0], "censored": [0, 2]}), 1.0)
        >>> round(float(counts.log_likelihood(np.array(0.0), np.array(0.0))), 6)
        -10.145413
        >>> round(float(np.log(1 - np.exp(-2)) - 2 * 5), 6)
        -10.145413
        """
        log_rate, log_shape = np.broadcast_arrays(log_rate, log_shape)
        shape, rate = np.exp(log_shape)[..., None], np.exp(np.minimum(log_shape + log_rate, 600.0))[..., None]
        below, above = log_gamma_tails(shape, rate * self.edges)
        total = np.zeros(log_rate.shape)
        if self.censored.size:
            total = total + above[..., self.end] @ self.censored
        if self.escapes.size:
            total = total + self._log_intervals(shape, rate, below, above) @ self.escapes
        return total

    def _log_intervals(self, shape: np.ndarray, rate: np.ndarray, below: np.ndarray, above: np.ndarray) -> np.ndarray:
        """Log-probabilities of the intervals; narrow ones from the density at the middle, with its curvature."""
        low, high = self.edges[self.low], self.edges[self.high]
        width, middle = high - low, 0.5 * (low + high)
        slope, bend = (shape - 1.0) / middle - rate, (1.0 - shape) / middle**2
        narrow = width**2 * (slope**2 + np.abs(bend)) < _NARROW
        log_density = shape * np.log(rate) + (shape - 1.0) * np.log(middle) - rate * middle - gammaln(shape)
        near = log_density + np.log(width) + np.log1p(np.where(narrow, width**2 / 24.0 * (slope**2 + bend), 0.0))
        if narrow.all():
            return near
        upper_tail = rate * low > np.maximum(shape, 1.0)
        big = np.where(upper_tail, above[..., self.low], below[..., self.high])
        small = np.where(upper_tail, above[..., self.high], below[..., self.low])
        with np.errstate(divide="ignore", invalid="ignore"):
            wide = big + np.log(-np.expm1(np.minimum(small - big, 0.0)))
        return np.where(narrow, near, wide)


def interval_counts(times: pd.DataFrame, learning_rate: float) -> IntervalCounts:
    """Counts from the rows ``lower, upper, escapes, censored`` of one condition, iterations turned into time."""
    lower, upper, escapes, censored = (times[n].to_numpy(np.float64) for n in ("lower", "upper", "escapes", "censored"))
    seen, lost = escapes > 0, censored > 0
    ends = np.concatenate([lower[seen], upper[seen], upper[lost]])
    edges, place = np.unique(ends, return_inverse=True)
    count = int(seen.sum())
    return IntervalCounts(
        edges=learning_rate * edges,
        low=place[:count],
        high=place[count : 2 * count],
        escapes=escapes[seen],
        end=place[2 * count :],
        censored=censored[lost],
    )


def maximum(counts: IntervalCounts, prior_sd: float = np.inf) -> tuple[float, float, Float[np.ndarray, "2 2"]]:
    """Log rate and log shape of greatest likelihood (times a Normal(0, ``prior_sd``) prior of the log shape).

    Returns:
        log κ, log a (kept between −7 and 11), and the Hessian of the negative logarithm there.

    >>> exact = pd.DataFrame({"lower": [0.9, 1.9, 3.9], "upper": [1.0, 2.0, 4.0], "escapes": 1, "censored": 0})
    >>> rate, shape, _ = maximum(interval_counts(exact, 1.0))
    >>> round(float(np.exp(rate)), 2), round(float(np.exp(shape)), 1)
    (0.44, 3.2)
    """
    z, s = _start(counts)
    step = 1e-3
    offsets = step * np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)], dtype=np.float64)

    def value(points: np.ndarray) -> np.ndarray:
        log_prior = -0.5 * (points[:, 1] / prior_sd) ** 2
        return np.nan_to_num(counts.log_likelihood(points[:, 0], points[:, 1]) + log_prior, nan=-1e300, neginf=-1e300)

    hessian = np.eye(2)
    for _ in range(60):
        v = value(np.array([z, s]) + offsets).reshape(3, 3)
        gradient = np.array([v[2, 1] - v[0, 1], v[1, 2] - v[1, 0]]) / (2 * step)
        cross = -(v[2, 2] - v[2, 0] - v[0, 2] + v[0, 0]) / (4 * step**2)
        hessian = np.array(
            [
                [-(v[2, 1] - 2 * v[1, 1] + v[0, 1]) / step**2, cross],
                [cross, -(v[1, 2] - 2 * v[1, 1] + v[1, 0]) / step**2],
            ]
        )
        vectors = np.linalg.eigh(hessian)
        curvature = np.maximum(np.abs(vectors.eigenvalues), 1e-3)
        move = vectors.eigenvectors @ ((vectors.eigenvectors.T @ gradient) / curvature)
        move *= min(1.0, 1.0 / np.abs(move).max(initial=1e-300))
        lengths = 0.5 ** np.arange(8)
        tried = np.array([z, s]) + lengths[:, None] * move
        tried[:, 1] = np.clip(tried[:, 1], *LOG_SHAPE_RANGE)
        heights = value(tried)
        best = int(np.argmax(heights))
        if heights[best] <= v[1, 1]:
            break
        done = np.abs(tried[best] - (z, s)).max() < 1e-7 * max(1.0, abs(z)) or heights[best] - v[1, 1] < 1e-9
        z, s = float(tried[best, 0]), float(tried[best, 1])
        if done:
            break
    return z, s, hessian


def profile(
    counts: IntervalCounts, log_shape: Float[np.ndarray, "point"], log_rate: float
) -> Float[np.ndarray, "point"]:
    """Log-likelihood at each log shape, maximised over log κ by Newton steps from ``log_rate``.

    >>> counts = interval_counts(pd.DataFrame({"lower": [1.0], "upper": [2.0], "escapes": [1], "censored": [0]}), 1.0)
    >>> profile(counts, np.array([0.0]), 0.0).round(4).tolist()
    [-1.3863]
    """
    z, step = np.full(len(log_shape), log_rate), 1e-3
    best = np.full(len(log_shape), -np.inf)
    for _ in range(40):
        v = counts.log_likelihood(z + step * np.array([[-1.0], [0.0], [1.0]]), log_shape)
        gradient, curvature = (v[2] - v[0]) / (2 * step), -(v[2] - 2 * v[1] + v[0]) / step**2
        gain = v[1] - best
        best = np.maximum(best, v[1])
        if (gain < 1e-8).all():
            break
        move = np.nan_to_num(gradient / np.maximum(np.abs(curvature), 1e-3))
        z = z + np.clip(move, -1.0, 1.0)
    return best


def _start(counts: IntervalCounts) -> tuple[float, float]:
    """Moment estimate of log κ and log a (a = 1 for heavily censored data)."""
    rate = np.log(max(counts.total_escapes, 0.5) / max(counts.exposure, 1e-300))
    if counts.total_escapes < 2 or counts.censored.sum() > 0.2 * counts.total_escapes:
        return float(rate), 0.0
    return float(rate), float(np.clip(conditional_log_shape(counts, np.array([rate]))[0], -3.0, 9.0))


def conditional_log_shape(counts: IntervalCounts, log_rate: Float[np.ndarray, "point"]) -> Float[np.ndarray, "point"]:
    """Log shape of greatest likelihood at given log κ, the times in the middle of their intervals (Minka 2002)."""
    middle = 0.5 * (counts.edges[counts.low] + counts.edges[counts.high])
    total = max(counts.total_escapes, 1.0)
    mean, mean_log = counts.escapes @ middle / total, counts.escapes @ np.log(middle) / total
    s = np.maximum(np.exp(np.minimum(log_rate, 600.0)) * mean - 1.0 - log_rate - mean_log, 1e-9)
    return np.asarray(np.log((3.0 - s + np.sqrt((s - 3.0) ** 2 + 24.0 * s)) / (12.0 * s)))
