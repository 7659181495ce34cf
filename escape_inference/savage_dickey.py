r"""Bayes factors of a point inside a family: the posterior density of one parameter at a value, over its prior density.

For a law that is a family with one parameter held fixed (the power law is the noise exponent family at q = 1) the Bayes factor against the
family is the ratio of these densities (Dickey and Lientz 1970). The posterior density is the mean over draws of

.. math:: w(\theta_s)\, p(y, \theta^*, \phi_s') / p(y, \theta_s, \phi_s),

where w is a normal density fitted to the draws and φ' are the other parameters moved along their regression on θ (Chen, JASA 89,
818 (1994)). Unlike a histogram of draws it reaches into the tail of the posterior, and its error is known.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp
from scipy.stats import norm

from escape_inference.bridge import effective_size
from escape_inference.evidence import Evidence
from escape_inference.exploration import Problem, densities
from escape_inference.model import PriorWidths
from escape_inference.precision import float64
from escape_inference.student import LogDensity, at_points


@float64
def point_bayes_factor(problem: Problem, z: Float[np.ndarray, "chain draw slot"], name: str, value: float) -> Evidence:
    """Log Bayes factor of a parameter held at a value against the law with the parameter free.

    Args:
        problem: the law on prepared data.
        z: posterior draws of ``problem.target``.
        name: a parameter of the law with a normal prior.
        value: the point.

    Returns:
        Natural log Bayes factor (positive: the point is favoured) and its standard error; NaN where the parameter is not sampled.
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
    log_density, error = log_marginal_density(log_joint, z, column, float(point), data)
    log_prior = norm.logpdf(value, float(median), chosen.width) + np.log(target.scale[row])
    return Evidence(float(log_density - log_prior), error, "savage_dickey")


def log_marginal_density(
    log_joint: LogDensity, z: Float[np.ndarray, "chain draw dim"], column: int, point: float, data: object = None
) -> tuple[float, float]:
    """Log posterior density of one coordinate at a point, and its standard error.

    >>> import jax.numpy as jnp
    >>> draws = np.random.default_rng(0).normal(size=(4, 1000, 2)) @ np.array([[1.0, 0.8], [0.0, 0.6]])
    >>> precision = jnp.array(np.linalg.inv([[1.0, 0.8], [0.8, 1.0]]))
    >>> density, error = log_marginal_density(lambda x: -x @ precision @ x / 2, draws, 0, 2.5)
    >>> abs(density - norm.logpdf(2.5)) < 4 * error < 0.2
    True
    """
    chains, draws, dim = z.shape
    flat = z.reshape(-1, dim)
    covariance = np.atleast_2d(np.cov(flat.T))
    slope = covariance[column] / covariance[column, column]
    moved = flat + (point - flat[:, column])[:, None] * slope
    both = at_points(log_joint, np.concatenate([flat, moved]), data)
    here, there = both[: len(flat)], both[len(flat) :]
    width = np.sqrt(covariance[column, column])
    log_weight = norm.logpdf(flat[:, column], flat[:, column].mean(), width) + there - here
    log_weight = np.where(np.isfinite(log_weight), log_weight, -np.inf)
    total = float(logsumexp(log_weight) - np.log(len(flat)))
    weight = np.exp(log_weight - total).reshape(chains, draws)
    error = float(weight.std() / np.sqrt(max(float(effective_size(jnp.asarray(weight))), 1.0)))
    return total, error
