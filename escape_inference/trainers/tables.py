"""The tables of a campaign, put together from its finished parts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from escape_inference.errors import InputError
from escape_inference.table import read_measurements
from escape_inference.trainers.escape import EscapeRecord
from escape_inference.trainers.ramp_record import RampRecord
from escape_inference.trainers.specs import (
    ConditionSpec,
    CrossingSpec,
    MinimumSpec,
    RampSpec,
    SaddleSpec,
    describe,
    optimizer_text,
)
from escape_inference.trainers.spectra import LISTS, spectrum_table
from escape_inference.trainers.storage import Campaign
from escape_inference.trainers.study import Study
from escape_inference.trainers.way_out import Exits

COVARIATES = ["hessian_minimum", "hessian_minimum_se", "effective_dimension", "effective_dimension_se"]
COLUMNS = [
    "minimum",
    "run",
    "learning_rate",
    "batch_size",
    "steps",
    "escaped",
    "check_interval",
    "barrier",
    "start",
    "loss_minimum",
    "loss_barrier",
    "loss_barrier_se",
    *COVARIATES,
    "hessian_saddle",
    "hessian_saddle_se",
]
SpecOfPart = MinimumSpec | ConditionSpec | RampSpec | SaddleSpec | CrossingSpec
USUAL = {"optimizer": "sgd", "with_replacement": True}
"""Columns of how steps are made, left out of a table in which nothing else occurs."""
NEGLIGIBLE = 1e-3
"""A relative standard error of h* below this is left out of the table (it is in ``minima.csv``)."""


def part_name(kind: str, spec: SpecOfPart) -> str:
    """Return the name of the part that holds a minimum, a condition, a ramp, a search or escapes over its saddle."""
    return f"{kind}-{spec.identity[:16]}"


def record_writer(record: dict[str, Any]) -> Callable[[Path], object]:
    """Return a function that writes the record of a part as JSON."""
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record of a finished part."""
    return json.loads((folder / "record.json").read_text(encoding="utf-8"))


def summary(measured: EscapeRecord) -> dict[str, Any]:
    """Return what ``conditions.csv`` says about one measured condition.

    ``coefficient_of_variation`` is that of the complete times (1 for a memoryless escape; runs that did not escape are
    left out, so it is biased low where they are many). ``rate_ratio_halves`` is the rate in the second half of the time
    over that in the first (1 for a settled state), ``rate_change`` their difference in standard errors.
    """
    times = measured.rows.loc[measured.rows["escaped"], "steps"].to_numpy(dtype=float)
    trend = measured.trend
    middle = len(trend) // 2
    early, late = trend.iloc[:middle], trend.iloc[len(trend) - middle :]
    halves = [(part["escapes"].sum(), part["exposure"].sum()) for part in (early, late)]
    steady = measured.start == "quasi_stationary" and halves[0][0] > 0 and halves[1][1] > 0
    return {
        "rows": len(measured.rows),
        "escapes": int(measured.escapes),
        "exposure": float(measured.exposure),
        "rate": float(measured.rate),
        "rate_se": float(measured.rate_se),
        "coefficient_of_variation": float(times.std(ddof=1) / times.mean()) if len(times) > 1 else None,
        "rate_ratio_halves": float(halves[1][0] / halves[1][1] / (halves[0][0] / halves[0][1])) if steady else None,
        "burn_in": int(measured.burn_in),
        "settled": bool(measured.settled),
        "rate_change": float(measured.rate_change),
        **{name if "drift" in name else f"gelman_rubin_{name}": v for name, v in measured.gelman_rubin.items()},
        "missed_fraction": measured.missed_fraction,
        "missed_fraction_se": measured.missed_fraction_se,
        "note": "; ".join(measured.warnings),
        "seconds": round(float(measured.seconds), 2),
    }


