"""Bridge sampling on split halves: the computation behind :func:`escape_inference.evidence.bridge_log_evidence`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from escape_inference.programs import Ahead
from escape_inference.student import FREEDOM, LogDensity, at_points, fit_student


def effective_size(values: Float[Array, "chain draw"]) -> Float[Array, ""]:
    """Effective number of independent draws for a mean over chains, by Geyer's initial monotone sequence.

    As in Vehtari et al., Bayesian Analysis 16, 667 (2021), eqs. 10-13, without ranks; at most the number of draws.
    """
    chains, draws = values.shape
    centred = values - values.mean(axis=1, keepdims=True)
    spectrum = jnp.fft.rfft(centred, n=2 * draws, axis=1)
    covariance = jnp.fft.irfft(spectrum * jnp.conj(spectrum), n=2 * draws, axis=1)[:, :draws].mean(axis=0) / draws
    between = jnp.var(values.mean(axis=1), ddof=1) if chains > 1 else 0.0
    within = covariance[0] * draws / (draws - 1)
    total = covariance[0] + between
    correlation = 1 - (within - covariance * draws / (draws - 1)) / total
    even = draws - draws % 2
    pairs = correlation[:even].at[0].set(1.0).reshape(-1, 2).sum(axis=1)
    positive = jnp.cumprod(pairs > 0)
    monotone = jax.lax.cummin(jnp.where(positive > 0, pairs, 0.0))
    time = jnp.maximum(2 * monotone.sum() - 1, 1.0)
    return jnp.where(total > 0, chains * draws / time, chains * draws)


@Ahead
def bridge(
    posterior: Float[Array, "chain draw"], proposal: Float[Array, " draw"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Optimal bridge between posterior and proposal, from log ratios (density / proposal density) at the draws of each.

    Gronau et al. (2017), eqs. 14-15 (fixed point, here in logarithms) and the appendix (relative mean-square error).
    """
    n_posterior, n_proposal = posterior.size, proposal.size
    size = effective_size(posterior)
    log_s1 = jnp.log(size / (size + n_proposal))
    log_s2 = jnp.log(n_proposal / (size + n_proposal))

    def bridge_terms(log_z: Array) -> tuple[Array, Array]:
        """Logarithms of p / (s1 p + s2 g) at the proposal's draws and of g / (s1 p + s2 g) at the posterior's."""
        at_proposal = proposal - log_z
        at_posterior = posterior - log_z
        return at_proposal - jnp.logaddexp(log_s1 + at_proposal, log_s2), -jnp.logaddexp(log_s1 + at_posterior, log_s2)

    def update(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        log_z, _, count = carry
        at_proposal, at_posterior = bridge_terms(log_z)
        step = logsumexp(at_proposal) - jnp.log(n_proposal) - logsumexp(at_posterior) + jnp.log(n_posterior)
        return log_z + step, jnp.abs(step), count + 1

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        return (carry[1] > 1e-10) & (carry[2] < 1000)

    start = (jnp.median(posterior), jnp.asarray(jnp.inf, posterior.dtype), jnp.asarray(0))
    log_z, step, _ = jax.lax.while_loop(unfinished, update, start)
    at_proposal, at_posterior = (jnp.exp(terms) for terms in bridge_terms(log_z))
    variance = jnp.var(at_proposal) / jnp.mean(at_proposal) ** 2 / n_proposal
    variance += jnp.var(at_posterior) / jnp.mean(at_posterior) ** 2 / effective_size(at_posterior)
    return jnp.where(step <= 1e-6, log_z, jnp.nan), variance


def prepare_bridge(chains: int, draws: int) -> None:
    """Start compiling :func:`bridge` for so many draws."""
    half = draws // 2
    bridge.prepare(*(jax.ShapeDtypeStruct(shape, np.float64) for shape in ((chains, half), (chains * half,))))


def bridge_halves(
    log_density: LogDensity, draws: Float[np.ndarray, "chain draw dim"], data: Any, rng: np.random.Generator
) -> tuple[Float[np.ndarray, " half"], Float[np.ndarray, " half"]]:
    """Log evidence and its relative variance, fitted on one half of each chain and bridged to the other, both ways."""
    chains, n_draws, dim = draws.shape
    half = n_draws // 2
    halves = [draws[:, :half].reshape(-1, dim), draws[:, half : 2 * half].reshape(-1, dim)]
    results = []
    for fitted, bridged in (halves, halves[::-1]):
        normal = rng.standard_normal((len(bridged), dim + FREEDOM))
        candidates, log_proposal = _propose(fitted, bridged, normal)
        value = at_points(log_density, np.concatenate([bridged, np.asarray(candidates)]), data)
        ratio = np.where(np.isnan(value), -np.inf, value) - np.asarray(log_proposal)
        posterior = np.where(np.isnan(value[: len(bridged)]), np.nan, ratio[: len(bridged)])
        results.append(bridge(jnp.asarray(posterior).reshape(chains, half), jnp.asarray(ratio[len(bridged) :])))
    return np.array([float(log_z) for log_z, _ in results]), np.array([float(variance) for _, variance in results])


@Ahead
def _propose(
    fitted: Float[Array, "draw dim"], bridged: Float[Array, "draw dim"], normal: Float[Array, "draw dim+freedom"]
) -> tuple[Float[Array, "draw dim"], Float[Array, " twice"]]:
    """Draws of the Student distribution fitted to some points, and its log density at other points and at the draws."""
    proposal = fit_student(fitted, jnp.full(len(fitted), 1 / len(fitted)))
    candidates = jax.vmap(proposal.transform)(normal)
    return candidates, jax.vmap(proposal.log_density)(jnp.concatenate([bridged, candidates]))
