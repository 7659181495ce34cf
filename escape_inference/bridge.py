"""Bridge sampling on split halves: the computation behind :func:`escape_inference.evidence.bridge_log_evidence`."""

from typing import Any

import numpy as np
from jaxtyping import Float

from escape_inference.student import FREEDOM, LogDensity, at_points, fit_student


def effective_size(values: Float[np.ndarray, "chain draw"]) -> float:
    """Effective number of independent draws for a mean over chains, by Geyer's initial monotone sequence.

    As in Vehtari et al., Bayesian Analysis 16, 667 (2021), eqs. 10-13, without ranks; at most the number of draws.
    """
    chains, draws = values.shape
    centred = values - values.mean(axis=1, keepdims=True)
    spectrum = np.fft.rfft(centred, n=2 * draws, axis=1)
    covariance = np.fft.irfft(np.abs(spectrum) ** 2, n=2 * draws, axis=1)[:, :draws].mean(axis=0) / draws
    between = np.var(values.mean(axis=1), ddof=1) if chains > 1 else 0.0
    total = covariance[0] + between
    if not total > 0:
        return float(chains * draws)
    correlation = 1 - (covariance[0] - covariance) * draws / (draws - 1) / total
    pairs = np.append(1.0, correlation[1 : draws - draws % 2]).reshape(-1, 2).sum(axis=1)
    positive = np.cumprod(pairs > 0)
    monotone = np.minimum.accumulate(np.where(positive > 0, pairs, 0.0))
    return float(chains * draws / max(2 * monotone.sum() - 1, 1.0))


def bridge(posterior: Float[np.ndarray, "chain draw"], proposal: Float[np.ndarray, " draw"]) -> tuple[float, float]:
    """Optimal bridge between posterior and proposal, from log ratios (density / proposal density) at the draws of each.

    Gronau et al. (2017), eqs. 14-15 (fixed point, here in logarithms) and the appendix (relative mean-square error).
    """
    n_proposal, size = proposal.size, effective_size(posterior)
    log_s1, log_s2 = np.log(size / (size + n_proposal)), np.log(n_proposal / (size + n_proposal))

    def bridge_terms(log_z: float) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms of p / (s1 p + s2 g) at the proposal's draws and of g / (s1 p + s2 g) at the posterior's."""
        at_proposal, at_posterior = proposal - log_z, posterior - log_z
        return at_proposal - np.logaddexp(log_s1 + at_proposal, log_s2), -np.logaddexp(log_s1 + at_posterior, log_s2)

    log_z, step = float(np.median(posterior)), np.inf
    for _ in range(1000):
        at_proposal, at_posterior = bridge_terms(log_z)
        step = _log_mean(at_proposal) - _log_mean(at_posterior)
        log_z += step
        if not abs(step) > 1e-10:
            break
    at_proposal, at_posterior = (np.exp(terms) for terms in bridge_terms(log_z))
    variance = np.var(at_proposal) / np.mean(at_proposal) ** 2 / n_proposal
    variance += np.var(at_posterior) / np.mean(at_posterior) ** 2 / effective_size(at_posterior)
    return log_z if abs(step) <= 1e-6 else float("nan"), float(variance)


def _log_mean(x: np.ndarray) -> float:
    """Logarithm of the mean of ``exp(x)``."""
    return float(x.max() + np.log(np.mean(np.exp(x - x.max()))))


def bridge_halves(
    log_density: LogDensity, draws: Float[np.ndarray, "chain draw dim"], data: Any, rng: np.random.Generator
) -> tuple[Float[np.ndarray, " half"], Float[np.ndarray, " half"]]:
    """Log evidence and its relative variance, fitted on one half of each chain and bridged to the other, both ways."""
    chains, n_draws, dim = draws.shape
    half = n_draws // 2
    halves = [draws[:, :half].reshape(-1, dim), draws[:, half : 2 * half].reshape(-1, dim)]
    results = []
    for fitted, bridged in (halves, halves[::-1]):
        student = fit_student(fitted, np.full(len(fitted), 1 / len(fitted)))
        points = np.concatenate([bridged, student.transform(rng.standard_normal((len(bridged), dim + FREEDOM)))])
        value = at_points(log_density, points, data)
        with np.errstate(invalid="ignore"):
            ratio = np.where(np.isnan(value), -np.inf, value) - student.log_density(points)
            posterior = np.where(np.isnan(value[: len(bridged)]), np.nan, ratio[: len(bridged)])
            results.append(bridge(posterior.reshape(chains, half), ratio[len(bridged) :]))
    return np.array([log_z for log_z, _ in results]), np.array([variance for _, variance in results])