def ramp_summary(measured: RampRecord) -> dict[str, Any]:
    """Return what ``ramps.csv`` says about one ramp: the median critical learning rate and its 95 % interval."""
    ends = (measured.median, measured.median_lower, measured.median_upper)
    names = ("critical_learning_rate", "critical_learning_rate_lower", "critical_learning_rate_upper")
    after = measured.critical["afterwards"].value_counts()
    return {
        "runs": len(measured.critical),
        "jumped": int(measured.critical["jumped"].sum()),
        **{name: float(after.get(name, 0)) for name in ("stayed", "returned", "diverged")},
        **dict(zip(names, ends, strict=True)),
        "note": "; ".join(measured.warnings),
        "seconds": round(float(measured.seconds), 2),
    }


def saddle_summary(found: Exits, learning_rates: list[float], loss_minimum: float) -> dict[str, Any]:
    """Return the record of a search: what each way out is, and which of them is timed (None: none, ``note`` says why).

    The lowest usable saddle above the loss of the minimum is timed.
    """
    high = [place for place, one in enumerate(found.exits) if one.usable and one.saddle.loss_barrier > loss_minimum]
    note = ""
    if not found.exits:
        note = (
            f"{found.returned} of {found.runs} runs came back to the minimum and none reached another: "
            "raise search_learning_rate, search_steps or threshold"
        )
    elif not any(one.usable for one in found.exits):
        note = "no saddle converged between the minimum and one reached"
    elif not high:
        note = "every saddle found is below the loss of the minimum, which is not at its lowest: use polish_steps"
    return {
        "status": "found" if high else "none",
        "search_learning_rates": learning_rates,
        "searched": found.runs,
        "returned": found.returned,
        "chosen": high[0] if high else None,
        "note": note,
        "exits": [one.numbers for one in found.exits],
    }


def write_tables(campaign: Campaign, plan: Study) -> Path:
    """Write ``minima.csv``, ``spectra.csv``, ``conditions.csv``, ``trends.csv``, those of ramps and saddles and, last, ``measurements.parquet``.

    Returns:
        Path of ``measurements.parquet``.

    Raises:
        InputError: no condition gave a usable run, or a table cannot be written. The other tables then say why.
    """
    minima, spectra, conditions, trends, rows = [], [], [], [], []
    known: dict[str, dict[str, Any]] = {}
    for minimum in plan.minima:
        folder = campaign.finished(part_name("minimum", minimum))
        assert folder is not None
        record = known[minimum.label] = read_record(folder)
        if record["status"] == "trained":
            spectra.append(spectrum_table(minimum.label, record))
        values = {key: record.pop(key, []) for key in LISTS}
        record |= {f"eigenvalue_{place + 1}": value for place, value in enumerate(values["eigenvalues"])}
        minima.append({"minimum": minimum.label, **minimum.settings, "seed": minimum.content["seed"], **record})
    if plan.file.hessian.escape_direction == "saddle":
        _turn_to_saddles(campaign, plan, known)
    timed: list[ConditionSpec | CrossingSpec] = [*plan.conditions, *plan.crossings]
    for condition in timed:
        name = condition.minimum.label
        kind = "crossing" if isinstance(condition, CrossingSpec) else "condition"
        folder = campaign.finished(part_name(kind, condition))
        record = {"status": "minimum failed"} if folder is None else read_record(folder)
        record.pop("seconds", None)
        conditions.append(_condition_row(condition, known[name], record))
        if folder is not None and record["status"] == "measured":
            label = {"minimum": name, "condition": describe(condition), "learning_rate": record["learning_rate"]}
            trends.append(pd.read_csv(folder / "trend.csv").assign(**label))
            rows.append(_rows(folder, condition, known))
    rows += _write_ramps(campaign, plan, known)
    _write_saddles(campaign, plan, known)
    _write_csv(campaign, "minima.csv", pd.DataFrame(minima))
    if spectra:
        _write_csv(campaign, "spectra.csv", pd.concat(spectra, ignore_index=True))
    if conditions:
        _write_csv(campaign, "conditions.csv", pd.DataFrame(conditions))
    if trends:
        _write_csv(campaign, "trends.csv", pd.concat(trends, ignore_index=True))
    if not rows:
        raise InputError("\n".join([f"{campaign.output}: nothing gave a usable run:", *remarks_on(campaign.output)]))
    return _write_measurements(campaign, pd.concat(rows, ignore_index=True))


