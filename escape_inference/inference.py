"""From a table to the posterior of one law."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Array, Float

from escape_inference import __version__
from escape_inference.conditions import Conditions, aggregate
from escape_inference.diagnostics import Convergence, check_convergence
from escape_inference.errors import InputError
from escape_inference.escape_check import EscapeCheck, check_escape
from escape_inference.law import Law, load_law
from escape_inference.likelihood import EscapeCounts, Observations, conditional_discrepancy
from escape_inference.model import (
    Inputs,
    build_inputs,
    build_observations,
    evaluate,
    sample_prior,
    site_shapes,
    sort_conditions,
)
from escape_inference.posterior import to_tree
from escape_inference.precision import float64
from escape_inference.sampler import Draws, Shapes, sample
from escape_inference.table import read_measurements

DRAWS, WARMUP, CHAINS = 1000, 500, 4
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """Conditions that may enter a fit, in the model's order, and the check that let them in."""

    conditions: Conditions
    check: EscapeCheck
    delayed: np.ndarray
    left_out: tuple[str, ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """One law on prepared data: everything that sampling, evidence and cross-validation need."""

    law: Law
    inputs: Inputs
    observed: Observations
    shapes: Shapes

    @property
    def dimension(self) -> int:
        """Number of sampled variables."""
        return int(sum(np.prod(shape) for _, (shape, _) in self.shapes))


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
    delayed = np.array([grades[name] == "delayed" for name in kept.frame["condition"]], dtype=bool)
    settings = {"seed": seed, "draws": DRAWS, "warmup": WARMUP, "chains": CHAINS, "version": __version__}
    return Prepared(kept, check, delayed, left_out, settings)


def applicable(law: Law, conditions: Conditions) -> bool:
    """Whether the law has a formula for every kind of barrier in the data."""
    return set(conditions.frame["barrier"]) <= set(law.barriers)


@float64
def build_problem(law: Law, prepared: Prepared) -> Problem:
    """Arrays of one law's problem.

    Raises:
        InputError: the law does not apply to the barriers in the table, or no escape is left.
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
    inputs = build_inputs(law, prepared.conditions)
    observed = build_observations(prepared.conditions, prepared.delayed)
    inputs, observed = jax.tree.map(jnp.asarray, (inputs, observed))
    return Problem(law, inputs, observed, tuple(site_shapes(law, inputs, observed).items()))


def run_chains(
    problem: Problem,
    weight: Float[np.ndarray, " condition"],
    width: float = 1.0,
    *,
    seed: int,
    draws: int = DRAWS,
    warmup: int = WARMUP,
    chains: int = CHAINS,
) -> Draws:
    """Sample the posterior; ``weight`` 0 leaves a condition out, ``width`` multiplies the prior's standard deviations.

    Neither compiles anew.
    """
    key = jax.random.key(seed)
    start = sample_prior(jax.random.fold_in(key, 1), problem.law, problem.inputs, problem.observed, chains)
    result = sample(
        jax.random.split(jax.random.fold_in(key, 2), chains),
        0.5 * (start + jnp.mean(start, axis=0)),
        problem.inputs,
        replace(problem.observed, weight=jnp.asarray(weight, float)),
        jnp.asarray(width, float),
        law=problem.law,
        shapes=problem.shapes,
        warmup=warmup,
        draws=draws,
    )
    return Draws(*(np.asarray(x) for x in result))


@partial(jax.jit, static_argnames=("law", "shapes"))
def evaluate_draws(
    z: Float[Array, "draw dim"], inputs: Inputs, observed: Observations, *, law: Law, shapes: Shapes
) -> tuple[Array, dict[str, Array]]:
    """Log-likelihoods ``[draw, condition]`` and named values at many points."""
    value = jax.lax.map(lambda point: evaluate(point, law, dict(shapes), inputs, observed)[1:], z, batch_size=100)
    return value[0], value[1]


def summarise(problem: Problem, draws: Draws) -> Fit:
    """Diagnostics and values of a finished run."""
    convergence = check_convergence(draws.z, draws.diverging, draws.energy)
    shape = draws.z.shape[:2]
    log_likelihood, sites = evaluate_draws(
        jnp.asarray(draws.z.reshape(-1, draws.z.shape[-1])),
        problem.inputs,
        problem.observed,
        law=problem.law,
        shapes=problem.shapes,
    )
    unflat = lambda x: np.asarray(x).reshape(*shape, *x.shape[1:])  # noqa: E731
    return Fit(problem, draws, convergence, unflat(log_likelihood), {k: unflat(v) for k, v in sites.items()})


@float64
def fit_tree(fit: Fit, prepared: Prepared, *, seed: int) -> xr.DataTree:
    """The ArviZ data tree of a fit, with prior and posterior predictive draws."""
    problem = fit.problem
    key = jax.random.fold_in(jax.random.key(seed), 3)
    chains, draws = fit.draws.z.shape[:2]
    prior_z = sample_prior(jax.random.fold_in(key, 0), problem.law, problem.inputs, problem.observed, 1000)
    _, prior_sites = evaluate_draws(
        prior_z, problem.inputs, problem.observed, law=problem.law, shapes=problem.shapes
    )
    flat_rate = jnp.asarray(fit.sites["log_rate"].reshape(chains * draws, -1))
    flat_sigma = jnp.asarray(fit.sites["discrepancy"].reshape(-1))

    @jax.jit
    def replicate(key: Array, log_rate: Array, discrepancy: Array) -> tuple[Array, Array]:
        one, two = jax.random.split(key)
        escapes = EscapeCounts(log_rate, discrepancy, problem.observed).sample(one)
        return escapes, conditional_discrepancy(two, log_rate, discrepancy, problem.observed)

    def in_batches(log_rate: Array, discrepancy: Array, salt: int) -> tuple[Array, Array]:
        keys = jax.random.split(jax.random.fold_in(key, salt), log_rate.shape[0])
        return jax.lax.map(lambda args: replicate(*args), (keys, log_rate, discrepancy), batch_size=200)

    predicted, residual = in_batches(flat_rate, flat_sigma, 1)
    prior_predicted, _ = in_batches(prior_sites["log_rate"], prior_sites["discrepancy"], 2)
    shaped = lambda x: np.asarray(x).reshape(chains, draws, -1)  # noqa: E731
    return to_tree(
        fit,
        prepared,
        prior={k: np.asarray(v)[None] for k, v in prior_sites.items()},
        prior_predictive=np.asarray(prior_predicted)[None],
        posterior_predictive=shaped(predicted),
        residual=shaped(residual),
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
) -> xr.DataTree:
    """Posterior of one law given a measured table.

    Args:
        law: name of a law, path of a law file, or a :class:`~escape_inference.Law`.
        table: path of a CSV or Parquet table, a table as a data frame, or the result of :func:`prepare`.
        seed: the same seed gives the same draws.
        draws: posterior draws a chain.
        warmup: warm-up steps a chain.
        chains: chains, run side by side.

    Returns:
        An ArviZ data tree with the groups posterior, prior, prior_predictive, posterior_predictive, log_likelihood (one value for each
        condition, the discrepancy integrated out), sample_stats, observed_data and constant_data. Attribute ``trustworthy``
        says whether the sampler converged.

    Raises:
        InputError: bad table or law.
    """
    law = load_law(law)
    prepared = table if isinstance(table, Prepared) else prepare(table, seed=seed)
    problem = build_problem(law, prepared)
    everything = np.ones(len(prepared.conditions.frame))
    run = run_chains(problem, everything, seed=seed, draws=draws, warmup=warmup, chains=chains)
    return fit_tree(summarise(problem, run), prepared, seed=seed)
