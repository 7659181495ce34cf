"""Are the posteriors of every law calibrated? Simulation-based calibration (Talts et al. 2018; Modrák et al. 2023).

    python scripts/calibrate_laws.py [--tables 200] [--laws power_law,...] [--barriers saddle,threshold] [--seed 0] [--jobs 2] [--output calibration_laws.csv]

For each law and kind of barrier, parameters are drawn from the prior, escapes are drawn from the law at 24 conditions (eight minima
at three learning rates, 20,000 looks each), and the posterior is found as ``infer`` finds it. The rank of the truth among 100 draws, so far
apart that they are nearly independent, must be uniform: for every parameter, for the rate and temperature of a condition, for the critical
learning rate 2 B/((n − 2) α h*) where there is one, and for the log-likelihood. Prints for each whether the ECDF of the ranks stays within
its simultaneous 95 % band (Säilynoja, Bürkner and Vehtari 2022), and how many fits were not trustworthy (their ranks count, too); writes all
ranks. Tables without any escape, and those where most looks at most conditions find one, are left out: a choice by the data alone, which leaves
ranks uniform.
"""

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import as_completed
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from arviz_stats.ecdf_utils import ecdf_pit
from rich.progress import track

from escape_inference.conditions import aggregate
from escape_inference.exploration import explore
from escape_inference.inference import FEW_RUNS, fit_law
from escape_inference.law import Law, built_in_laws, load_law
from escape_inference.likelihood import Observations
from escape_inference.model import (
    Inputs,
    build_inputs,
    build_observations,
    evaluate,
    sample_prior,
    site_shapes,
    sort_conditions,
)
from escape_inference.precision import float64
from escape_inference.programs import random_keys
from escape_inference.workers import processes

LOOKS, RANKS = 20_000, 100
SHORT = {"draws": 500, "warmup": 300, "chains": 4}


def design(barrier: str) -> pd.DataFrame:
    """Eight minima at three learning rates: L* over a factor of 30, h* of 5, barriers from 1.3 to 3 L*."""
    rng, rows = np.random.default_rng(11), []
    for k in range(8):
        loss, curvature, ratio = np.exp(rng.uniform([-4, -0.8, 0.26], [-0.6, 0.8, 1.1]))
        for temperature in (0.06, 0.1, 0.16):
            rows.append(
                {
                    **{"minimum": f"m{k}", "learning_rate": 8 * temperature / curvature, "batch_size": 8},
                    **{"loss_minimum": loss, "loss_barrier": ratio * loss, "hessian_minimum": curvature},
                    **{"hessian_saddle": curvature if barrier == "saddle" else np.nan, "barrier": barrier},
                    **{"start": "minimum" if barrier == "saddle" else "quasi_stationary"},
                    **{"run": str(len(rows)), "steps": 100, "escaped": True},
                }
            )
    return pd.DataFrame(rows)


def ranked(law: Law, sites: dict[str, np.ndarray], log_likelihood: np.ndarray) -> dict[str, np.ndarray]:
    """What is ranked, one value for each draw."""
    known = [p.name for p in law.parameters if p.name in sites]
    found = {name: np.ravel(sites[name]) for name in (*known, "log_prefactor", "discrepancy")}
    for name in ("log_rate", "temperature"):
        if name in sites:
            found[f"{name} of the first condition"] = np.ravel(sites[name][..., 0])
    if {"temperature_scale", "effective_dimension"} <= set(known):
        stability = (found["effective_dimension"] - 2) * found["temperature_scale"]  # of 1/η_c
        found["inverse critical learning rate"] = stability
    return found | {"log_likelihood": np.ravel(log_likelihood.sum(axis=-1))}


class Setting(NamedTuple):
    """A law at the design: its data without escapes, draws from the prior, and named values and log-likelihoods at a point."""

    law: Law
    inputs: Inputs
    shapes: dict[str, Any]
    empty: Observations
    truths: np.ndarray
    at: Callable[[np.ndarray, Observations], tuple[dict[str, jax.Array], jax.Array]]


@lru_cache(maxsize=1)
def setting(law: str, barrier: str, tables: int, seed: int) -> Setting:
    """The same for all tables."""
    loaded, conditions = load_law(law), sort_conditions(aggregate(design(barrier)))
    inputs, empty = jax.device_put((build_inputs(loaded, conditions), build_observations(conditions, {})))
    shapes = site_shapes(loaded, inputs, empty)

    @jax.jit
    def at(z: jax.Array, observed: Observations) -> tuple[dict[str, jax.Array], jax.Array]:
        value = evaluate(z, loaded, shapes, inputs, observed)
        return value.sites, value.log_likelihood

    truths = np.asarray(sample_prior(random_keys(seed), loaded, inputs, empty, tables))
    return Setting(loaded, inputs, shapes, empty, truths, at)