def remarks_on(output: Path, most: int = 10) -> list[str]:
    """What a reader of a finished campaign must know: parts that were not measured, and what the others are wary of."""
    remarks: list[str] = []
    for name, label in (("minima", "minimum"), ("conditions", "condition"), ("ramps", "ramp"), ("saddles", "saddle")):
        if not (path := output / f"{name}.csv").exists():
            continue
        table = pd.read_csv(path).drop_duplicates(label)
        for _, row in table.iterrows():
            note = "" if pd.isna(row.get("note")) else str(row["note"])
            usual = row["status"] in ("trained", "measured", "found")
            if note or not usual:
                remarks.append(f"{row[label]}: {': '.join(filter(None, ['' if usual else row['status'], note]))}")
    more = len(remarks) - most
    return remarks[:most] + ([f"... and {more} more; see the notes in the tables of {output}"] if more > 0 else [])


def _turn_to_saddles(campaign: Campaign, plan: Study, known: dict[str, dict[str, Any]]) -> None:
    """Make h* of every minimum with a timed saddle the curvature towards that saddle (the lowest, if there are several)."""
    lowest: dict[str, dict[str, Any]] = {}
    for spec in plan.saddles:
        folder, name = campaign.finished(part_name("saddle", spec)), spec.minimum.label
        record = {} if folder is None else read_record(folder)
        if record.get("chosen") is not None:
            exit_ = record["exits"][record["chosen"]]
            if name not in lowest or exit_["loss_barrier"] < lowest[name]["loss_barrier"]:
                lowest[name] = exit_
    for name, exit_ in lowest.items():
        known[name] |= {
            "hessian_top": known[name]["hessian_minimum"],
            "hessian_minimum": exit_["hessian_along"],
            "hessian_minimum_se": 0.0,
        }


def _rows(
    folder: Path, spec: ConditionSpec | RampSpec | CrossingSpec, known: dict[str, dict[str, Any]]
) -> pd.DataFrame:
    """The rows of a finished part, with what is known of its minimum, and how its batches and steps were made."""
    name = spec.minimum.label
    known_here: dict[str, Any] = {"minimum": name, **_known(known[name], COVARIATES)}
    how: dict[str, Any] = {"optimizer": optimizer_text(spec.settings)}
    how["with_replacement"] = spec.settings["with_replacement"]
    return pd.read_parquet(folder / "rows.parquet").assign(**known_here, **how)


def _known(record: dict[str, Any], names: list[str]) -> dict[str, float]:
    """Numbers of a minimum; NaN where there is none."""
    return {name: float("nan") if record.get(name) is None else float(record[name]) for name in names}


def _write_ramps(campaign: Campaign, plan: Study, known: dict[str, dict[str, Any]]) -> list[pd.DataFrame]:
    """Write the tables of the ramps, if there are any, and return their rows for the table of all runs."""
    ramps, critical, rows = [], [], []
    for spec in plan.ramps:
        name, folder = spec.minimum.label, campaign.finished(part_name("ramp", spec))
        record = {"status": "minimum failed"} if folder is None else read_record(folder)
        record.pop("seconds", None)
        label = {"ramp": describe(spec), "minimum": name}
        covariates = _known(known[name], ["loss_minimum", *COVARIATES])
        ramps.append(
            label
            | {"batch_size": spec.batch_size, "threshold": spec.threshold, "jump_factor": spec.jump_factor}
            | {"levels": spec.levels, "spacing": spec.spacing, "steps_per_level": spec.settings["steps_per_level"]}
            | covariates
            | {"gradient_descent_limit": 2 / known[name].get("hessian_top", covariates["hessian_minimum"])}
            | record
        )
        if folder is not None and record["status"] == "measured":
            own = pd.read_parquet(folder / "critical.parquet")
            critical.append(own.assign(**label, **covariates)[[*label, *own.columns, *covariates]])
            rows.append(_rows(folder, spec, known))
    if ramps:
        _write_csv(campaign, "ramps.csv", pd.DataFrame(ramps))
    if critical:
        table = pd.concat(critical, ignore_index=True)
        _write_csv(campaign, "critical_learning_rates.csv", table)
        campaign.write_table("critical_learning_rates.parquet", lambda partial: table.to_parquet(partial, index=False))
    return rows


