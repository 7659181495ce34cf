"""Do 90 % intervals contain the truth 90 % of the time, and does the law of the world win? On worlds stepped as equations of motion.

    python scripts/calibrate_worlds.py [--repetitions 20] [--first-seed 0] [--part verdicts|exponents] [--world "0.0 saddle"] [--jobs 2]

``verdicts``: noise proportional to the loss (power law) and uniform noise (Arrhenius), at saddles and at thresholds. For every repetition a new
design and new runs are simulated and both laws are compared; temperature scale or noise strength and n stand against the truth.
``exponents``: noise ∝ L^q with q = 0, 0.5, 1, 1.5, at saddles and thresholds, fitted with the noise exponent family; q against the truth. Prints
the share of intervals that contain it with its binomial range, and how often each verdict came out. Ctrl-C keeps what is finished, and
the same command goes on from there.
"""

import argparse
from concurrent.futures import as_completed
from pathlib import Path

import jax
import numpy as np
import pandas as pd
from scipy.stats import binom

import escape_inference as ei
from escape_inference.workers import processes
from escape_inference.worlds import World, make_design

STRENGTH, DIMENSION = 0.3, 2  # so strong that eta h* stays near 0.1 at every minimum: beyond it SGD is no diffusion
SHORT = {"draws": 500, "warmup": 300}
BARRIERS = ("saddle", "threshold")
SADDLES = {
    "rates": (2e-4, 6e-3),
    "ratios": (1.1, 2.1),
}  # cold and high: the formulas over a saddle are the leading order in T
PARTS = {
    "verdicts": [(noise, barrier) for noise in ("loss", "uniform") for barrier in BARRIERS],
    "exponents": [(q, barrier) for q in (0.0, 0.5, 1.0, 1.5) for barrier in BARRIERS],
}


def simulated(barrier: str, seed: int, **world: object) -> pd.DataFrame:
    """A table of ten minima at three learning rates, n left out."""
    there = World(dimension=DIMENSION, barrier=barrier, **world)  # type: ignore[arg-type]
    start = "minimum" if barrier == "saddle" else "quasi_stationary"
    ranges = SADDLES if barrier == "saddle" else {}
    design = make_design(there, minima=10, runs=30, start=start, seed=seed, **ranges)
    return ei.simulate_sde(there, design, seed=seed).drop(columns="effective_dimension")


def study(part: str, case: tuple, seed: int) -> list[dict]:
    """One simulated table and what the inference says of it."""
    jax.config.update("jax_compilation_cache_dir", str(Path("results/compiled").resolve()))
    first, barrier = case
    common = {"part": part, "world": f"{first} {barrier}", "seed": seed}
    if part == "verdicts":
        strength = STRENGTH if first == "uniform" else None
        result = ei.compare(
            simulated(barrier, seed, noise=first, noise_strength=strength),
            ["power_law", "arrhenius"],
            seed=seed,
            **SHORT,
        )
        entry = result.report["laws"]["power_law" if first == "loss" else "arrhenius"]
        rows, common["verdict"], common["reason"] = entry["parameters"], result.verdict, result.reason
        truth = {"temperature_scale": 1.0, "noise_strength": STRENGTH, "effective_dimension": DIMENSION}
    else:
        fit = ei.infer("noise_exponent", simulated(barrier, seed, noise_exponent=first), seed=seed, **SHORT)
        low, high = np.quantile(fit["posterior"]["noise_exponent"], [0.05, 0.95])
        rows, truth = {"noise_exponent": {"q05": low, "q95": high}}, {"noise_exponent": first}
        common["verdict"] = "trustworthy" if fit.attrs["trustworthy"] else "not trustworthy"
        common["reason"] = fit.attrs["convergence"]
    return [
        common
        | {"parameter": name, "truth": truth[name], "q05": row["q05"], "q95": row["q95"]}
        | {"contains": bool(row["q05"] <= truth[name] <= row["q95"])}
        for name, row in rows.items()
        if name in truth
    ]


def main(part: str, seeds: range, world: str | None, jobs: int, output: Path) -> None:
    """Run all worlds, or one, and print the coverage."""
    output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = pd.read_csv(output).to_dict("records") if output.exists() else []
    known = {(row["part"], row["world"], row["seed"]) for row in rows}
    cases = [case for case in PARTS[part] if world in (None, f"{case[0]} {case[1]}")]
    tasks = [(part, case, seed) for seed in seeds for case in cases]
    tasks = [task for task in tasks if (part, f"{task[1][0]} {task[1][1]}", task[2]) not in known]
    with processes(jobs) as pool:
        for done in as_completed([pool.submit(study, *task) for task in tasks]):
            rows += done.result()
            pd.DataFrame(rows).to_csv(output, index=False)
            print(f"{len(rows)} intervals: {rows[-1]['world']}, {rows[-1]['verdict']}", flush=True)
    frame = pd.DataFrame(rows)
    frame = frame[
        (frame["part"] == part)
        & frame["seed"].isin(seeds)
        & frame["world"].isin([f"{first} {barrier}" for first, barrier in cases])
    ]
    low, high = binom.interval(0.95, len(seeds), 0.9)
    print(f"expected {low:.0f} to {high:.0f} of {len(seeds)} intervals to contain the truth")
    print(frame.groupby(["world", "parameter"])["contains"].agg(["sum", "size"]).to_string())
    print(frame.drop_duplicates(["world", "seed"]).groupby("world")["verdict"].value_counts().to_string())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0, help="of the simulated tables; later ones are new data")
    parser.add_argument("--part", choices=list(PARTS), default="verdicts")
    parser.add_argument("--world", help="one world only, as the printed table names it")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--output", type=Path, default=Path("results/calibration_worlds.csv"))
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.repetitions)
    main(arguments.part, seeds, arguments.world, arguments.jobs, arguments.output)
