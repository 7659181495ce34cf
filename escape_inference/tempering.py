"""Tempered sequential Monte Carlo: the computation behind :func:`escape_inference.evidence.smc_log_evidence`."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import blackjax.smc.resampling as resampling
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.smc import tempered
from blackjax.smc.solver import dichotomy
from blackjax.smc.waste_free import waste_free_smc
from jax import export
from jax.scipy.special import log_ndtr, logsumexp
from jaxtyping import Array, Float

from escape_inference.programs import Ahead
from escape_inference.student import FREEDOM, LogDensity, Student, call, fit_normal, normals

FEWEST = 4  # runs from whose spread an error is estimated
LOWEST = -1e12  # log likelihood given to points where the likelihood vanishes or cannot be computed


class _Particle(NamedTuple):
    """A point together with the two densities there, so that no density is evaluated twice."""

    z: Array
    log_prior: Array
    log_likelihood: Array


class _ChainState(NamedTuple):
    position: _Particle
    log_density: Array


class _Plan(NamedTuple):
    """Temperatures [step] and the moments of the proposals, means [step, dim] and Cholesky factors [step, dim, dim]."""

    temperature: Array
    mean: Array
    factor: Array


class Outcome(NamedTuple):
    """Log evidence and its error from all runs, and of each run the last particles and their weights (0 of runs that were not needed)."""

    log_evidence: Float[Array, ""]
    standard_error: Float[Array, ""]
    particles: Float[Array, "replicate particle dim"]
    weights: Float[Array, "replicate particle"]


export.register_namedtuple_serialization(Outcome, serialized_name="escape_inference.Outcome")


@partial(
    Ahead,
    static=("log_prior", "log_likelihood", "sample_prior", "particles", "moves", "replicates", "steps"),
)
def tempered_log_evidences(
    data: Any,
    key: Array,
    target: Array,
    wanted: Array,
    *,
    log_prior: LogDensity,
    log_likelihood: LogDensity,
    sample_prior: Callable[..., Array],
    particles: int,
    moves: int,
    replicates: int,
    steps: int,
) -> Outcome:
    """Tempered runs from the prior to the posterior, ``FEWEST`` or as many up to ``replicates`` as give the ``wanted`` error; the pilot's own outcome is left out."""

    def particle(z: Array) -> _Particle:
        likelihood = call(log_likelihood, z, data)
        return _Particle(z, call(log_prior, z, data), jnp.where(likelihood > LOWEST, likelihood, LOWEST))

    def move(
        key: Array, state: _ChainState, density: LogDensity, mean: Array, factor: Array
    ) -> tuple[_ChainState, Array]:
        """Metropolis-Hastings: with equal odds a local step (2.38**2 / d covariance) or a jump to the Student."""
        z = state.position.z
        random = normals(key, z.size + FREEDOM + 2)
        jump, log_uniform = random[-2] > 0, log_ndtr(random[-1])
        local = z + 2.38 / np.sqrt(z.size) * factor @ random[: z.size]
        student = Student(mean, factor * np.sqrt((FREEDOM - 2) / FREEDOM))
        proposed = particle(jnp.where(jump, student.transform(random[:-2]), local))
        log_density = density(proposed)
        correction = jnp.where(jump, student.log_density(z) - student.log_density(proposed.z), 0.0)
        log_ratio = log_density - state.log_density + correction
        accept = log_uniform < log_ratio
        candidate = _ChainState(proposed, log_density)
        return jax.tree.map(partial(jnp.where, accept), candidate, state), accept

    kernel = tempered.build_kernel(
        lambda point: point.log_prior,
        lambda point: point.log_likelihood,
        move,
        lambda position, density: _ChainState(position, density(position)),
        resampling.systematic,
        waste_free_smc(particles, moves),
    )
    chains = particles // moves

    def next_temperature(state: tempered.TemperedSMCState) -> Array:
        """The tempering parameter at which the effective share of the weighted particles falls to the target."""
        log_weights, log_likelihoods = jnp.log(state.weights), state.particles.log_likelihood

        def excess(delta: Array) -> Array:
            tilted = log_weights + delta * log_likelihoods
            return 2 * logsumexp(tilted) - logsumexp(tilted + delta * log_likelihoods) - jnp.log(target)

        return state.tempering_param + dichotomy(excess, zero, 1 - state.tempering_param)

    def run(plan: _Plan, number: Array) -> tuple[_Plan, Array, Array, Array, Array]:
        """One run. Run 0 is the pilot: it makes the plan of temperatures and proposals that the others follow."""
        key_prior, key_steps = jax.random.split(jax.random.fold_in(key, number))
        prior_draws = jax.vmap(lambda k: call(sample_prior, k, data))(jax.random.split(key_prior, particles))
        state = tempered.init(jax.vmap(particle)(prior_draws))._replace(tempering_param=zero)

        def unfinished(carry: tuple[Any, ...]) -> Array:
            return (carry[0].tempering_param < 1) & (carry[4] < steps)

        def temper(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            state, log_z, variance, plan, count = carry
            own = (next_temperature(state), *fit_normal(state.particles.z, state.weights))
            temperature, mean, factor = (jnp.where(number == 0, x, y[count]) for x, y in zip(own, plan, strict=True))
            plan = _Plan(*(x.at[count].set(y) for x, y in zip(plan, (temperature, mean, factor), strict=True)))
            proposal = {"mean": mean[None], "factor": factor[None]}
            state, info = kernel(jax.random.fold_in(key_steps, count), state, None, temperature, proposal)
            state = state._replace(tempering_param=temperature)
            starts, rest = jnp.split(state.weights, [chains])  # the starts of all chains, then chain after chain
            shares = starts + rest.reshape(chains, -1).sum(axis=1)
            variance += jnp.sum((shares - 1 / chains) ** 2) * chains / (chains - 1)
            return state, log_z + info.log_likelihood_increment, variance, plan, count + 1

        start = (state, zero, zero, plan, jnp.asarray(0))
        state, log_z, variance, plan, _ = jax.lax.while_loop(unfinished, temper, start)
        log_z = jnp.where(state.tempering_param < 1, jnp.nan, log_z)
        return plan, log_z, variance, state.particles.z, state.weights

    def repeat(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        number, plan, *rest = carry
        plan, *found = run(plan, number)
        place = jnp.maximum(number - 1, 0)  # the pilot's is written over
        return number + 1, plan, *(x.at[place].set(y) for x, y in zip(rest, found, strict=True))

    def unsure(carry: tuple[Any, ...]) -> Array:
        number, _, log_z, variance, *_ = carry
        error = combined(log_z, variance, number - 1)[1]
        return (number <= replicates) & ((number <= min(FEWEST, replicates)) | ~(error < wanted))

    zero = jnp.zeros((), target.dtype)
    dim = jax.eval_shape(lambda: call(sample_prior, key, data)).shape[-1]
    room = lambda size, *shapes: tuple(jnp.zeros((size, *shape), target.dtype) for shape in shapes)
    plan = _Plan(*room(steps, (), (dim,), (dim, dim)))
    start: tuple[Any, ...] = jnp.asarray(0), plan, *room(replicates, (), (), (particles, dim), (particles,))
    number, _, log_z, variance, points, weights = jax.lax.while_loop(unsure, repeat, start)
    return Outcome(*combined(log_z, variance, number - 1), points, weights)


def combined(
    log_z: Float[Array, " replicate"], variance: Float[Array, " replicate"], count: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Logarithm of the mean of the first ``count`` evidences, and its standard error: from their spread or from the relative ``variance`` of each, whichever is larger.

    >>> several = jnp.log(jnp.array([1.0, 3.0, 2.0, 100.0]))
    >>> mean, error = combined(several, jnp.zeros(4), jnp.asarray(3))
    >>> round(float(jnp.exp(mean)), 3), round(float(error), 3)  # a mean of 2 with a standard deviation of 1
    (2.0, 0.289)
    """
    done = jnp.arange(len(log_z)) < count
    top = jnp.max(jnp.where(done, log_z, -jnp.inf))
    share = jnp.where(done, jnp.exp(log_z - top), 0.0)
    mean = jnp.sum(share) / count
    spread = jnp.sum(jnp.where(done, (share / mean - 1) ** 2, 0.0)) / jnp.maximum(count - 1, 1)
    theory = jnp.sum(jnp.where(done, variance, 0.0)) / count
    return top + jnp.log(mean), jnp.sqrt(jnp.maximum(spread, theory) / count)
