"""How long the way from a table to a verdict takes, beside PyMC with nutpie, and whether it grows with the number of rows.

    python scripts/bench_inference.py [--pymc PYTHON] [--rows 1000 10000000] [--parts verdict fits pymc rows]

* verdict: the command ``escape-inference compare`` with every law that applies, on 36 conditions x 40 runs simulated in a world
  with saddles and in one with thresholds; first with an empty cache of compiled programs, then again.
* fits: the command ``escape-inference infer`` with each law on 100 threshold conditions x 40 runs, the cache empty before each, with the
  effective dimension measured and without.
* pymc: posteriors of the power law and the Arrhenius law on the saddle table by ``escape-inference infer`` (empty and full cache)
  and by PyMC + nutpie with the same priors and the discrepancy of each condition as a parameter (``PYTHON`` has them).
* rows: tables of so many rows at the same conditions; reading and aggregating apart from inference, which sees conditions only.

Each figure is wall time; the load before and after tells how busy the machine was otherwise.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

GOAL = {"empty cache": 40.0, "full cache": 12.0}
FIT_GOAL = 20.0
LAWS = ("power_law", "arrhenius")
COMMAND = [sys.executable, "-m", "escape_inference.cli"]


def saddle_table(barrier: str = "saddle") -> pd.DataFrame:
    """36 conditions x 40 runs of a world in two directions, the dimension not measured."""
    from escape_inference import World, make_design, simulate_sde

    world = World(dimension=2, barrier=barrier)
    start = "minimum" if barrier == "saddle" else "quasi_stationary"
    return simulate_sde(world, make_design(world, start=start, seed=1), seed=1).drop(columns="effective_dimension")


def timed(command: list[str], cache: Path) -> tuple[float, str]:
    """Wall seconds of a command, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XDG_CACHE_HOME": str(cache)})
    wall = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return wall, done.stdout


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def bench_verdict(folder: Path) -> None:
    """From the command to the verdict, with an empty and with a full cache."""
    for barrier in ("saddle", "threshold"):
        path = folder / f"{barrier}.csv"
        saddle_table(barrier).to_csv(path, index=False)
        cache = folder / f"cache_{barrier}"
        cache.mkdir()
        for state in ("empty cache", "full cache"):
            command = [*COMMAND, "compare", str(path), "--output", str(folder / barrier), "--quiet"]
            wall, _ = timed(command, cache)
            report = json.loads((folder / barrier / "comparison.json").read_text())
            say(
                f"{barrier:<10} {len(report['laws'])} laws, {report['data']['conditions']} conditions, {state:<11} "
                f"{wall:7.1f} s (goal {GOAL[state]:.0f} s), verdict {report['verdict']}"
            )


def bench_fits(folder: Path) -> None:
    """Posteriors of every law that applies on many threshold conditions, everything compiled anew."""
    from escape_inference import World, make_design, prepare, simulate
    from escape_inference.inference import applicable
    from escape_inference.law import built_in_laws

    design = make_design(World(dimension=3, barrier="threshold"), minima=25, learning_rates=4, seed=1)
    truth = {"temperature_scale": 1.0, "effective_dimension": 3.0, "discrepancy": 0.1}
    table = simulate("power_law", design, truth, seed=1)
    for state, columns in (
        ("n measured", {"effective_dimension": truth["effective_dimension"]}),
        ("n not measured", {}),
    ):
        path = folder / "hundred.csv"
        table.assign(**columns).to_csv(path, index=False)
        conditions = prepare(path).conditions
        for name, law in built_in_laws().items():
            if applicable(law, conditions):
                cache = Path(tempfile.mkdtemp(dir=folder))
                output = str(folder / "fit")
                wall, _ = timed([*COMMAND, "infer", str(path), "--law", name, "--output", output, "--quiet"], cache)
                say(
                    f"{name:<22} {len(conditions)} conditions, {state:<14}, empty cache {wall:6.1f} s (goal {FIT_GOAL:.0f} s)"
                )


def bench_pymc(folder: Path, python: str) -> None:
    """Posteriors of two laws here and by PyMC."""
    from escape_inference.inference import prepare
    from escape_inference.law import typical_noise_strength

    path = folder / "pymc.csv"
    saddle_table().to_csv(path, index=False)
    cache = folder / "cache_pymc"
    cache.mkdir()
    for state in ("empty cache", "full cache"):
        for law in LAWS:
            command = [*COMMAND, "infer", str(path), "--law", law, "--output", str(folder / "ours"), "--quiet"]
            wall, _ = timed(command, cache)
            say(f"here  {law:<10} {state:<12} {wall:6.1f} s  {ours(folder, law)}")
    frame = prepare(path).conditions.frame
    frame.to_csv(folder / "conditions.csv", index=False)
    for law in LAWS:
        job = [python, __file__, "--worker", law, str(folder / "conditions.csv"), str(typical_noise_strength(frame))]
        wall, out = timed(job, cache)
        say(f"PyMC  {law:<10} {'':<12} {wall:6.1f} s  {out.strip()}")


def ours(folder: Path, law: str) -> str:
    """Means and standard deviations of a posterior that was written."""
    import arviz

    draws = arviz.from_netcdf(str(folder / "ours" / f"{law}.nc")).posterior
    names = [
        *([n for n in ("temperature_scale", "effective_dimension", "noise_strength") if n in draws]),
        "log_prefactor",
    ]
    return ", ".join(f"{n} {float(draws[n].mean()):.3g} ± {float(draws[n].std()):.2g}" for n in (*names, "discrepancy"))


