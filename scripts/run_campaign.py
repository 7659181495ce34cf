"""From data to verdict in one go: train minima, measure spectra, escapes and ramps, write the table, compare the laws.

    python scripts/run_campaign.py [STUDY.toml] [--output results/campaign] [--laws power_law,arrhenius] [--draws 300]
        [--resume]

The study that it runs by default, scripts/studies/campaign.toml, has four minima of the published MNIST network and takes
less than ten minutes on two cores. Prints what each stage gave and how long it took.
"""

import argparse
import time
from pathlib import Path

import pandas as pd

import escape_inference as ei
from escape_inference.trainers.collect import collect

STUDY = Path(__file__).parent / "studies" / "campaign.toml"


def stage(title: str, began: float) -> float:
    """Print how long a stage took."""
    now = time.perf_counter()
    print(f"== {title}: {now - began:.0f} s", flush=True)
    return now


def main(study: Path, output: Path, laws: list[str], draws: int, resume: bool) -> None:
    """Run the sequence."""
    start = began = time.perf_counter()
    table = ei.read_measurements(collect(study, output, resume=resume))
    began = stage("measured", began)
    minima = pd.read_csv(output / "minima.csv")
    wanted = ["minimum", "loss_minimum", "hessian_minimum", "outliers", "outliers_se", "bulk_edge", "outlier_gap"]
    print(minima[[column for column in wanted if column in minima]].to_string(index=False))
    if (output / "conditions.csv").exists():
        conditions = pd.read_csv(output / "conditions.csv")
        wanted = ["condition", "status", "escapes", "rate", "rate_se", "coefficient_of_variation", "settled"]
        print(conditions[[column for column in wanted if column in conditions]].to_string(index=False))
    if (output / "ramps.csv").exists():
        ramps = pd.read_csv(output / "ramps.csv")
        ends = [f"critical_learning_rate{end}" for end in ("", "_lower", "_upper")]
        print(ramps[["minimum", "runs", "jumped", *ends, "gradient_descent_limit"]].to_string(index=False))
    print(f"{len(table)} rows in {output / 'measurements.parquet'}")
    result = ei.compare(table, laws, seed=0, draws=draws, warmup=draws)
    stage("compared", began)
    print(result.table.to_string())
    print(f"verdict: {result.verdict}\n{result.reason}")
    stage("everything", start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", default=STUDY)
    parser.add_argument("--output", type=Path, default=Path("results/campaign"))
    parser.add_argument("--laws", default="power_law,arrhenius", help="separated by commas")
    parser.add_argument("--draws", type=int, default=300, help="posterior draws of each chain, and of its warm-up")
    parser.add_argument("--resume", action="store_true", help="go on with a campaign that was stopped")
    arguments = parser.parse_args()
    main(arguments.study, arguments.output, arguments.laws.split(","), arguments.draws, arguments.resume)
