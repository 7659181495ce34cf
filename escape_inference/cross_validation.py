"""Leave-one-condition-out: how well a law predicts a setting that it has not seen.

Pareto-smoothed importance sampling of the posterior draws (Vehtari, Gelman, Gabry 2017; Vehtari et al. 2024); where its shape k says
that it cannot be trusted, the condition is really left out and the law is sampled again.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

from escape_inference.later import library

NEARLY_EQUAL = 0.1


@dataclass(frozen=True)
class LeaveOneOut:
    """Expected log predictive density of every condition, and how it was obtained."""

    pointwise: Float[np.ndarray, " condition"]
    pareto_k: Float[np.ndarray, " condition"]
    refitted: np.ndarray

    @property
    def elpd(self) -> float:
        """Sum over the conditions."""
        return float(self.pointwise.sum())

    @property
    def standard_error(self) -> float:
        """Standard error of the sum, from the spread between conditions."""
        count = len(self.pointwise)
        return float(np.sqrt(count * np.var(self.pointwise, ddof=1))) if count > 1 else float("nan")


def pareto_limit(draws: int) -> float:
    """Largest Pareto k that this number of draws supports: ``min(1 − 1/log10 S, 0.7)``.

    >>> pareto_limit(4000), round(pareto_limit(200), 3)
    (0.7, 0.565)
    """
    return float(min(1 - 1 / np.log10(draws), 0.7))


def smoothed(log_ratio: Float[np.ndarray, " draw"]) -> tuple[Float[np.ndarray, " draw"], float]:
    """Pareto-smoothed logarithms of importance weights, normalised, and their Pareto shape: infinite where the largest are all equal.

    >>> smoothed(np.repeat([0.0, 1.0], 500))[1]
    inf
    """
    array_stats = library("arviz_stats.base").array_stats

    try:
        with np.errstate(divide="ignore", invalid="ignore"):  # ties among the largest
            weights, k = array_stats.psislw(-log_ratio)  # it takes log-likelihoods and turns their sign itself
    except ValueError:  # draws of chains that stood still
        return log_ratio - logsumexp(log_ratio), float("inf")
    return weights, float(k)


def leave_one_out(
    log_likelihood: Float[np.ndarray, "chain draw condition"], log_weight: Float[np.ndarray, " draws"] | None = None
) -> LeaveOneOut:
    """PSIS leave-one-out of every condition; ``refitted`` is all false (see :func:`needs_refit`).

    Args:
        log_likelihood: log-likelihood of every condition at every draw.
        log_weight: logarithm of the weight of every draw, chain after chain, when the draws come from another prior.

    >>> values = np.random.default_rng(0).normal(-2.0, 0.1, size=(4, 500, 3))
    >>> np.round(leave_one_out(values).pointwise, 1)
    array([-2., -2., -2.])
    """
    flat = np.asarray(log_likelihood, float).reshape(-1, log_likelihood.shape[-1])
    prior = np.zeros(len(flat)) if log_weight is None else log_weight
    pointwise, shapes = [], []
    for values in flat.T:
        raw = prior - values
        if np.ptp(raw) < NEARLY_EQUAL:  # nothing to smooth: every weight is within a few per cent of the others
            weights, k = raw - logsumexp(raw), float("-inf")
        else:
            weights, k = smoothed(raw)
        score = float(logsumexp(weights + values))
        pointwise.append(score)
        shapes.append(float(k) if np.isfinite(score) else float("inf"))
    return LeaveOneOut(np.array(pointwise), np.array(shapes), np.zeros(flat.shape[1], bool))


def needs_refit(loo: LeaveOneOut, draws: int) -> np.ndarray:
    """Positions of the conditions whose Pareto k is too high for this number of draws."""
    return np.flatnonzero(~(loo.pareto_k < pareto_limit(draws)))


def with_refits(
    loo: LeaveOneOut, refits: dict[int, tuple[Float[np.ndarray, " draws"], Float[np.ndarray, " draws"]]]
) -> LeaveOneOut:
    """The same with exact values for some conditions: their log-likelihoods by a fit without them, and log weights."""
    pointwise, refitted = loo.pointwise.copy(), loo.refitted.copy()
    for condition, (values, log_weight) in refits.items():
        pointwise[condition] = logsumexp(values + log_weight) - logsumexp(log_weight)
        refitted[condition] = True
    return LeaveOneOut(pointwise, loo.pareto_k, refitted)


def difference(first: LeaveOneOut, second: LeaveOneOut) -> tuple[float, float]:
    """``first − second`` in elpd and its standard error over conditions (paired)."""
    gap = first.pointwise - second.pointwise
    error = float(np.sqrt(len(gap) * np.var(gap, ddof=1))) if len(gap) > 1 else float("nan")
    return float(gap.sum()), error


def stacking_weights(
    pointwise: Float[np.ndarray, "law condition"], iterations: int = 2000
) -> Float[np.ndarray, " law"]:
    """Weights of the mixture of laws that predicts left-out conditions best (Yao et al. 2018), by expectation maximisation.

    >>> np.round(stacking_weights(np.array([[0.0, 0.0, 0.0], [-5.0, -5.0, -5.0]])), 2)
    array([1., 0.])
    """
    density = np.exp(pointwise - pointwise.max(axis=0))
    weights = np.full(len(density), 1 / len(density))
    for _ in range(iterations):
        share = weights[:, None] * density
        weights = (share / share.sum(axis=0)).mean(axis=1)
    return weights
