r"""The evidence of a law, :math:`Z = \int p(data | z)\, p(z)\, dz`, by two methods that share nothing but the density.

:func:`bridge_log_evidence` starts from posterior draws and bridges to a fitted proposal; :func:`smc_log_evidence`
starts from the prior and never sees a posterior draw. A Bayes factor is worth showing only where they :func:`agree`.

Two traps, both silent:

* Draws must be **unconstrained** and the density must carry the Jacobian of the transform. A bridge fed with
  constrained draws (what ``MCMC.get_samples()`` and ``MCMC._states["z"]`` hold) returned log Z = -231 with a tiny
  spread where -118.4 is exact: the standard error cannot see this mistake, the second method can. In NumPyro use
  ``unconstrain_fn``.
* A function is compiled once for each *function object* and each set of shapes, which takes seconds. Whatever changes
  between calls belongs in ``data``, not in a closure made anew for every call.

References:
    Meng & Wong, Statistica Sinica 6, 831 (1996); Gronau et al., J. Math. Psychol. 81, 80 (2017); Fruehwirth-Schnatter,
    Econometrics Journal 7, 143 (2004) (error of the bridge); Del Moral, Doucet & Jasra, JRSS B 68, 411 (2006) (SMC);
    Dau & Chopin, JRSS B 84, 114 (2022) (waste-free SMC).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array, ArrayLike

from escape_inference.bridge import bridge_halves
from escape_inference.precision import float64
from escape_inference.student import LogDensity
from escape_inference.tempering import Outcome, Revise, Sampler, tempered_log_evidences

MAX_ERRORS, MAX_NATS = 3.0, 0.5  # two evidences agree within so many combined standard errors, and within so many nats


@dataclass(frozen=True)
class Evidence:
    """A log evidence with its error.

    Attributes:
        log_evidence: natural logarithm of Z. NaN when the method failed (it then agrees with nothing).
        standard_error: standard error of ``log_evidence``, nats.
        method: ``"bridge"``, ``"smc"``, ``"importance"`` (the mean weight of draws of another distribution), ``"savage_dickey"``, or
            ``"none"`` before there is any.
    """

    log_evidence: float
    standard_error: float
    method: str


def agree(first: Evidence, second: Evidence) -> bool:
    """Do two estimates agree within 3 combined standard errors and within 0.5 nat?

    >>> agree(Evidence(-118.40, 0.02, "bridge"), Evidence(-118.52, 0.08, "smc"))
    True
    >>> agree(Evidence(-118.40, 0.02, "bridge"), Evidence(-119.00, 0.40, "smc"))  # within the errors, beyond 0.5 nat
    False
    >>> agree(Evidence(-231.0, 0.01, "bridge"), Evidence(-118.4, 0.08, "smc"))
    False
    """
    difference = abs(first.log_evidence - second.log_evidence)
    error = float(np.hypot(first.standard_error, second.standard_error))
    return bool(difference <= MAX_ERRORS * error and difference <= MAX_NATS)


@float64
def bridge_log_evidence(log_density: LogDensity, draws: ArrayLike, *, data: Any = None, seed: int = 0) -> Evidence:
    """Evidence by bridge sampling between posterior draws and a Student distribution fitted to them.

    Each chain is cut in half. The proposal is fitted on one half and bridged to the other, so that it is independent of
    the draws it meets; then the halves change places, and the two log evidences are averaged. The standard error is the
    larger of the theoretical one (with the effective number of draws in place of their number) and of half the halves'
    disagreement.

    Args:
        log_density: ``log_density(z)``, or ``log_density(z, data)`` when ``data`` is given: unnormalised log posterior
            of one point ``z [dim]`` in **unconstrained** space, Jacobian included. A JAX function; at the proposal's
            draws NaN counts as -inf.
        draws: [chain, draw, dim] **unconstrained** posterior draws, at least 4 for each chain (see the module's traps).
        data: pytree of arrays handed on to ``log_density``; other values of equal shapes do not compile again.
        seed: of the proposal's draws.

    Returns:
        log evidence and standard error; NaN if the draws or their densities are not finite, or the draws do not vary.

    Raises:
        ValueError: ``draws`` has not the shape [chain, draw >= 4, dim].

    A Gamma(2, rate 1) prior on the rate, 7 escapes in 30 units of time: Z = 8! / 31**9, so log Z = -20.3010.

    >>> import jax.numpy as jnp
    >>> draws = np.log(np.random.default_rng(1).gamma(9, 1 / 31, size=(4, 1000, 1)))
    >>> result = bridge_log_evidence(lambda z: 9 * z[0] - 31 * jnp.exp(z[0]), draws)
    >>> abs(result.log_evidence + 20.3010) < 0.01, result.standard_error < 0.01
    (True, True)
    """
    array = np.asarray(draws, np.float64)
    if array.ndim != 3 or array.shape[1] < 4:
        raise ValueError(f"draws must have the shape [chain, draw >= 4, dim], not {array.shape}")
    if not np.all(np.ptp(array, axis=(0, 1)) > 0):
        return Evidence(float("nan"), float("nan"), "bridge")
    estimates, variances = bridge_halves(log_density, array, data, np.random.default_rng(seed))
    spread, theory = abs(estimates[0] - estimates[1]) / 2, np.sqrt(variances.sum()) / 2
    return Evidence(float(estimates.mean()), float(np.maximum(spread, theory)), "bridge")


@float64
def smc_log_evidence(
    log_prior: LogDensity,
    log_likelihood: LogDensity,
    sample_prior: Callable[..., Array],
    *,
    data: Any = None,
    seed: int = 0,
    particles: int = 1024,
    moves: int = 64,
    replicates: int = 4,
    target: float = 0.5,
    max_temperatures: int = 500,
) -> Evidence:
    """Evidence by tempered sequential Monte Carlo from the prior to the posterior (blackjax), waste-free.

    Run 0 is a pilot: it chooses temperatures, so that the effective share of particles stays at ``target``, and fits
    the proposals. ``replicates`` independent runs then follow its plan, which keeps them unbiased for Z (a run that
    adapts to its own particles was 0.8 nat too high in 12 dimensions); they are averaged as Z. ``particles / moves``
    chains of ``moves`` states each move the particles; half of the proposals are local, half jump to a Student
    distribution. The standard error is the larger of the spread of the runs and of the one that the chains within each
    run imply, which rests on more degrees of freedom.

    Cost: about ``(replicates + 1) * particles`` likelihoods for each temperature and once more at the start: 5,120 by
    default, 30 to 60 thousand in all for 4 parameters.

    Args:
        log_prior: ``log_prior(z)`` or ``log_prior(z, data)``: **normalised** log prior density of ``z [dim]`` in
            unconstrained space, Jacobian included.
        log_likelihood: the same for the likelihood. Where it is NaN or -inf it counts as zero likelihood.
        sample_prior: ``sample_prior(key)`` or ``sample_prior(key, data)``: one draw ``z [dim]`` of that prior.
        data: pytree of arrays handed on to all three; other values of equal shapes do not compile again.
        seed: of the whole method.
        particles: in each replicate, a multiple of ``moves``.
        moves: length of each chain, start included.
        replicates: independent runs, at least 2.
        target: effective share of particles kept at each temperature.
        max_temperatures: a run that has not reached the posterior by then has no evidence (NaN).

    Raises:
        ValueError: ``particles`` is not a multiple of ``moves``, or fewer than 2 replicates.

    The case of :func:`bridge_log_evidence`, from the prior, is within three standard errors of -20.3010:

    >>> import jax, jax.numpy as jnp
    >>> result = smc_log_evidence(
    ...     lambda z: 2 * z[0] - jnp.exp(z[0]),
    ...     lambda z: 7 * z[0] - 30 * jnp.exp(z[0]),
    ...     lambda key: jnp.log(jax.random.gamma(key, 2.0, (1,), jnp.float64)),
    ... )
    >>> abs(result.log_evidence + 20.3010) < 3 * result.standard_error < 0.3
    True
    """
    if particles % moves or particles <= moves or replicates < 2:
        raise ValueError(f"need particles a multiple of moves and 2 replicates, not {particles}, {moves}, {replicates}")
    return smc(
        log_prior, log_likelihood, sample_prior, data, seed, particles, moves, replicates, target, max_temperatures
    )[0]


def smc(
    log_prior: LogDensity,
    log_likelihood: LogDensity,
    sample_prior: Callable[..., Array],
    data: Any,
    seed: int,
    particles: int = 1024,
    moves: int = 64,
    replicates: int = 4,
    target: float = 0.5,
    max_temperatures: int = 500,
    wanted: float = 0.0,
    revise: Revise | None = None,
) -> tuple[Evidence, Outcome]:
    """The evidence of :func:`smc_log_evidence` together with the particles at the posterior; fewer replicates where they give the error ``wanted``.

    ``revise`` gets the pilot's particles and weights; unless it returns None, a pilot and all others run with the data that it returns.
    """
    sampler = Sampler(log_prior, log_likelihood, sample_prior, particles, moves)
    outcome = tempered_log_evidences(
        sampler, data, seed, target=target, wanted=wanted, replicates=replicates, steps=max_temperatures, revise=revise
    )
    return Evidence(outcome.log_evidence, outcome.standard_error, "smc"), outcome
