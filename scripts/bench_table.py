"""Time and memory of reading, checking and aggregating a measured table, as CSV and as Parquet.

Each table is made in a temporary folder and read in a process of its own, so that the peak memory is its own:

    python scripts/bench_table.py --rows 1000 10000000
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from escape_inference.conditions import aggregate
from escape_inference.table import read_measurements


def make_tables(folder: Path, rows: int, seed: int = 0) -> list[Path]:
    """Write one table of 12 minima x 3 learning rates, rows in random order, as Parquet and as CSV."""
    rng = np.random.default_rng(seed)
    condition = rng.integers(0, 36, rows)
    minimum = condition // 3
    steps = rng.geometric(1e-4, rows)

    def word(text: str) -> pa.Array:
        return pa.DictionaryArray.from_arrays(np.zeros(rows, dtype=np.int32), [text])

    columns = {
        "minimum": pa.DictionaryArray.from_arrays(minimum.astype(np.int32), [f"m{i}" for i in range(12)]),
        "run": np.arange(rows),
        "learning_rate": np.array([0.05, 0.06, 0.07])[condition % 3],
        "batch_size": np.full(rows, 8),
        "steps": np.minimum(steps, 20_000),
        "escaped": steps <= 20_000,
        "check_interval": np.ones(rows, dtype=np.int64),
        "barrier": word("threshold"),
        "start": word("minimum"),
        "loss_minimum": 1e-3 * (1 + minimum),
        "loss_barrier": 2e-3 * (1 + minimum),
        "hessian_minimum": 10.0 + minimum,
        "effective_dimension": np.full(rows, 5.5),
        "hessian_minimum_se": np.full(rows, 0.1),
    }
    table = pa.table(columns)
    paths = [folder / "table.parquet", folder / "table.csv"]
    pa.parquet.write_table(table, paths[0])
    pa.csv.write_csv(table, paths[1])
    return paths


def measure(path: str) -> None:
    """Read, check and aggregate one table and print what it took."""
    start = time.perf_counter()
    table = read_measurements(path)
    read = time.perf_counter()
    conditions = aggregate(table)
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    print(
        f"{len(table):>10,} rows {Path(path).suffix:<8} read and check {read - start:6.2f} s,"
        f" aggregate {end - read:6.2f} s,"
        f" total {end - start:6.2f} s (processor {time.process_time():6.2f} s), peak {peak:5.2f} GiB,"
        f" {len(conditions)} conditions, {conditions.n_escapes:,} escapes",
        flush=True,
    )


def main(arguments: argparse.Namespace) -> None:
    """Make the tables and read each in a process of its own."""
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            for path in make_tables(Path(folder), rows):
                subprocess.run([sys.executable, __file__, "--measure", str(path)], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000_000])
    parser.add_argument("--measure", metavar="TABLE", help="read this table and print what it took")
    chosen = parser.parse_args()
    if chosen.measure:
        measure(chosen.measure)
    else:
        main(chosen)
