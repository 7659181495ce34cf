r"""Bayes factors of a point inside a family: the posterior density of one parameter at a value, over its prior density.

For a law that is a family with one parameter held fixed (the power law is the noise exponent family at q = 1) the Bayes factor against the
family is the ratio of these densities (Dickey and Lientz 1970). The posterior density is :math:`\int p(y, \theta^*, \phi)\,d\phi / Z`
with Z from bridge sampling and the integral over the other parameters φ by adaptive importance sampling, which starts from the draws moved to
θ* along their regression; unlike a histogram of draws it reaches into the tail of the posterior, and its error is known.
"""

from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.stats import norm

from escape_inference.cross_validation import pareto_limit
from escape_inference.evidence import Evidence, bridge_log_evidence
from escape_inference.exploration import Problem, densities
from escape_inference.importance import importance_sample
from escape_inference.model import PriorWidths
from escape_inference.precision import float64
from escape_inference.student import LogDensity, at_points, call


@float64
def point_bayes_factor(problem: Problem, z: Float[np.ndarray, "chain draw slot"], name: str, value: float) -> Evidence:
    """Log Bayes factor of a parameter held at a value against the law with the parameter free.

    Args:
        problem: the law on prepared data.
        z: posterior draws of ``problem.target``.
        name: a parameter of the law with a normal prior.
        value: the point.

    Returns:
        Natural log Bayes factor (positive: the point is favoured) and its standard error; NaN where the parameter is not sampled or the
        weights of the importance sampling cannot be trusted.
    """
    target, median = problem.target, problem.inputs.medians.get(name)
    chosen = next((p for p in problem.law.parameters if p.name == name and not p.positive), None)
    sites = [site for site, _ in problem.shapes]
    if chosen is None or median is None or name not in sites:
        return Evidence(float("nan"), float("nan"), "savage_dickey")
    before = problem.shapes[: sites.index(name)]
    row = sum(int(np.prod(shape)) for _, (shape, _) in before)
    column = int(target.used[row])
    point = (value - target.offset[row]) / target.scale[row]
    data = (target.inputs, problem.weighted(np.ones(len(problem.observed.escapes))), PriorWidths().as_arrays())
    log_joint = densities(target.law, target.shapes)[0]
    density = log_marginal_density(log_joint, z, column, float(point), data)
    log_prior = norm.logpdf(value, float(median), chosen.width) + np.log(target.scale[row])
    return Evidence(float(density.log_evidence - log_prior), density.standard_error, "savage_dickey")


def log_marginal_density(
    log_joint: LogDensity, z: Float[np.ndarray, "chain draw dim"], column: int, point: float, data: Any = None
) -> Evidence:
    """Log posterior density of one coordinate at a point, and its standard error.

    >>> draws = np.random.default_rng(0).normal(size=(4, 1000, 2)) @ np.array([[1.0, 0.8], [0.0, 0.6]])
    >>> precision = jnp.array(np.linalg.inv([[1.0, 0.8], [0.8, 1.0]]))
    >>> found = log_marginal_density(lambda x: -x @ precision @ x / 2, draws, 0, 2.5)
    >>> abs(found.log_evidence - norm.logpdf(2.5)) < 4 * found.standard_error < 0.2
    True
    """
    whole = bridge_log_evidence(log_joint, z, data=data)
    flat = z.reshape(-1, z.shape[-1])
    others = np.delete(np.arange(flat.shape[1]), column)
    covariance = np.cov(flat.T)
    slope = covariance[column, others] / covariance[column, column]
    start = flat[:, others] + (point - flat[:, column])[:, None] * slope
    held = _held(log_joint, column)
    weight = at_points(held, start, (jnp.asarray(point), data))
    found = importance_sample(held, start, weight - weight.max(), data=(jnp.asarray(point), data), draws=len(flat))
    if not found.pareto_k < pareto_limit(len(flat)):
        return Evidence(float("nan"), float("nan"), "savage_dickey")
    error = float(np.hypot(found.standard_error, whole.standard_error))
    return Evidence(found.log_evidence - whole.log_evidence, error, "savage_dickey")


@lru_cache(maxsize=16)
def _held(log_joint: LogDensity, column: int) -> LogDensity:
    """The density as a function of all coordinates but one; one function object for each, so that nothing compiles twice."""

    def density(rest: Array, held: tuple[Array, Any]) -> Array:
        point, data = held
        return call(log_joint, jnp.concatenate([rest[:column], point[None], rest[column:]]), data)

    return density