def pymc_worker(law: str, path: str, typical: str) -> None:
    """One posterior by PyMC and nutpie (this runs in their own environment)."""
    import nutpie
    import pymc as pm
    import pytensor.tensor as pt

    frame = pd.read_csv(path)
    eta, batch, low, high, h, hs = (
        frame[name].to_numpy(float)
        for name in ("learning_rate", "batch_size", "loss_minimum", "loss_barrier", "hessian_minimum", "hessian_saddle")
    )
    d, e, w = (frame[name].to_numpy(float) for name in ("escapes", "exposure_before", "look_width"))
    log_barrier = np.log(high / low)
    with pm.Model() as model:
        if law == "power_law":
            scale = pm.LogNormal("temperature_scale", 0.0, 0.7)
            n = pm.LogNormal("effective_dimension", np.log(3.0), 1.0)
            exponent = -(1 / (scale * eta * h / batch) + 1 - n / 2) * log_barrier
        else:
            strength = pm.LogNormal("noise_strength", np.log(float(typical)), 1.5)
            exponent = -(high - low) * batch / (eta * strength)
        log_prefactor = pm.Normal("log_prefactor", 0.0, 1.0)
        sigma = pm.Exponential("discrepancy", scale=0.5)
        delta = sigma * pm.Normal("delta", 0.0, 1.0, shape=len(frame))
        log_rate = 0.5 * np.log(h * hs) - np.log(2 * np.pi) + exponent + log_prefactor + delta
        kappa = pt.exp(log_rate)
        pm.Potential("escapes", (d * pt.log(-pt.expm1(-kappa * w)) - kappa * e).sum())
    start = time.perf_counter()
    compiled = nutpie.compile_pymc_model(model)
    middle = time.perf_counter()
    draws: Any = nutpie.sample(compiled, draws=1000, tune=500, chains=4, seed=0, progress_bar=False)
    end = time.perf_counter()
    names = [v.name for v in model.free_RVs if v.name != "delta"]
    text = ", ".join(
        f"{n} {float(draws.posterior[n].mean()):.3g} ± {float(draws.posterior[n].std()):.2g}" for n in names
    )
    diverging = int(draws.sample_stats.diverging.sum())
    print(f"{text}; compiling {middle - start:.1f} s, sampling {end - middle:.1f} s, {diverging} divergences")


def bench_rows(folder: Path, sizes: list[int]) -> None:
    """Time of inference for tables of very different size at the same 36 conditions."""
    from escape_inference import World, infer, make_design, prepare, read_measurements, simulate
    from escape_inference.conditions import aggregate

    prepared = {}
    for rows in sizes:
        design = make_design(World(dimension=3), runs=max(1, round(rows / 36)), seed=1)
        truth = {"temperature_scale": 1.0, "effective_dimension": 3.0, "discrepancy": 0.1}
        path = folder / f"{rows}.parquet"
        simulate("power_law", design, truth, seed=1).to_parquet(path, index=False)
        start = time.perf_counter()
        table = read_measurements(path)
        read = time.perf_counter()
        conditions = aggregate(table)
        end = time.perf_counter()
        prepared[rows] = prepare(table, seed=0)
        checked = time.perf_counter() - end
        say(
            f"{len(table):>10,} rows, {len(conditions)} conditions: read {read - start:.2f} s, aggregate {end - read:.2f} s "
            f"(aggregate again and check for escape {checked:.2f} s)"
        )
    for table in prepared.values():  # whatever has to be compiled
        infer("power_law", table, seed=0)
    seconds: dict[int, list[float]] = {rows: [] for rows in sizes}
    for repetition in range(3):
        for rows in sizes:
            start = time.perf_counter()
            infer("power_law", prepared[rows], seed=repetition)
            seconds[rows].append(time.perf_counter() - start)
    median = {rows: float(np.median(times)) for rows, times in seconds.items()}
    for rows in sizes:
        say(f"{rows:>10,} rows: inference {median[rows]:.2f} s ({', '.join(f'{t:.2f}' for t in seconds[rows])})")
    say(f"ratio of the last to the first {median[sizes[-1]] / median[sizes[0]]:.2f}")


def main(arguments: argparse.Namespace) -> None:
    """Run the parts that were asked for."""
    if arguments.worker:
        pymc_worker(*arguments.worker)
        return
    say(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f} before the start")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "verdict" in arguments.parts:
            bench_verdict(folder)
        if "fits" in arguments.parts:
            bench_fits(folder)
        if "pymc" in arguments.parts and arguments.pymc:
            bench_pymc(folder, arguments.pymc)
        if "rows" in arguments.parts:
            bench_rows(folder, arguments.rows)
    say(f"load {os.getloadavg()[0]:.1f} after the end")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pymc", metavar="PYTHON", help="interpreter of an environment with pymc and nutpie")
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000_000])
    parts = ["verdict", "fits", "pymc", "rows"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--worker", nargs=3, metavar=("LAW", "CONDITIONS", "STRENGTH"), help=argparse.SUPPRESS)
    main(parser.parse_args())
