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
from escape_inference.surrogate import BOX_SDS, DEGREES, Surrogate, chebyshev_coefficients, chebyshev_points

FEW_DIMENSIONS = 7


@dataclass(frozen=True)
class Problem:
    """One law on prepared data: everything that sampling, evidence and cross-validation need.

    Attributes:
        law, inputs, observed: as in :func:`~escape_inference.model.escape_model`.
        shapes: shape of every sampled site and whether it is positive.
        fast: ``inputs`` with the law's rates as Chebyshev polynomials near the posterior, where that saves time.
        evidence: log evidence by tempered Monte Carlo, with the exact law.
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
    data = (inputs, observed, jnp.asarray(1.0))
    evidence, outcome = smc(log_prior, log_likelihood, from_prior, data, seed, particles=size)
    z, weight = np.asarray(outcome.particles).reshape(-1, dim), np.asarray(outcome.weights).ravel()
    good = np.isfinite(z).all(axis=1) & np.isfinite(weight)
    rng = np.random.default_rng(seed)
    particles = z[good][rng.choice(good.sum(), 2000, p=weight[good] / weight[good].sum())]
    problem = Problem(law, inputs, observed, shapes, inputs, evidence, particles)
    return replace(problem, fast=_with_surrogate(problem))


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


@partial(jax.jit, static_argnames=("law", "shapes"))
def evaluate_points(
    z: Float[Array, "draw dim"], inputs: Inputs, observed: Observations, *, law: Law, shapes: Shapes
) -> Evaluation:
    """The model at many points of unconstrained space."""
    return jax.lax.map(lambda point: evaluate(point, law, dict(shapes), inputs, observed), z, batch_size=100)


def _with_surrogate(problem: Problem) -> Inputs:
    """Chebyshev form of the law's rates, if it has thresholds, few parameters and no latent settings; else the inputs."""
    inputs, law = problem.inputs, problem.law
    names = [p.name for p in law.parameters_for(inputs.barriers) if p.name in dict(problem.shapes)]
    latent = len(problem.shapes) > len(names) + 2
    if "threshold" not in inputs.barriers or latent or len(names) not in DEGREES:
        return inputs
    position = {name: i for i, (name, _) in enumerate(problem.shapes)}
    where = [position[name] for name in names]
    center, half_width = problem.particles.mean(axis=0), BOX_SDS * problem.particles.std(axis=0) + 1e-6
    points = chebyshev_points(len(names))
    z = np.tile(center, (len(points), 1))
    z[:, where] += half_width[where] * points
    sites = evaluate_points(jnp.asarray(z), inputs, problem.observed, law=law, shapes=problem.shapes).sites
    rates = np.asarray(sites["log_rate"]) - np.asarray(sites["log_prefactor"])[:, None]
    if not np.isfinite(rates).all():
        return inputs
    surrogate = Surrogate(
        center=jnp.asarray(center[where]),
        half_width=jnp.asarray(half_width[where]),
        coefficients=jnp.asarray(chebyshev_coefficients(rates, len(names))),
        names=tuple(names),
        positive=tuple(dict(problem.shapes)[name][1] for name in names),
    )
    return replace(inputs, surrogate=surrogate)
