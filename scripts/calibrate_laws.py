"""Are the posteriors of every law calibrated? Simulation-based calibration (Talts et al. 2018; Modrák et al. 2023).

    python scripts/calibrate_laws.py [--tables 200] [--laws power_law,...] [--barriers saddle,threshold] [--seed 0] [--output calibration_laws.csv]

For each law and kind of barrier, parameters are drawn from the prior, escapes are drawn from the law at 24 conditions (eight minima
at three learning rates, 20,000 looks each), and the posterior is sampled by NUTS, all tables side by side in one compiled program. The rank of
the truth among the draws must be uniform: for every parameter, for the rate and temperature of a condition, for the critical
learning rate 2 B/((n − 2) α h*) where there is one, and for the log-likelihood. Prints for each whether the ECDF of the ranks stays within
its simultaneous 95 % band (Säilynoja, Bürkner and Vehtari 2022), and writes all ranks.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from arviz_stats.ecdf_utils import ecdf_pit

from escape_inference.bend import straight
from escape_inference.conditions import aggregate
from escape_inference.exploration import with_passage_tables
from escape_inference.law import Law, built_in_laws, load_law
from escape_inference.likelihood import Observations
from escape_inference.model import (
    DEFAULT_WIDTHS,
    Inputs,
    build_inputs,
    build_observations,
    evaluate,
    sample_prior,
    site_shapes,
    sort_conditions,
)
from escape_inference.precision import float64
from escape_inference.programs import OPTIONS
from escape_inference.sampler import chains

LOOKS, WARMUP, DRAWS, THIN = 20_000, 300, 300, 3
TOGETHER = 100  #: tables that are sampled side by side


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


def named_values(law: Law, inputs: Inputs, observed: Observations, shapes: dict, z: jax.Array) -> dict[str, jax.Array]:
    """What is ranked, at one point."""
    value = evaluate(z, law, shapes, inputs, observed)
    found = {p.name: value.sites[p.name] for p in law.parameters_for(inputs.barriers)}
    found |= {name: value.sites[name] for name in ("log_prefactor", "discrepancy")}
    found |= {"log_rate of the first condition": value.sites["log_rate"][0]}
    if {"temperature_scale", "effective_dimension"} <= set(found):
        stability = (found["effective_dimension"] - 2) * found["temperature_scale"]  # of 1/η_c
        found["inverse critical learning rate"] = stability
    return found | {"log_likelihood": value.log_likelihood.sum()}


@float64
def ranks(law: Law, barrier: str, tables: int, seed: int = 0, warmup: int = WARMUP, draws: int = DRAWS) -> pd.DataFrame:
    """Share of posterior draws below the truth, one row for each table, one column for each quantity."""
    conditions = sort_conditions(aggregate(design(barrier)))
    inputs = with_passage_tables(law, jax.tree.map(jnp.asarray, build_inputs(law, conditions)))
    empty = jax.tree.map(jnp.asarray, build_observations(conditions, {}))
    looks = jnp.full(len(conditions.frame), float(LOOKS))
    shapes = site_shapes(law, inputs, empty)
    key = jax.random.key(seed)
    truth = sample_prior(key, law, inputs, empty, tables)
    spread = jnp.cov(sample_prior(jax.random.fold_in(key, 1), law, inputs, empty, 2000).T)

    def observe(escapes: jax.Array) -> Observations:
        return Observations(**{**empty.__dict__, "escapes": escapes, "looks": looks})

    def one(key: jax.Array, z: jax.Array) -> dict[str, jax.Array]:
        world_key, count_key, chain_key, tie_key = jax.random.split(key, 4)
        sites = evaluate(z, law, shapes, inputs, observe(jnp.ones_like(looks))).sites
        log_rate = sites["log_rate"] + sites["discrepancy"] * jax.random.normal(world_key, looks.shape)
        chance = -jnp.expm1(-jnp.exp(jnp.minimum(log_rate, 80.0)) * empty.look_width)
        seen = observe(jax.random.binomial(count_key, looks, jnp.clip(chance, 0.0, 1.0)))

        def log_joint(point: jax.Array, data: tuple) -> jax.Array:
            value = evaluate(point, law, shapes, *data)
            return value.log_prior + value.log_likelihood.sum()

        found = chains(
            *(
                chain_key[None],
                z[None],
                jnp.atleast_2d(spread),
                straight(len(z)),
                inputs,
                seen,
                DEFAULT_WIDTHS.as_arrays(),
                jnp.array(draws),
                jnp.array(0.9),
            ),
            log_joint=log_joint,
            warmup=warmup,
            draws=draws,
        )
        values = jax.vmap(lambda point: named_values(law, inputs, seen, shapes, point))(found.z[0, ::THIN])
        true = named_values(law, inputs, seen, shapes, z)
        ties = jax.random.uniform(tie_key)
        return {
            name: (jnp.sum(values[name] < true[name]) + ties * (1 + jnp.sum(values[name] == true[name])))
            / (len(values[name]) + 1)
            for name in true
        }

    compiled = jax.jit(jax.vmap(one), compiler_options=OPTIONS)
    keys = jax.random.split(jax.random.fold_in(key, 2), tables)
    together = min(TOGETHER, tables)
    parts = [
        compiled(keys[i : i + together], truth[i : i + together]) for i in range(0, tables - together + 1, together)
    ]
    return pd.DataFrame({name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]})


def verdicts(ranks: pd.DataFrame, probability: float = 0.95) -> pd.DataFrame:
    """For each column whether its ECDF stays within the simultaneous band, and by how much it leaves it."""
    rows = {}
    for name, values in ranks.items():
        _, ecdf, lower, upper = ecdf_pit(values.to_numpy(), probability, 1000, rng=np.random.default_rng(0))
        beyond = float(np.max(np.maximum(np.asarray(ecdf) - upper, lower - np.asarray(ecdf))))
        rows[name] = {"tables": len(values), "mean rank": float(values.mean()), "beyond the band": max(beyond, 0.0)}
        rows[name]["uniform"] = beyond <= 1e-9
    return pd.DataFrame.from_dict(rows, orient="index")


def main(tables: int, laws: list[str], barriers: list[str], seed: int, output: Path) -> None:
    """Calibrate all laws and print what came out."""
    found = []
    for name in laws:
        for barrier in barriers:
            one = ranks(load_law(name), barrier, tables, seed)
            print(f"{name}, {barrier}\n{verdicts(one).round(4).to_string()}", flush=True)
            found.append(one.melt(var_name="quantity", value_name="rank").assign(law=name, barrier=barrier))
    output.parent.mkdir(parents=True, exist_ok=True)
    pd.concat(found).to_csv(output, index=False, float_format="%.4f")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=200)
    parser.add_argument("--laws", default=",".join(built_in_laws()))
    parser.add_argument("--barriers", default="saddle,threshold")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/calibration_laws.csv"))
    arguments = parser.parse_args()
    main(arguments.tables, arguments.laws.split(","), arguments.barriers.split(","), arguments.seed, arguments.output)
