"""From a table to the posterior of one law."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Array, Float

from escape_inference import __version__
from escape_inference.bend import BENT, fit_bend, straight, unbent
from escape_inference.conditions import Conditions, aggregate
from escape_inference.diagnostics import Convergence, check_convergence, with_too_few_chains
from escape_inference.errors import InputError
from escape_inference.escape_check import EscapeCheck, check_escape
from escape_inference.exploration import MOST_RUNS, explore
from escape_inference.later import read_ahead
from escape_inference.law import Law, load_law
from escape_inference.likelihood import Observations, conditional_discrepancy, replicate_escapes
from escape_inference.model import (
    DEFAULT_WIDTHS,
    PriorWidths,
    build_inputs,
    build_observations,
    sample_prior,
    site_shapes,
    sort_conditions,
)
from escape_inference.posterior import to_tree
from escape_inference.precision import float64
from escape_inference.problem import AT_ONCE, Problem, Target, densities, log_likelihood_at, named_values_at
from escape_inference.programs import Ahead, random_keys
from escape_inference.rate_tables import (
    TABLE_TOLERANCE,
    focus,
    spline_error,
    table_error,
    with_integrals,
    without_table,
)
from escape_inference.sampler import Draws, hmc, nuts
from escape_inference.table import read_measurements
from escape_inference.waiting import GammaLikelihood, gamma_likelihood

DRAWS, WARMUP, CHAINS = 1000, 500, 4
SPLINE_TOLERANCE = 0.05  #: the same from splines, which cannot be made anew around the draws
PRIOR_DRAWS = 1000
PRIOR, SAMPLING, RESIDUALS = 3, 4, 5  #: streams of random numbers
FEW_RUNS = 2  #: of tempered Monte Carlo, from which the chains begin
ATTEMPTS = 6
PATIENCE = 3  #: attempts by trajectories of one length that fail before NUTS takes over
TABLES = 2  #: finer ones that are made before the law itself takes the place of one that stays off
ACCEPTANCE = 0.9
ROUGHLY = 1.1  #: R-hat up to which chains are in the same place
POOLINGS = ("complete", "partial")
LEAST = {"seed": 0, "draws": 100, "warmup": 100, "chains": 2}  #: as the commands take them


@dataclass(frozen=True)
class Prepared:
    """Conditions that may enter a fit, in the model's order, and the check that let them in."""

    conditions: Conditions
    every: Conditions
    check: EscapeCheck
    waiting: dict[int, GammaLikelihood]
    left_out: tuple[str, ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Fit:
    """Posterior draws of one law with its diagnostics and the values at every draw."""

    problem: Problem
    draws: Draws
    convergence: Convergence
    log_likelihood: Float[np.ndarray, "chain draw condition"]
    sites: dict[str, np.ndarray]


@float64
def prepare(table: str | Path | pd.DataFrame, *, seed: int = 0) -> Prepared:
    """Read, aggregate and check a table; conditions that are not escape are left out and named.

    Raises:
        InputError: a bad table, or no escape left.
    """
    conditions = aggregate(read_measurements(table))
    check = check_escape(conditions, seed=seed)
    grade = check.frame["grade"].to_numpy()
    keep = grade != "not_escape"
    left_out = tuple(conditions.frame["condition"][~keep])
    kept = conditions.select(np.flatnonzero(keep))
    grades = dict(zip(conditions.frame["condition"], grade, strict=True))
    kept = sort_conditions(kept)
    waiting = {
        i: gamma_likelihood(kept.times[kept.times["condition"] == i], float(kept.frame["learning_rate"].iloc[i]))
        for i, name in enumerate(kept.frame["condition"])
        if grades[name] == "delayed"
    }
    settings = {"seed": seed, "draws": DRAWS, "warmup": WARMUP, "chains": CHAINS, "version": __version__}
    return Prepared(kept, conditions, check, waiting, left_out, settings)


def applicable(law: Law, conditions: Conditions) -> bool:
    """Whether the law has a formula for every kind of barrier in the data."""
    return set(conditions.frame["barrier"]) <= set(law.barriers)


@float64
def build_problem(
    law: Law,
    prepared: Prepared,
    *,
    seed: int = 0,
    draws: int = DRAWS,
    warmup: int = WARMUP,
    chains: int = CHAINS,
    pooling: str = "complete",
    runs: int = MOST_RUNS,
) -> Problem:
    """One law's problem, explored and ready to be sampled (so often; the sampler is compiled meanwhile).

    Args:
        law, prepared, seed, draws, warmup, chains, pooling: as those of :func:`infer`.
        runs: of tempered Monte Carlo at most; few if only the posterior counts and not the error of the log evidence.

    Raises:
        InputError: the law does not apply to the barriers in the table or is not finite over its prior, or no escape is left.
    """
    frame = prepared.conditions.frame
    if not len(frame) or not frame["escapes"].sum():
        raise InputError(
            f"{prepared.conditions.path}: no escape is left to infer from: {prepared.check.sentence}"
            " Start the clock in the quasi-stationary state, or choose conditions where escapes are rarer."
        )
    if not applicable(law, prepared.conditions):
        raise InputError(
            f"law {law.name} has no formula for barrier {'/'.join(sorted(set(frame['barrier']) - set(law.barriers)))!r}"
        )
    inputs = build_inputs(law, prepared.conditions, pooling)
    observed = build_observations(prepared.conditions, prepared.waiting)
    inputs, observed = jax.device_put((inputs, observed))  # at once: jnp.asarray compiles a program for each shape

    problem = explore(
        law,
        inputs,
        observed,
        tuple(site_shapes(law, inputs, observed).items()),
        seed,
        partial(_announce, chains, draws, warmup),
        runs,
    )
    array = lambda *shape: jax.ShapeDtypeStruct(shape, np.float64)
    total, conditions = chains * draws, len(observed.escapes)
    _residuals.prepare(array(total, conditions), array(total, conditions), array(total), observed)
    prior = _prior_sites(problem, seed)
    bad = ~(prior["log_rate"] < np.inf).all(axis=(0, 2))  # NaN or infinite; a rate of 0 may be meant
    if bad.any():
        raise InputError(
            f"law {law.name}: the log rate is not finite at {bad.sum()} of {PRIOR_DRAWS} draws from its prior; "
            "escape-inference check-law says where. Give the law a finite log rate wherever its prior reaches."
        )
    return replace(problem, prior_sites=prior)


def _announce(
    chains: int,
    draws: int,
    warmup: int,
    target: Target,
    seen: Observations,
) -> None:
    """Start compiling the sampler, and reading what its draws are checked by; ``seen`` is what was observed as the target takes it."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, np.float64)
    dim = sum(int(np.prod(shape)) for _, (shape, _) in target.shapes)
    log_joint = densities(target.law, target.shapes)[0]
    data = target.inputs, seen, DEFAULT_WIDTHS.as_arrays()
    start = jax.eval_shape(lambda: random_keys(0, count=chains)), array(chains, dim), array(dim, dim), straight(dim)
    sampler = nuts if target.inputs.surrogate is None else hmc
    sampler.prepare(
        *start, data, np.asarray(0), np.asarray(ACCEPTANCE), log_joint=log_joint, warmup=warmup, draws=draws
    )
    read_ahead("arviz_stats.base")


def check_settings(settings: Mapping[str, Any], pooling: str) -> None:
    """Refuse settings of a fit that no sampler can run with.

    Raises:
        InputError: with the name of the setting and what it may be.
    """
    for name, least in LEAST.items():
        if not isinstance(settings[name], int | np.integer) or settings[name] < least:
            raise InputError(f"{name} must be a whole number of at least {least}, not {settings[name]!r}")
    if pooling not in POOLINGS:
        raise InputError(f"pooling is one of {', '.join(POOLINGS)}; not {pooling!r}")


def _prior_sites(problem: Problem, seed: int) -> dict[str, np.ndarray]:
    """Named values at draws from the prior, arrays ``[1, draw, ...]``."""
    target = problem.target
    if target.inputs.surrogate is not None:
        z = np.random.default_rng([seed, PRIOR]).normal(size=(PRIOR_DRAWS, target.used.max() + 1))
    else:
        key = random_keys(seed, PRIOR)
        z = np.asarray(sample_prior(key, target.law, target.inputs, problem.observed, PRIOR_DRAWS))
    return jax.tree.map(lambda x: x[None], named_values_at(problem, problem.prior_inputs, target.to_model(z)))


def run_chains(
    problem: Problem,
    weight: Float[np.ndarray, " condition"],
    widths: PriorWidths = DEFAULT_WIDTHS,
    *,
    seed: int,
    draws: int = DRAWS,
    warmup: int = WARMUP,
    chains: int = CHAINS,
    count: int | None = None,
    acceptance: float = ACCEPTANCE,
    patient: bool = False,
) -> Draws:
    """Sample the posterior; ``weight`` 0 leaves a condition out, ``widths`` are those of the prior.

    ``count`` ends every chain after so many draws; a higher ``acceptance`` makes smaller steps. None of the four compiles anew.
    NUTS samples what is not a table of a law of few parameters, and everything if ``patient``.
    """
    rng = np.random.default_rng(seed)
    target = problem.target
    bend = fit_bend(problem.particles)
    known = unbent(bend, problem.particles)
    start = known[rng.choice(len(known), chains, replace=False)]
    covariance = np.atleast_2d(np.cov(known.T)) + 1e-10 * np.eye(start.shape[1])
    count = min(count or draws, draws)
    keys = random_keys(seed, SAMPLING, count=chains)
    sampler = nuts if patient or target.inputs.surrogate is None else hmc
    result = sampler(
        *(keys, start, covariance, bend, (target.inputs, problem.weighted(weight), widths.as_arrays())),
        *(np.asarray(count), np.asarray(acceptance)),
        log_joint=densities(target.law, target.shapes)[0],
        warmup=warmup,
        draws=draws,
    )
    return Draws(*(np.asarray(x)[:, :count] for x in result))


def fit_law(problem: Problem, *, seed: int, draws: int, warmup: int, chains: int) -> Fit:
    """Sample the posterior, again and again where it is not where it was expected or the sampler did not converge, in the end by NUTS.

    Runs without divergences are joined and thinned, so that a slow posterior gets more draws; after a divergence the next run takes
    smaller steps and has a table of the law's rates around these draws. A table that is off at the draws is made
    anew around them and finer, from the integrals themselves where the splines that ship are not accurate enough there; where that does
    not help, the law itself is sampled (a program of its own).
    Rates that are off to the end make the fit untrustworthy.
    """
    everything = np.ones(problem.observed.escapes.shape[0])
    tolerance = TABLE_TOLERANCE if problem.target.inputs.passage is None else SPLINE_TOLERANCE
    again = partial(run_chains, draws=draws, warmup=warmup, chains=chains)
    sound: list[Draws] = []
    is_bent = fit_bend(problem.particles, least=BENT).coefficients.any()
    refusal, finer, failures = (1 - ACCEPTANCE) / (3 if is_bent else 1), 0, 0
    for attempt in range(ATTEMPTS):
        run = again(problem, everything, seed=seed + attempt, acceptance=1 - refusal, patient=failures >= PATIENCE)
        energy = run.energy
        points, hindered = run.z.reshape(-1, run.z.shape[-1]), run.diverging.any()
        if hindered:
            refusal /= 3
        else:
            sound.append(run)
            run, energy = _joined(sound), np.concatenate([one.energy for one in sound], axis=1)
        points = run.z.reshape(-1, run.z.shape[-1])
        convergence = check_convergence(problem.target.to_model(run.z), run.diverging, energy)
        failures += not convergence.trustworthy
        last, error, of_spline = attempt == ATTEMPTS - 1, table_error(problem, points), 0.0
        if error <= tolerance and (last or convergence.trustworthy):
            of_spline = spline_error(problem, points)
        off = error > tolerance or of_spline > TABLE_TOLERANCE
        if last or (not off and convergence.trustworthy):
            break
        if not convergence.rhat_max < ROUGHLY:  # chains that stand still say nothing of where the posterior is
            points = problem.particles
        if off:
            sound, finer = [], finer + 1
            problem = with_integrals(problem) if of_spline > TABLE_TOLERANCE else problem
            problem = replace(problem, extent="fine")
        if finer > TABLES and problem.target.inputs.surrogate is not None:
            problem = without_table(problem, points)
        else:  # the chains of the next attempt start from these draws
            problem = replace(focus(problem, points) if off or hindered else problem, particles=points)
    if off:
        error = max(error, of_spline)
        reason = f"the tabulated rates of the law misplace {error:.2g} of the posterior (at most {tolerance})"
        convergence = convergence._replace(trustworthy=False, reason=reason)
    return summarise(problem, run, with_too_few_chains(convergence, chains))


def _joined(runs: list[Draws]) -> Draws:
    """Runs chain by chain one after the other, thinned to the length of one."""
    return Draws(*(np.concatenate(parts, axis=1)[:, len(runs) - 1 :: len(runs)] for parts in zip(*runs, strict=True)))


def summarise(problem: Problem, draws: Draws, convergence: Convergence) -> Fit:
    """Log-likelihoods and named values at every draw of a finished run."""
    flat, shape = draws.z.reshape(-1, draws.z.shape[-1]), draws.z.shape[:2]
    values = named_values_at(problem, problem.near_inputs, problem.target.to_model(flat))
    seen = log_likelihood_at(problem, flat, values=values)
    seen, values = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), (seen, values))
    return Fit(problem, draws, convergence, seen, values)


@Ahead
def _residuals(share: Array, log_rate: Array, discrepancy: Array, observed: Observations) -> Array:
    """One draw of every condition's discrepancy for every posterior draw, ``[draw, condition]``."""
    return jax.lax.map(
        lambda one: conditional_discrepancy(one[0], one[1], one[2], observed),
        (share, log_rate, discrepancy),
        batch_size=AT_ONCE,
    )


@float64
def fit_tree(fit: Fit, prepared: Prepared, *, seed: int) -> xr.DataTree:
    """The ArviZ data tree of a fit, with prior and posterior predictive draws."""
    problem = fit.problem
    rng = np.random.default_rng(seed)
    chains, draws = fit.draws.z.shape[:2]
    prior_sites = problem.prior_sites
    log_rate, sigma = (fit.sites[name].reshape(chains * draws, -1) for name in ("log_rate", "discrepancy"))
    share = np.random.default_rng([seed, RESIDUALS]).random(log_rate.shape)
    residual = _residuals(share, log_rate, sigma[:, 0], problem.observed)
    predicted = replicate_escapes(rng, log_rate, sigma, problem.observed)
    prior_rate, prior_sigma = prior_sites["log_rate"][0], prior_sites["discrepancy"][0][:, None]
    prior_predicted = replicate_escapes(rng, prior_rate, prior_sigma, problem.observed)
    waiting_shape = np.ones_like(residual := np.asarray(residual).reshape(chains, draws, -1))
    for i, table in prepared.waiting.items():
        waiting_shape[..., i] = table.sample_shape(fit.sites["log_rate"][..., i] + residual[..., i], seed=seed + i)
    return to_tree(
        fit,
        prepared,
        prior=prior_sites,
        prior_predictive=prior_predicted[None],
        posterior_predictive=predicted.reshape(chains, draws, -1),
        residual=residual,
        waiting_shape=waiting_shape,
    )


@float64
def infer(
    law: str | Path | Law,
    table: str | Path | pd.DataFrame | Prepared,
    *,
    seed: int = 0,
    draws: int = DRAWS,
    warmup: int = WARMUP,
    chains: int = CHAINS,
    pooling: str = "complete",
) -> xr.DataTree:
    """Posterior of one law given a measured table.

    Args:
        law: name of a law, path of a law file, or a :class:`~escape_inference.Law`.
        table: path of a CSV or Parquet table, a table as a data frame, or the result of :func:`prepare`.
        seed: the same seed gives the same draws.
        draws: posterior draws a chain.
        warmup: warm-up steps a chain.
        chains: chains, run side by side.
        pooling: ``complete``: one temperature scale, n and prefactor for all minima; ``partial``: one for each minimum
            (``<name>_by_minimum``) around a population value (``<name>``) with an inferred spread (``<name>_spread``).

    Returns:
        An ArviZ data tree with the groups posterior, prior, prior_predictive, posterior_predictive, log_likelihood (one value for each
        condition, the discrepancy integrated out), sample_stats, observed_data and constant_data. Attribute ``trustworthy``
        says whether the sampler converged.

    Raises:
        InputError: bad table, law or setting.
    """
    settings: dict[str, Any] = {"seed": seed, "draws": draws, "warmup": warmup, "chains": chains}
    law = load_law(law)
    check_settings(settings, pooling)
    prepared = table if isinstance(table, Prepared) else prepare(table, seed=seed)
    prepared.settings.update(settings | {"pooling": pooling})
    problem = build_problem(law, prepared, pooling=pooling, runs=FEW_RUNS, **settings)
    fit = fit_law(problem, seed=seed, draws=draws, warmup=warmup, chains=chains)
    return fit_tree(fit, prepared, seed=seed)