def _write_saddles(campaign: Campaign, plan: Study, known: dict[str, dict[str, Any]]) -> None:
    """Write ``saddles.csv``, if any were looked for: a row for each way out, or one that says why there is none."""
    rows: list[dict[str, Any]] = []
    for spec in plan.saddles:
        name, folder = spec.minimum.label, campaign.finished(part_name("saddle", spec))
        record: dict[str, Any] = {"status": "minimum failed"} if folder is None else read_record(folder)
        exits: list[dict[str, Any]] = record.pop("exits", [])
        chosen = record.pop("chosen", None)
        covariates = _known(known[name], ["loss_minimum", *COVARIATES])
        label = {"saddle": describe(spec), "minimum": name, **covariates}
        record["search_learning_rates"] = " ".join(f"{rate:g}" for rate in record.get("search_learning_rates", []))
        for place, one in enumerate(exits):
            own = {key: value for key, value in one.items() if key != "lowest"}
            own |= {f"lowest_{rank + 1}": value for rank, value in enumerate(one["lowest"])}
            ratio = own["loss_barrier"] / covariates["loss_minimum"]
            rows.append(label | record | {"timed": place == chosen, "barrier_ratio": ratio} | own)
        if not exits:
            rows.append(label | record | {"timed": False})
    if rows:
        _write_csv(campaign, "saddles.csv", pd.DataFrame(rows))


def _write_csv(campaign: Campaign, name: str, frame: pd.DataFrame) -> None:
    campaign.write_table(name, lambda path: frame.to_csv(path, index=False))


def _condition_row(
    condition: ConditionSpec | CrossingSpec, known: dict[str, Any], record: dict[str, Any]
) -> dict[str, Any]:
    """Return one row of ``conditions.csv``."""
    minimum_loss, curvature = known.get("loss_minimum"), known.get("hessian_minimum")
    threshold: float | None = None
    if isinstance(condition, CrossingSpec):
        given = condition.value if condition.scale == "learning_rate" else None
    else:
        given, threshold = condition.learning_rate, condition.threshold
    learning_rate = record.get("learning_rate", given)
    barrier = None if minimum_loss is None or threshold is None else threshold * minimum_loss
    temperature = None
    if learning_rate is not None and curvature is not None:
        temperature = learning_rate * curvature / condition.batch_size
    return {
        "condition": describe(condition),
        "minimum": condition.minimum.label,
        "learning_rate": learning_rate,
        "batch_size": condition.batch_size,
        "barrier": "saddle" if threshold is None else "threshold",
        "threshold": threshold,
        "start": condition.start,
        "check_interval": condition.settings["check_interval"],
        "loss_minimum": minimum_loss,
        "loss_barrier": record.get("loss_barrier", barrier),
        "hessian_minimum": curvature,
        "temperature": temperature,
        **{key: value for key, value in record.items() if key not in ("learning_rate", "loss_barrier")},
    }


def _write_measurements(campaign: Campaign, table: pd.DataFrame) -> Path:
    """Write the table of all runs, and read it back by the rules for measured tables."""
    errors = table["hessian_minimum_se"].astype(float)
    if (errors <= NEGLIGIBLE * table["hessian_minimum"]).all():
        table = table.drop(columns="hessian_minimum_se")
    for column in ("effective_dimension", "effective_dimension_se"):
        if table[column].isna().all():
            table = table.drop(columns=column)
    if "afterwards" in table:
        table = table.fillna({"afterwards": ""})
    for column, usual in USUAL.items():
        if (table[column] == usual).all():
            table = table.drop(columns=column)
    first = [column for column in COLUMNS if column in table]
    table = table[first + [column for column in table if column not in first]]
    path = campaign.write_table("measurements.parquet", lambda partial: table.to_parquet(partial, index=False))
    read_measurements(path)
    return path