@float64
def rank(
    law: str, barrier: str, tables: int, seed: int, number: int, settings: dict[str, int] = SHORT
) -> dict[str, float] | None:
    """One table, and the share of posterior draws below the truth for each quantity; None for a table that is no measurement of escape."""
    if jax.config.values.get("jax_compilation_cache_dir") is None:
        jax.config.update("jax_compilation_cache_dir", str(Path("results/compiled").resolve()))
    loaded, inputs, shapes, empty, truths, at = setting(law, barrier, tables, seed)
    rng, looks = np.random.default_rng([seed, number, 1]), np.full(inputs.learning_rate.shape, float(LOOKS))
    seen = lambda escapes: Observations(**{**empty.__dict__, "escapes": escapes, "looks": looks})
    sites, _ = at(truths[number], seen(np.ones_like(looks)))
    log_rate = sites["log_rate"] + sites["discrepancy"] * rng.standard_normal(looks.shape)
    chance = -np.expm1(-np.exp(np.minimum(log_rate, 80.0)) * empty.look_width)
    escapes = rng.binomial(LOOKS, np.clip(chance, 0.0, 1.0)).astype(float)
    if not escapes.any() or np.median(escapes) > LOOKS / 2:
        return None
    observed = seen(escapes)
    true_sites, true_log_likelihood = jax.tree.map(np.asarray, at(truths[number], observed))
    problem = explore(loaded, inputs, observed, tuple(shapes.items()), seed, runs=FEW_RUNS)
    fit = fit_law(problem, seed=seed + number, **settings)
    drawn = ranked(loaded, fit.sites, fit.log_likelihood)
    wanted = ranked(loaded, true_sites, true_log_likelihood)
    chosen, ties = np.linspace(0, len(drawn["log_prefactor"]) - 1, RANKS).astype(int), rng.random()
    below = {
        name: (np.sum(values[chosen] < wanted[name]) + ties * (1 + np.sum(values[chosen] == wanted[name])))
        / (RANKS + 1)
        for name, values in drawn.items()
    }
    return below | {"trustworthy": float(fit.convergence.trustworthy)}


def ranks(
    law: str, barrier: str, tables: int, seed: int = 0, jobs: int = 2, settings: dict[str, int] = SHORT
) -> pd.DataFrame:
    """The ranks of all tables, one row for each, and whether the fit was trustworthy."""
    one = partial(rank, law, barrier, tables, seed, settings=settings)
    with processes(jobs) as pool:
        running = [pool.submit(one, number) for number in range(tables)]
        for _ in track(as_completed(running), f"{law}, {barrier}", total=tables, disable=not sys.stdout.isatty()):
            pass
        found = [table.result() for table in running]
    return pd.DataFrame([row for row in found if row is not None])


def verdicts(ranks: pd.DataFrame, probability: float = 0.95) -> pd.DataFrame:
    """For each column whether its ECDF stays within the simultaneous band, and by how much it leaves it."""
    rows = {}
    for name, values in ranks.items():
        _, ecdf, lower, upper = ecdf_pit(values.to_numpy(), probability, 1000, rng=np.random.default_rng(0))
        beyond = float(np.max(np.maximum(np.asarray(ecdf) - upper, lower - np.asarray(ecdf))))
        rows[name] = {"tables": len(values), "mean rank": float(values.mean()), "beyond the band": max(beyond, 0.0)}
        rows[name]["uniform"] = beyond <= 1e-9
    return pd.DataFrame.from_dict(rows, orient="index")


def main(tables: int, laws: list[str], barriers: list[str], seed: int, jobs: int, output: Path) -> None:
    """Calibrate all laws and print what came out."""
    found = []
    for name in laws:
        for barrier in barriers:
            if barrier not in load_law(name).barriers:
                continue
            one = ranks(name, barrier, tables, seed, jobs)
            sound = one.pop("trustworthy")
            print(f"{name}, {barrier}: {int(sound.sum())} of {len(one)} fits trustworthy", flush=True)
            print(verdicts(one).round(4).to_string(), flush=True)
            found.append(one.melt(var_name="quantity", value_name="rank").assign(law=name, barrier=barrier))
            output.parent.mkdir(parents=True, exist_ok=True)
            pd.concat(found).to_csv(output, index=False, float_format="%.4f")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=200)
    parser.add_argument("--laws", default=",".join(built_in_laws()))
    parser.add_argument("--barriers", default="saddle,threshold")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--output", type=Path, default=Path("results/calibration_laws.csv"))
    asked = parser.parse_args()
    main(asked.tables, asked.laws.split(","), asked.barriers.split(","), asked.seed, asked.jobs, asked.output)
