"""First sight of a posterior: tempered Monte Carlo from the prior, and from it starts, scales and a fast form of the law."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from escape_inference.evidence import Evidence, smc
from escape_inference.law import Law
from escape_inference.likelihood import Observations
from escape_inference.model import Evaluation, Inputs, evaluate, sample_prior
from escape_inference.sampler import Shapes
from escape_inference.surrogate import (
    NEAR_NODES,
    NEAR_SDS,
    WIDE_NODES,
    WIDE_SDS,
    Surrogate,
    chebyshev_coefficients,
    chebyshev_points,
)

FEW_DIMENSIONS = 7
BLOCK = 100
LOG_DIMENSIONS = (float(np.log(0.05)), float(np.log(200.0)))


@dataclass(frozen=True)
class Problem:
    """One law on prepared data: everything that sampling, evidence and cross-validation need.

    Attributes:
        law, inputs, observed: as in :func:`~escape_inference.model.escape_model`.
        shapes: shape of every sampled site and whether it is positive.
        fast: ``inputs`` with the law's rates as Chebyshev polynomials near the posterior, where that saves time.
        evidence: log evidence by tempered Monte Carlo.
        particles: draws close to the posterior, ``[particle, dim]``, of equal weight.
    """

    law: Law
    inputs: Inputs
    observed: Observations
    shapes: Shapes
    fast: Inputs
    evidence: Evidence
    particles: Float[np.ndarray, "particle dim"]


def explore(law: Law, inputs: Inputs, observed: Observations, shapes: Shapes, seed: int) -> Problem:
    """Run tempered Monte Carlo from the prior and prepare the sampler."""
    _, log_prior, log_likelihood, from_prior = densities(law, shapes)
    dim = int(sum(np.prod(shape) for _, (shape, _) in shapes))
    size = 1024 if dim <= FEW_DIMENSIONS else 2048
    nothing = Evidence(float("nan"), float("nan"), "none")
    prior = np.asarray(sample_prior(jax.random.key(seed), law, inputs, observed, 2000))
    problem = Problem(law, inputs, observed, shapes, inputs, nothing, prior)
    data = (with_surrogate(problem, prior, wide=True), observed, jnp.asarray(1.0))
    evidence, outcome = smc(log_prior, log_likelihood, from_prior, data, seed, particles=size)
    z, weight = np.asarray(outcome.particles).reshape(-1, dim), np.asarray(outcome.weights).ravel()
    good = np.isfinite(z).all(axis=1) & np.isfinite(weight)
    rng = np.random.default_rng(seed)
    particles = z[good][rng.choice(good.sum(), 2000, p=weight[good] / weight[good].sum())]
    problem = replace(problem, evidence=evidence, particles=particles)
    return replace(problem, fast=with_surrogate(problem, particles, wide=False))


@lru_cache(maxsize=64)
def densities(law: Law, shapes: Shapes) -> tuple[Callable[..., Array], ...]:
    """Log joint, prior and likelihood as functions of (z, data), and a draw from the prior.

    Their identity is stable, so that nothing compiles twice; ``data`` is ``(inputs, observed, width)``.
    """

    def value(z: Array, data: Any) -> Evaluation:
        inputs, observed, width = data
        return evaluate(z, law, dict(shapes), inputs, observed, width)

    def log_prior(z: Array, data: Any) -> Array:
        return value(z, data).log_prior

    def log_likelihood(z: Array, data: Any) -> Array:
        return jnp.sum(value(z, data).log_likelihood)

    def log_joint(z: Array, data: Any) -> Array:
        one = value(z, data)
        return one.log_prior + jnp.sum(one.log_likelihood)

    def from_prior(key: Array, data: Any) -> Array:
        inputs, observed, width = data
        return sample_prior(key, law, inputs, observed, 1, width)[0]

    return log_joint, log_prior, log_likelihood, from_prior


def evaluate_points(
    z: Float[np.ndarray, "draw dim"], inputs: Inputs, observed: Observations, *, law: Law, shapes: Shapes
) -> Evaluation:
    """The model at many points of unconstrained space, in blocks of one size so that it compiles once."""
    z = np.asarray(z)
    blocks = -(-len(z) // BLOCK)
    padded = np.concatenate([z, np.repeat(z[-1:], blocks * BLOCK - len(z), axis=0)])
    parts = [_evaluate_block(part, inputs, observed, law, shapes) for part in np.split(padded, blocks)]
    return jax.tree.map(lambda *x: np.concatenate([np.asarray(part) for part in x])[: len(z)], *parts)


@partial(jax.jit, static_argnames=("law", "shapes"))
def _evaluate_block(z: Array, inputs: Inputs, observed: Observations, law: Law, shapes: Shapes) -> Evaluation:
    return jax.vmap(lambda point: evaluate(point, law, dict(shapes), inputs, observed))(z)


def with_surrogate(problem: Problem, points: Float[np.ndarray, "point dim"], *, wide: bool) -> Inputs:
    """Inputs with the law's rates as Chebyshev polynomials around some points, or unchanged where that is no help.

    It helps for thresholds, with one to three parameters and exactly known settings.
    """
    inputs, law = problem.inputs, problem.law
    names = [p.name for p in law.parameters_for(inputs.barriers) if p.name in dict(problem.shapes)]
    latent = len(problem.shapes) > len(names) + 2
    if "threshold" not in inputs.barriers or latent or len(names) not in NEAR_NODES:
        return inputs
    order = [name for name, _ in problem.shapes]
    where = [order.index(name) for name in names]
    reach = (WIDE_SDS if wide else NEAR_SDS) * points.std(axis=0) + 1e-6
    low, high = points.mean(axis=0) - reach, points.mean(axis=0) + reach
    if "effective_dimension" in names:
        i = order.index("effective_dimension")
        low[i], high[i] = max(low[i], LOG_DIMENSIONS[0]), min(high[i], LOG_DIMENSIONS[1])
    center, half_width = (low + high) / 2, (high - low) / 2
    count = (WIDE_NODES if wide else NEAR_NODES)[len(names)]
    grid = chebyshev_points(len(names), count)
    z = np.tile(center, (len(grid), 1))
    z[:, where] += half_width[where] * grid
    sites = evaluate_points(jnp.asarray(z), inputs, problem.observed, law=law, shapes=problem.shapes).sites
    rates = np.asarray(sites["log_rate"]) - np.asarray(sites["log_prefactor"])[:, None]
    if not np.isfinite(rates).all():
        return inputs
    surrogate = Surrogate(
        center=jnp.asarray(center[where]),
        half_width=jnp.asarray(half_width[where]),
        coefficients=jnp.asarray(chebyshev_coefficients(rates, len(names), count)),
        names=tuple(names),
        positive=tuple(dict(problem.shapes)[name][1] for name in names),
    )
    return replace(inputs, surrogate=surrogate)


def density_error(problem: Problem, z: Float[np.ndarray, "draw dim"]) -> float:
    """Largest error of the fast log-likelihood at some points, apart from a constant."""
    if problem.fast.surrogate is None:
        return 0.0
    exact, fast = (
        evaluate_points(jnp.asarray(z), inputs, problem.observed, law=problem.law, shapes=problem.shapes)
        for inputs in (problem.inputs, problem.fast)
    )
    error = np.asarray(exact.log_likelihood - fast.log_likelihood).sum(axis=1)
    return float(np.max(np.abs(error - error.mean())))
