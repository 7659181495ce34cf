"""Tempered sequential Monte Carlo: the computation behind :func:`escape_inference.evidence.smc_log_evidence`.

One step (resampling, moves, weights) is a compiled program; temperatures, proposals and random numbers are NumPy's, so that
little is left to compile.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float
from scipy.optimize import brentq

from escape_inference.bend import BENT, Bend, bent, fit_bend, straight, unbent
from escape_inference.later import library
from escape_inference.programs import Ahead
from escape_inference.student import (
    FREEDOM,
    LogDensity,
    Student,
    at_points,
    call,
    draws_of,
    fit_normal,
    prepare_density,
)

PILOTS = 4  # at most, where data are revised
FEWEST = 4  # runs from whose spread an error is estimated
PRIOR, MOVES = 1, 2  # streams of random numbers of one run
LOWEST = -1e12  # log likelihood given to points where the likelihood vanishes or cannot be computed


class Particle(NamedTuple):
    """A point, the same in straight coordinates, and the two densities there, so that no density is evaluated twice."""

    z: Any
    straight: Any
    log_prior: Any
    log_likelihood: Any


export.register_namedtuple_serialization(Particle, serialized_name="escape_inference.Particle")


class _ChainState(NamedTuple):
    position: Particle
    log_density: Array
    moves: Array


#: From a pilot's particles and weights: the data for another pilot and all other runs; None if they were right.
Revise = Callable[[Float[np.ndarray, "particle dim"], Float[np.ndarray, " particle"]], Any]


class Step(NamedTuple):
    """A temperature, and the coordinates and moments of the proposal with which it is reached."""

    temperature: float
    bend: Bend
    mean: Float[np.ndarray, " dim"]
    factor: Float[np.ndarray, "dim dim"]


class Outcome(NamedTuple):
    """Log evidence and its error from all runs, and of each run the last particles and their weights."""

    log_evidence: float
    standard_error: float
    particles: Float[np.ndarray, "replicate particle dim"]
    weights: Float[np.ndarray, "replicate particle"]


class Sampler(NamedTuple):
    """What is sampled, and by how many ``particles`` in chains of how many ``moves``."""

    log_prior: LogDensity
    log_likelihood: LogDensity
    sample_prior: Callable[..., Array]
    particles: int
    moves: int

    def prepare(self, data: Any, dim: int) -> None:
        """Start compiling what is needed for points of ``dim`` coordinates."""
        prepare_density(self.log_likelihood, dim, data)
        prepare_density(self.log_prior, dim, data)
        array = lambda *shape: jax.ShapeDtypeStruct(shape, np.float64)
        size, chains = self.particles, self.particles // self.moves
        particles = Particle(array(size, dim), array(size, dim), array(size), array(size))
        noise = array(chains, self.moves - 1, dim + FREEDOM + 2)
        parents = jax.ShapeDtypeStruct((chains,), np.int64)
        state = particles, array(size), array()
        move.prepare(data, *state, array(), parents, noise, straight(dim), array(dim), array(dim, dim), **self._static)

    def start(self, data: Any, seed: int, number: int) -> Particle:
        """Draws from the prior."""
        z = draws_of(self.sample_prior, self.particles, [seed, number, PRIOR], data)
        likelihood = at_points(self.log_likelihood, z, data)
        return Particle(z, z, at_points(self.log_prior, z, data), np.where(likelihood > LOWEST, likelihood, LOWEST))

    def move(self, data: Any, state: "_Weighted", step: Step, rng: np.random.Generator) -> tuple["_Weighted", float]:
        """The particles at the temperature of the step, and the increment of the log evidence."""
        chains, dim = self.particles // self.moves, state.particles.z.shape[1]
        share = np.cumsum(state.weights)
        parents = np.searchsorted(share, (np.arange(chains) + rng.random()) / chains * share[-1])  # systematic
        noise = rng.standard_normal((chains, self.moves - 1, dim + FREEDOM + 2))
        particles = state.particles._replace(straight=unbent(step.bend, state.particles.z))
        found = move(
            data,
            *(particles, state.weights, np.asarray(state.temperature), np.asarray(step.temperature)),
            *(np.minimum(parents, self.particles - 1), noise, step.bend, step.mean, step.factor),
            **self._static,
        )
        particles, weights, increment = jax.tree.map(np.asarray, found)
        return _Weighted(particles, weights, step.temperature), float(increment)

    @property
    def _static(self) -> dict[str, Any]:
        return {"log_prior": self.log_prior, "log_likelihood": self.log_likelihood}


class _Weighted(NamedTuple):
    particles: Particle
    weights: Float[np.ndarray, " particle"]
    temperature: float


@partial(Ahead, static=("log_prior", "log_likelihood"))
def move(
    data: Any,
    particles: Particle,
    weights: Float[Array, " particle"],
    before: Float[Array, ""],
    after: Float[Array, ""],
    parents: Array,
    noise: Float[Array, "chain move normal"],
    bend: Bend,
    mean: Float[Array, " dim"],
    factor: Float[Array, "dim dim"],
    *,
    log_prior: LogDensity,
    log_likelihood: LogDensity,
) -> tuple[Particle, Array, Array]:
    """Chains from the ``parents`` among the particles at one temperature, weighted for the next; the increment of log Z."""
    tempered, waste_free = library("blackjax.smc.tempered"), library("blackjax.smc.waste_free")

    def particle(w: Array) -> Particle:
        likelihood = call(log_likelihood, z := bent(bend, w), data)
        return Particle(z, w, call(log_prior, z, data), jnp.where(likelihood > LOWEST, likelihood, LOWEST))

    def metropolis(key: Array, state: _ChainState, density: LogDensity, noise: Array) -> tuple[_ChainState, Array]:
        """Metropolis-Hastings: with equal odds a local step (2.38**2 / d covariance) or a jump to the Student."""
        w, random = state.position.straight, noise[state.moves]
        jump, log_uniform = random[-2] > 0, log_ndtr(random[-1])
        local = w + 2.38 / np.sqrt(w.size) * factor @ random[: w.size]
        student = Student(mean, factor * np.sqrt((FREEDOM - 2) / FREEDOM))
        proposed = particle(jnp.where(jump, student.transform(random[:-2]), local))
        log_density = density(proposed)
        correction = jnp.where(jump, student.log_density(w) - student.log_density(proposed.straight), 0.0)
        accept = log_uniform < log_density - state.log_density + correction
        position, kept = jax.tree.map(
            partial(jnp.where, accept), (proposed, log_density), (state.position, state.log_density)
        )
        return _ChainState(position, kept, state.moves + 1), accept

    kernel = tempered.build_kernel(
        lambda point: point.log_prior,
        lambda point: point.log_likelihood,
        metropolis,
        lambda position, density: _ChainState(position, density(position), jnp.asarray(0)),
        lambda key, weights, count: parents,
        waste_free.waste_free_smc(len(weights), noise.shape[1] + 1),
    )
    state = tempered.TemperedSMCState(particles, weights, before)
    state, info = kernel(jax.random.key(0), state, None, after, {"noise": noise})
    return state.particles, state.weights, info.log_likelihood_increment


def tempered_log_evidences(
    sampler: Sampler,
    data: Any,
    seed: int,
    *,
    target: float,
    wanted: float,
    replicates: int,
    steps: int,
    revise: Revise | None = None,
) -> Outcome:
    """Tempered runs from the prior to the posterior, ``FEWEST`` or as many up to ``replicates`` as give the ``wanted`` error.

    A pilot makes the plan of temperatures and proposals that they follow; its own outcome is left out.
    """
    data = jax.device_put(data)  # once for all steps
    for left in reversed(range(PILOTS)):
        plan: list[Step] = []
        next_step = lambda state, done: _next_step(plan, state, target) if done < steps else None  # noqa: B023
        *_, seen = _run(sampler, data, seed, 0, next_step)
        revised = revise(seen.particles.z, seen.weights) if revise and left else None
        if revised is None:
            break
        data = jax.device_put(revised)
    follow = lambda state, done: plan[done] if done < len(plan) else None
    found: list[tuple[float, float, _Weighted]] = []
    while len(found) < replicates:
        found.append(_run(sampler, data, seed, len(found) + 1, follow))
        log_evidence, error = combined(*(np.array(x) for x in list(zip(*found, strict=True))[:2]))
        if len(found) >= FEWEST and error < wanted:
            break
    last = [state for *_, state in found]
    return Outcome(
        log_evidence, error, np.array([one.particles.z for one in last]), np.array([one.weights for one in last])
    )


def _run(
    sampler: Sampler, data: Any, seed: int, number: int, next_step: Callable[["_Weighted", int], Step | None]
) -> tuple[float, float, _Weighted]:
    """Log evidence of one run (NaN if it ends before the posterior), its relative variance, and the last particles."""
    rng = np.random.default_rng([seed, number, MOVES])
    size, chains = sampler.particles, sampler.particles // sampler.moves
    state = _Weighted(sampler.start(data, seed, number), np.full(size, 1 / size), 0.0)
    log_z, variance, done = 0.0, 0.0, 0
    while state.temperature < 1 and (step := next_step(state, done)) is not None:
        state, increment = sampler.move(data, state, step, rng)
        starts, rest = np.split(state.weights, [chains])  # the starts of all chains, then chain after chain
        shares = starts + rest.reshape(chains, -1).sum(axis=1)
        variance += np.sum((shares - 1 / chains) ** 2) * chains / (chains - 1)
        log_z, done = log_z + increment, done + 1
    return log_z if state.temperature == 1 else float("nan"), float(variance), state


def _next_step(plan: list[Step], state: _Weighted, target: float) -> Step:
    """The step at whose temperature the effective share of the weighted particles falls to the target; it joins the plan."""
    log_likelihood = state.particles.log_likelihood

    def excess(delta: float) -> float:
        grown = np.exp(delta * log_likelihood - np.max(delta * log_likelihood))
        return float(2 * np.log(state.weights @ grown) - np.log(state.weights @ grown**2) - np.log(target))

    rest = 1 - state.temperature
    if excess(rest) <= 0:
        rest = float(brentq(excess, 0.0, rest, xtol=1e-300, rtol=1e-6, maxiter=2000))
    bend = fit_bend(state.particles.z, state.weights, BENT)
    temperature = 1.0 if rest == 1 - state.temperature else state.temperature + rest
    plan.append(Step(temperature, bend, *fit_normal(unbent(bend, state.particles.z), state.weights)))
    return plan[-1]


def combined(log_z: Float[np.ndarray, " replicate"], variance: Float[np.ndarray, " replicate"]) -> tuple[float, float]:
    """Logarithm of the mean evidence, and its standard error: from the spread or from the relative ``variance`` of each, whichever is larger.

    >>> mean, error = combined(np.log([1.0, 3.0, 2.0]), np.zeros(3))
    >>> round(float(np.exp(mean)), 3), round(error, 3)  # a mean of 2 with a standard deviation of 1
    (2.0, 0.289)
    """
    share = np.exp(log_z - log_z.max())
    mean = share.mean()
    spread = np.var(share / mean, ddof=1) if len(share) > 1 else 0.0
    return float(log_z.max() + np.log(mean)), float(np.sqrt(np.maximum(spread, variance.mean()) / len(share)))
