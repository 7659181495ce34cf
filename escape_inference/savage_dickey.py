r"""Bayes factors of a point inside a family: the posterior density of one parameter at a value, over its prior density.

For a law that is a family with one parameter held fixed (the power law is the noise exponent family at q = 1) the Bayes factor against the
family is the ratio of these densities (Dickey and Lientz 1970). The posterior density is :math:`\int p(y, \theta^*, \phi)\,d\phi / Z`
with Z from bridge sampling and the integral over the other parameters φ by adaptive importance sampling, which starts from the draws moved to
θ* along their regression; unlike a histogram of draws it reaches into the tail of the posterior, and its error is known.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from escape_inference.cross_validation import pareto_limit
from escape_inference.evidence import Evidence
from escape_inference.importance import Weighted, importance_sample
from escape_inference.model import PriorWidths
from escape_inference.precision import float64
from escape_inference.problem import Problem, densities
from escape_inference.rate_tables import focus
from escape_inference.student import LogDensity, at_points, normal_log_density


@float64
def point_bayes_factor(
    problem: Problem, z: Float[np.ndarray, "draw slot"], evidence: Evidence, name: str, value: float
) -> Evidence:
    """Log Bayes factor of a parameter held at a value against the law with the parameter free.

    Args:
        problem: the law on prepared data.
        z: posterior draws of ``problem.target``.
        evidence: that of the law with the parameter free.
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
    row = sum(int(np.prod(shape)) for _, (shape, _) in problem.shapes[: sites.index(name)])
    column = int(target.used[row])
    point = float((value - target.offset[row]) / target.scale[row])
    start = moved(z, column, point)
    for _ in range(2):  # the law's rates are tabulated around the point, and again around what is found there
        problem = focus(problem, start)
        data = (
            problem.target.inputs,
            problem.weighted(np.ones(len(problem.observed.escapes))),
            PriorWidths().as_arrays(),
        )
        log_joint = densities(problem.target.law, problem.target.shapes)[0]
        found = integrate(log_joint, start, column, point, data)
        start = found.z
    if not found.pareto_k < pareto_limit(len(found.z)):
        return Evidence(float("nan"), float("nan"), "savage_dickey")
    log_prior = normal_log_density(value, float(median), chosen.width) + np.log(target.scale[row])
    error = float(np.hypot(found.standard_error, evidence.standard_error))
    return Evidence(float(found.log_evidence - evidence.log_evidence - log_prior), error, "savage_dickey")


def moved(z: Float[np.ndarray, "draw dim"], column: int, point: float) -> Float[np.ndarray, "draw dim"]:
    """Draws with one coordinate at a point, the others moved along their regression on it.

    >>> moved(np.array([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]]), 0, 5.0).tolist()
    [[5.0, 10.0], [5.0, 10.0], [5.0, 10.0]]
    """
    covariance = np.atleast_2d(np.cov(z.T))
    slope = covariance[column] / covariance[column, column]
    return z + (point - z[:, column])[:, None] * slope


def integrate(
    log_joint: LogDensity, start: Float[np.ndarray, "draw dim"], column: int, point: float, data: Any = None
) -> Weighted:
    """The integral of a density over all coordinates but one, from points near its mass; ``z`` of the result has all coordinates.

    >>> draws = np.random.default_rng(0).normal(size=(4000, 2)) @ np.array([[1.0, 0.8], [0.0, 0.6]])
    >>> import jax.numpy as jnp
    >>> from scipy.stats import norm
    >>> precision = jnp.array(np.linalg.inv([[1.0, 0.8], [0.8, 1.0]]))
    >>> found = integrate(lambda x: -x @ precision @ x / 2, moved(draws, 0, 2.5), 0, 2.5)
    >>> density = found.log_evidence - np.log(2 * np.pi * 0.6)
    >>> abs(density - norm.logpdf(2.5)) < 4 * found.standard_error < 0.2
    True
    """
    complete = lambda rest: np.insert(rest, column, point, axis=1)
    rest = np.delete(start, column, axis=1)
    weight = at_points(log_joint, complete(rest), data)
    found = importance_sample(
        log_joint, rest, weight - weight.max(), complete=complete, data=data, draws=len(start) // 2
    )
    return found._replace(z=complete(found.z))
