"""Do 90 % intervals contain the truth 90 % of the time, and does the law of the world win? On worlds stepped as equations of motion.

    python scripts/calibrate_worlds.py [--repetitions 20] [--output calibration.csv]

Worlds: noise proportional to the loss (power law) and uniform noise (Arrhenius), at saddles and at thresholds. For every
repetition a new design and new runs are simulated, both laws are fitted, and the temperature scale or noise strength and the
effective dimension are compared with the truth. Prints the share of intervals that contain it with its binomial range, and
how often each verdict came out. About one minute a world and repetition on two cores.
"""

import argparse
from pathlib import Path

import pandas as pd
from scipy.stats import binom

from escape_inference import compare
from escape_inference.sde import simulate_sde
from escape_inference.worlds import World, make_design

STRENGTH, DIMENSION = 0.03, 2
WORLDS = [(noise, barrier) for noise in ("loss", "uniform") for barrier in ("saddle", "threshold")]


def study(noise: str, barrier: str, seed: int) -> list[dict]:
    """One simulated table and what the comparison says of it."""
    strength = STRENGTH if noise == "uniform" else None
    world = World(noise=noise, noise_strength=strength, dimension=DIMENSION, barrier=barrier)
    start = "minimum" if barrier == "saddle" else "quasi_stationary"
    table = simulate_sde(world, make_design(world, minima=10, runs=30, start=start, seed=seed), seed=seed)
    result = compare(
        table.drop(columns="effective_dimension"), ["power_law", "arrhenius"], seed=seed, draws=500, warmup=300
    )
    law = "power_law" if noise == "loss" else "arrhenius"
    truth = {"temperature_scale": 1.0, "noise_strength": STRENGTH, "effective_dimension": DIMENSION}
    rows = result.report["laws"][law]["parameters"]
    return [
        {"noise": noise, "barrier": barrier, "seed": seed, "verdict": result.verdict, "parameter": name}
        | {"truth": truth[name], "q05": row["q05"], "q95": row["q95"]}
        | {"contains": row["q05"] <= truth[name] <= row["q95"]}
        for name, row in rows.items()
        if name in truth
    ]


def main(repetitions: int, output: Path) -> None:
    """Run all worlds and print the coverage."""
    rows: list[dict] = []
    for seed in range(repetitions):
        for noise, barrier in WORLDS:
            rows += study(noise, barrier, seed)
            pd.DataFrame(rows).to_csv(output, index=False)
            print(seed, noise, barrier, rows[-1]["verdict"], flush=True)
    frame = pd.DataFrame(rows)
    low, high = binom.interval(0.95, repetitions, 0.9)
    print(f"expected {low:.0f} to {high:.0f} of {repetitions} intervals to contain the truth")
    print(frame.groupby(["noise", "barrier", "parameter"])["contains"].agg(["sum", "size"]).to_string())
    print(frame.drop_duplicates(["noise", "barrier", "seed"]).groupby(["noise", "barrier"])["verdict"].value_counts())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("calibration.csv"))
    arguments = parser.parse_args()
    main(arguments.repetitions, arguments.output)
