"""Make the tables of the threshold laws that ship with the package: ``python scripts/make_passage_tables.py`` (3 minutes on one core).

The nodes of both laws (mean passage from the minimum, leading rate from the quasi-stationary state) for noise exponents 0 and 1, in
single precision, go to ``escape_inference/passage_minimum.npz`` and ``passage_quasi_stationary.npz``. ``--check`` compares the shipped
splines with the laws at random points instead and prints the errors.
"""

import argparse

import numpy as np

from escape_inference.passage_table import (
    LOG_DIMENSIONS,
    LOG_EXCESSES,
    LOG_TEMPERATURES,
    SHIPPED_EXPONENTS,
    STARTS,
    build_passage_table,
    passage_values,
    shipped_path,
)
from escape_inference.precision import float64


@float64
def make(start: str) -> None:
    """Tabulate one law and write its file."""
    content = {}
    for q in SHIPPED_EXPONENTS:
        low, step, values = passage_values(start, LOG_EXCESSES, q)
        content |= {f"low_{q:g}": low, f"step_{q:g}": step, f"values_{q:g}": values.astype(np.float32)}
        print(f"{start}, q = {q:g}: {values.shape} nodes")
    np.savez_compressed(shipped_path(start), **content)
    print(f"{shipped_path(start).name}: {shipped_path(start).stat().st_size / 2**20:.2f} MiB")


@float64
def check(start: str, points: int) -> None:
    """Print the errors of the spline in the log rate, and of the estimate from the coarser spline."""
    rng = np.random.default_rng(1)
    ranges = (LOG_TEMPERATURES, LOG_EXCESSES, LOG_DIMENSIONS)
    grid = [rng.uniform(*bounds, points) for bounds in ranges]
    T, c, n = np.exp(grid[0]), 1 + np.exp(grid[1]), np.exp(grid[2])
    for q in SHIPPED_EXPONENTS:
        table = build_passage_table(start, LOG_EXCESSES, q)
        rate, coarse = (np.asarray(one(T, c, n, q)) for one in (table, table.coarser()))
        error = np.abs(rate - np.asarray(STARTS[start](T, c, n, q)))
        wanted = (rate > -20) & (rate < 3) & np.isfinite(error)
        for label, chosen in (("n < 5", n < 5), ("n < 20", n < 20), ("all n", n > 0)):
            some = wanted & chosen
            typical, most, worst = np.quantile(error[some], [0.5, 0.99, 1.0])
            ratio = np.quantile(np.abs(rate - coarse)[some] / np.maximum(error[some], 1e-9), [0.05, 0.5])
            print(
                f"{start}, q = {q:g}, {label}: {some.sum()} points with a rate of e^-20 to e^3 h*, error of the log rate"
                f" median {typical:.1e}, 99 % {most:.1e}, largest {worst:.1e}; estimated / true 5 %: {ratio[0]:.1f},"
                f" median {ratio[1]:.1f}"
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
