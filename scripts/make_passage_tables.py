"""Make the tables of the threshold laws that ship with the package: ``python scripts/make_passage_tables.py`` (1 minute on two cores).

The nodes of both laws (mean passage from the minimum, leading rate from the quasi-stationary state) for noise exponents 0 and 1 and
for any exponent, in single precision, go to ``escape_inference/passage_*.npz``. ``--check`` compares the shipped splines with the laws
at random points instead and prints the errors.
"""

import argparse

import numpy as np

from escape_inference.passage_table import (
    LOG_DIMENSIONS,
    LOG_EXCESSES,
    LOG_EXCESSES_WITH_EXPONENT,
    LOG_TEMPERATURES,
    MARGIN_MADE,
    RANGES_WITH_EXPONENT,
    SHIPPED_EXPONENTS,
    STARTS,
    build_passage_table,
    passage_values,
    shipped_path,
)
from escape_inference.precision import float64


@float64
def make(start: str) -> None:
    """Tabulate one law and write its files."""
    for q in SHIPPED_EXPONENTS:
        if q is None:
            low, step, values = passage_values(start, LOG_EXCESSES_WITH_EXPONENT, q, MARGIN_MADE)
        else:
            low, step, values = passage_values(start, LOG_EXCESSES, q)
        path = shipped_path(start, q)
        np.savez_compressed(path, low=low, step=step, values=values.astype(np.float32))
        print(f"{path.name}: {values.shape} nodes, {path.stat().st_size / 2**20:.2f} MiB")


@float64
def check(start: str, points: int) -> None:
    """Print the errors of the splines in the log rate, and of the estimate from the coarser splines."""
    for q in SHIPPED_EXPONENTS:
        rng = np.random.default_rng(1)
        ranges = (LOG_TEMPERATURES, LOG_EXCESSES, LOG_DIMENSIONS, (0.0, 0.0))
        if q is None:
            log_temperatures, log_dimensions, exponents = RANGES_WITH_EXPONENT
            ranges = (log_temperatures, LOG_EXCESSES_WITH_EXPONENT, log_dimensions, exponents)
        grid = [rng.uniform(*bounds, points) for bounds in ranges]
        T, c, n = np.exp(grid[0]), 1 + np.exp(grid[1]), np.exp(grid[2])
        exponent = grid[3] if q is None else q
        table = build_passage_table(start, LOG_EXCESSES_WITH_EXPONENT, q)
        rate, coarse = (np.asarray(one(T, c, n, exponent)) for one in (table, table.coarser))
        error = np.abs(rate - np.asarray(STARTS[start](T, c, n, exponent)))
        wanted = (rate > -20) & (rate < 3) & np.isfinite(error)
        for label, chosen in (("n < 5", n < 5), ("n < 20", n < 20), ("all n", n > 0)):
            some = wanted & chosen
            typical, most, worst = np.quantile(error[some], [0.5, 0.99, 1.0])
            ratio = np.quantile(np.abs(rate - coarse)[some] / np.maximum(error[some], 1e-9), [0.05, 0.5])
            print(
                f"{start}, {'any q' if q is None else f'q = {q:g}'}, {label}: {some.sum()} points with a rate of e^-20 to e^3 h*,"
                f" error of the log rate median {typical:.1e}, 99 % {most:.1e}, largest {worst:.1e};"
                f" estimated / true 5 %: {ratio[0]:.1f}, median {ratio[1]:.1f}"
            )


def main() -> None:
    """Make or check both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the shipped tables with the laws")
    parser.add_argument("--points", type=int, default=8000, help="random points of the check")
    chosen = parser.parse_args()
    for start in STARTS:
        check(start, chosen.points) if chosen.check else make(start)


if __name__ == "__main__":
    main()
