"""Adaptive importance sampling: independent draws of a posterior that lies near one that is known already.

Leaving a condition out, or another prior, moves a posterior a little. In coordinates in which the known posterior is straight, a
Student distribution is fitted to weighted draws, new draws of it are weighted, and so on; weights are tempered until enough of the
draws carry weight, so that a posterior several widths away is reached in a few rounds (Cappé, Guillin, Marin and Robert, J. Comput.
Graph. Stat. 13, 907 (2004); tempering as in Koblents and Míguez, Stat. Comput. 25, 407 (2015)). The Pareto shape of the last weights
says whether they can be trusted (Vehtari et al. 2024).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

from escape_inference.bend import bent, fit_bend, unbent
from escape_inference.cross_validation import smoothed
from escape_inference.student import BLOCK, FREEDOM, LogDensity, Student, at_points, fit_student

ROUND = BLOCK  #: draws in each round but the last
ROUNDS = 20
SHARE = 0.2  #: effective share of the draws to which weights are tempered
SETTLED = 2  #: rounds with untempered weights before the last one
INFLATION = 1.5  #: widening of the fitted distribution, so that its tails cover those of the posterior


class Weighted(NamedTuple):
    """Draws with their log weights, normalised so that the mean weight is the evidence; ``pareto_k`` of the weights."""

    z: Float[np.ndarray, "draw dim"]
    log_weight: Float[np.ndarray, " draw"]
    pareto_k: float

    @property
    def log_evidence(self) -> float:
        """Logarithm of the mean weight."""
        return float(logsumexp(self.log_weight) - np.log(len(self.log_weight)))

    @property
    def standard_error(self) -> float:
        """Standard error of ``log_evidence``, nats."""
        return float(np.sqrt(max(1 / effective_share(self.log_weight) - 1, 0.0) / len(self.log_weight)))


def effective_share(log_weight: Float[np.ndarray, " draw"], power: float = 1.0) -> float:
    """Kish's effective number of draws with weights ``w^power``, as a share of all.

    >>> effective_share(np.log([1.0, 1.0, 0.0, 0.0] + np.full(4, 1e-300)))
    0.5
    """
    weight = np.exp(power * (log_weight - log_weight.max()))
    return float(weight.sum() ** 2 / (weight @ weight) / len(log_weight))


def importance_sample(
    log_density: LogDensity,
    start: Float[np.ndarray, "start dim"],
    log_weight: Float[np.ndarray, " start"],
    *,
    complete: Callable[[np.ndarray], np.ndarray] = lambda points: points,
    data: Any = None,
    draws: int = 2000,
    seed: int = 0,
) -> Weighted:
    """Draws of ``exp(log_density)`` by adaptive importance sampling.

    Args:
        log_density: ``log_density(z)`` or ``log_density(z, data)``, unnormalised log density at a point ``z [dim]``.
        start: points near the posterior.
        log_weight: logarithm of the density over that of the points, up to a constant; points where it is not finite are not used.
        complete: makes of such points those that ``log_density`` takes, with coordinates that are held perhaps.
        data: pytree of arrays handed on to ``log_density``; other values compile nothing new.
        draws: number of draws returned.
        seed: the same seed gives the same draws.

    >>> import jax.numpy as jnp
    >>> start = np.random.default_rng(0).normal(size=(2000, 2))
    >>> found = importance_sample(lambda z: -50 * jnp.sum((z - 3) ** 2), start, -50 * np.sum((start - 3) ** 2, axis=1))
    >>> abs(found.log_evidence - np.log(np.pi / 50)) < 3 * found.standard_error < 0.1
    True
    """
    rng = np.random.default_rng(seed)
    usable = np.isfinite(log_weight)
    points, weights, settled = np.asarray(start)[usable], np.asarray(log_weight)[usable], 0
    if not usable.any():
        return Weighted(np.asarray(start), np.full(len(usable), -np.inf), float("inf"))
    bend = fit_bend(points)
    points, log_volume = unbent(bend, points), float(np.linalg.slogdet(bend.axes)[1])
    for number in range(ROUNDS + 1):
        student, power = _fit(points, weights)
        settled += power == 1.0
        last = settled > SETTLED or number == ROUNDS
        count, dim = draws if last else ROUND, points.shape[1]
        points = student.transform(rng.standard_normal((count, dim + FREEDOM)))
        value = at_points(log_density, complete(bent(bend, points)), data) + log_volume
        weights = np.where(np.isnan(value), -np.inf, value) - student.log_density(points)
        if last or not np.isfinite(weights).any():
            break
    if not np.isfinite(weights).any():
        return Weighted(bent(bend, points), weights, float("inf"))
    return Weighted(bent(bend, points), weights, smoothed(weights)[1])


def _fit(points: np.ndarray, log_weight: np.ndarray) -> tuple[Student, float]:
    """A Student distribution fitted to tempered weights, wider than they are, and the power of the tempering."""
    low, high = 0.0, 1.0
    if effective_share(log_weight) < SHARE:
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if effective_share(log_weight, middle) > SHARE else (low, middle)
        high = low
    student = fit_student(points, np.exp(high * log_weight - logsumexp(high * log_weight)))
    return student._replace(factor=INFLATION * student.factor), high
