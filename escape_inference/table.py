"""The measured table: one row for each run at one condition, read from CSV or Parquet and checked to the last rule.

:func:`read_measurements` either returns a table that every later step may trust, or raises one
:class:`~escape_inference.errors.InputError` that names the file, the column, the first offending rows, the rule and the
remedy. Rows are numbered from 1, the first row below the header being row 1, in CSV and in Parquet alike.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from escape_inference.errors import InputError
from escape_inference.row_groups import first_rows, ramp_codes
from escape_inference.table_cells import as_flags, as_labels, as_numbers
from escape_inference.table_columns import (
    CHOICES,
    COLUMNS,
    COUNTS,
    ERRORS,
    LARGEST_COUNT,
    MEANING,
    OF_THE_MINIMUM,
    REQUIRED,
    refuse,
)
from escape_inference.table_files import check_names, load


def read_measurements(path: "str | Path | pd.DataFrame") -> pd.DataFrame:
    """Read, complete and check a measured table.

    Args:
        path: a ``.csv``, ``.parquet`` or ``.pq`` file, or a data frame with the same columns (which is not changed).

    Returns:
        A new data frame with a plain row index, in the order of the file. Known columns come first and are all there:
        ``minimum``, ``barrier`` and ``start`` categorical, ``run`` integer or string, ``escaped`` boolean,
        ``batch_size``, ``steps`` and ``check_interval`` (both iterations) integers, everything else float (NaN where
        a measurement is empty, and in ``*_se`` where none is given). Other columns of the file follow as they are.
        ``attrs["path"]`` and ``attrs["sha256"]`` say where it came from; for a data frame that was not read from a file
        the digest is of its content.

    Raises:
        InputError: with one message, if the file cannot be read or any rule of the table is broken.

    >>> table = read_measurements(pd.DataFrame({
    ...     "minimum": "m1", "run": [1, 2], "learning_rate": 0.05, "batch_size": 8, "steps": [120, 500],
    ...     "escaped": [True, False]}))
    >>> table["check_interval"].tolist(), table["barrier"].tolist()
    ([1, 1], ['saddle', 'saddle'])
    >>> read_measurements(table.assign(learning_rate=[0.05, -1.0]))
    Traceback (most recent call last):
    ...
    escape_inference.errors.InputError: <data frame>: column 'learning_rate', row 2 (value -1): must be a finite \
number above 0 (the learning rate η of this row). Correct or remove the row. Row 1 is the first below the header.
    """
    if isinstance(path, pd.DataFrame):
        if is_checked(path):
            return path.copy(deep=False)
        source = str(path.attrs.get("path", "<data frame>"))
        check_names(source, list(path.columns))
        raw: dict[Any, Any] = {name: path.iloc[:, i].reset_index(drop=True) for i, name in enumerate(path.columns)}
        rows, sha256 = len(path), ""
    else:
        source, sha256, raw, rows = load(path)
    if rows == 0:
        raise InputError(f"{source}: the table has a header but no rows; each run needs one row.")
    table = _normalise(source, raw, rows, from_file=bool(sha256))
    _check_rules(source, table)
    table.attrs = {"path": source, "sha256": sha256 or _content_digest(table), "fingerprint": _fingerprint(table)}
    return table


def is_checked(table: pd.DataFrame) -> bool:
    """Whether ``table`` came from :func:`read_measurements` and has not been changed since.

    >>> is_checked(pd.DataFrame({"minimum": ["m1"]}))
    False
    """
    return "fingerprint" in table.attrs and table.attrs["fingerprint"] == _fingerprint(table)


# ------------------------------------------------------------------------------------------- types and defaults


def _normalise(source: str, raw: dict[Any, Any], rows: int, from_file: bool) -> pd.DataFrame:
    """Give every known column its type, fill the defaults, and keep the other columns as they are."""
    columns: dict[Any, Any] = {}
    for name in COLUMNS:
        column = _series(raw.pop(name)) if name in raw else None
        if name in ("minimum", "run", *CHOICES):
            default = CHOICES[name][0] if name in CHOICES else None
            columns[name] = _label_column(source, name, column, default, rows)
        elif name == "escaped":
            flags, bad, empty = as_flags(column)
            refuse(source, name, empty, column, "is required and must not be empty")
            refuse(source, name, bad, column, "must be true or false (or 1 or 0)")
            columns[name] = flags
        elif column is None:
            columns[name] = np.ones(rows, dtype=np.int64) if name == "check_interval" else np.full(rows, np.nan)
        else:
            columns[name] = _number_column(source, name, column)
        del column
    for name in list(raw):
        columns[name] = _series(raw.pop(name))
    if from_file:
        return pd.DataFrame({name: _writeable(values) for name, values in columns.items()}, copy=False)
    return pd.DataFrame(columns, copy=True)


def _series(column: Any) -> pd.Series:
    if isinstance(column, pd.Series):
        return column
    try:
        return column.to_pandas()
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return pd.Series(column.to_pylist(), dtype=object)


def _label_column(source: str, name: str, column: pd.Series | None, default: str | None, rows: int) -> Any:
    """``minimum``, ``barrier`` and ``start`` become categorical, ``run`` stays integer or becomes a string."""
    if column is None:
        return pd.Categorical.from_codes(np.zeros(rows, dtype=np.int8), categories=pd.Index([str(default)]))
    labels, bad, empty = as_labels(column, categorical=name != "run")
    refuse(source, name, bad, column, "must be a text or an integer")
    if default is None:
        refuse(source, name, empty, column, "is required and must not be empty")
        return _used(labels) if isinstance(labels, pd.Categorical) else labels
    wrong = ~np.isin(np.asarray(labels.categories, dtype=object), np.asarray(CHOICES[name], dtype=object))
    if wrong.any():
        unknown = np.append(wrong, False)[labels.codes]
        refuse(source, name, unknown, column, f"must be {' or '.join(map(repr, CHOICES[name]))}")
    labels = _used(labels)
    if empty.any():
        labels = labels if default in labels.categories else labels.add_categories([default])
        labels = labels.fillna(default)
    return labels


def _used(labels: pd.Categorical) -> pd.Categorical:
    """Without the categories that do not occur."""
    occurs = np.bincount(labels.codes[labels.codes >= 0], minlength=len(labels.categories)) > 0
    return labels if occurs.all() else labels.remove_unused_categories()


def _writeable(values: Any) -> Any:
    """An array that may be written to, copied only if it is not ours (pandas hands out read-only views)."""
    if isinstance(values, np.ndarray) and not values.flags.writeable:
        try:
            values = values.view()
            values.flags.writeable = True
        except ValueError:
            values = values.copy()
    return values


def _number_column(source: str, name: str, column: pd.Series) -> np.ndarray:
    """Numbers of one column as float64, or int64 for counts, with every rule that concerns one cell."""
    if name in COUNTS and column.dtype == np.dtype(np.int64):
        counts = column.to_numpy()
        if counts.min(initial=1) >= 1 and counts.max(initial=1) <= LARGEST_COUNT:
            return counts
    values, bad = as_numbers(column)
    refuse(source, name, bad, column, "must be a number")
    empty = np.isnan(values)
    if name in REQUIRED:
        refuse(source, name, empty, column, "is required and must not be empty")
    meaning = f" ({MEANING[name]})" if name in MEANING else ""
    if name in COUNTS:
        if empty.any():
            values = np.where(empty, 1.0, values)
        wrong = ~((values >= 1) & (values <= LARGEST_COUNT) & (np.floor(values) == values))
        refuse(source, name, wrong, column, f"must be a whole number of at least 1{meaning}")
        return values.astype(np.int64)
    if name in ERRORS:
        wrong = ~((values >= 0) & np.isfinite(values)) & ~empty
        refuse(source, name, wrong, column, "must be a finite number of at least 0, or empty (a standard error)")
    else:
        wrong = ~((values > 0) & np.isfinite(values)) & ~empty
        rule = "must be a finite number above 0" + (meaning or ", or empty where it was not measured")
        refuse(source, name, wrong, column, rule)
    return values


# ----------------------------------------------------------------------------------- rules across rows and columns


def _check_rules(source: str, table: pd.DataFrame) -> None:
    """Rules that compare columns or rows."""
    low, high = table["loss_minimum"].to_numpy(), table["loss_barrier"].to_numpy()
    refuse(
        source, "loss_barrier", high <= low, table["loss_barrier"], "must be above loss_minimum",
        "Give the loss at the saddle or the threshold, not that of the minimum",
    )  # fmt: skip
    early = table["escaped"].to_numpy() & (table["check_interval"].to_numpy() > table["steps"].to_numpy())
    refuse(
        source, "check_interval", early, table["check_interval"],
        "must be at most steps where the run escaped: the escape lies in (steps − check_interval, steps]",
        "Give the iterations between the last two looks at the loss, and the steps up to the look that found the escape",
    )  # fmt: skip
    _check_minima(source, table)
    _check_ramps(source, table)
    if not table["escaped"].any():
        count = f"rows 1 to {len(table)}" if len(table) > 1 else "row 1"
        raise InputError(
            f"{source}: column 'escaped', {count}: no run escaped in the whole table, so it holds no rate. "
            "Measure for more steps, at a higher learning rate or a lower barrier. Row 1 is the first below the header."
        )


def _check_minima(source: str, table: pd.DataFrame) -> None:
    """L*, h*, n and their errors belong to the minimum: the same in all its rows."""
    codes = table["minimum"].cat.codes.to_numpy()
    start = first_rows(codes, len(table["minimum"].cat.categories))
    for name in (*OF_THE_MINIMUM, *(f"{name}_se" for name in OF_THE_MINIMUM)):
        values = table[name].to_numpy()
        reference = values[start]
        if np.isnan(reference).all() and np.isnan(values).all():
            continue
        differs = np.flatnonzero(values != reference[codes])
        same = np.isclose(values[differs], reference[codes[differs]], rtol=1e-9, atol=0.0, equal_nan=True)
        if same.all():
            continue
        wrong = np.zeros(len(values), dtype=bool)
        wrong[differs[~same]] = True
        row = int(differs[~same][0])
        known = "empty" if np.isnan(reference[codes[row]]) else f"{reference[codes[row]]:.6g}"
        rule = (
            f"must be the same in all rows of a minimum, but minimum {str(table['minimum'].iloc[row])!r} has it "
            f"{known} in row {start[codes[row]] + 1}"
        )
        refuse(
            source,
            name,
            wrong,
            table[name],
            rule,
            "Give every row of the minimum one value, or leave all of them empty",
        )


def _check_ramps(source: str, table: pd.DataFrame) -> None:
    """Only the last row of a ramp may be an escape."""
    inside, ramp = ramp_codes(table)
    if not inside.any():
        return
    rows = np.flatnonzero(inside)
    last = np.zeros(len(table), dtype=bool)
    last[rows[~pd.Series(ramp[rows]).duplicated(keep="last").to_numpy()]] = True
    wrong = inside & ~last & table["escaped"].to_numpy()
    refuse(
        source, "escaped", wrong, table["escaped"],
        "a run that has several rows is a ramp (one row for each learning rate, in order) and may escape in its last",
        "If run labels are re-used for several conditions or replicas, give each run its own label; "
        "if these are gaps of a replica slot, set start to quasi_stationary",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ provenance


def _fingerprint(table: pd.DataFrame) -> str:
    """A cheap number that changes when a known column of a checked table is edited, reordered or filtered."""
    if not set(COLUMNS) <= set(table.columns):
        return "incomplete"
    total: list[Any] = [len(table)]
    for name in COLUMNS:
        column = table[name]
        if isinstance(column.dtype, pd.CategoricalDtype):
            total += [hash_text("\n".join(map(str, column.cat.categories))), _dot(column.cat.codes.to_numpy())]
        elif column.dtype.kind in "ifb":
            values = column.to_numpy()
            total.append(_dot(values.view(np.int64) if values.dtype == np.float64 else values))
    return hash_text(" ".join(map(str, total)))


def _dot(values: np.ndarray) -> int:
    """Sum of the values weighted by their position, in wrapping integers, a block at a time."""
    block = 1 << 20
    weights = np.arange(1, block + 1, dtype=np.int64)
    total = 0
    for number, start in enumerate(range(0, len(values), block)):
        part = values[start : start + block].astype(np.int64, copy=False)
        total += int(np.dot(part, weights[: len(part)])) * (2 * number + 1)
    return total


def hash_text(text: str) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a text.

    >>> hash_text("m1")
    'ca0df2c95aa144c1'
    """
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _content_digest(table: pd.DataFrame) -> str:
    """SHA-256 of the known columns of a table that is not a file."""
    digest = hashlib.sha256()
    for name in COLUMNS:
        column = table[name].astype(str) if isinstance(table[name].dtype, pd.CategoricalDtype) else table[name]
        digest.update(name.encode())
        digest.update(pd.util.hash_pandas_object(column, index=False).to_numpy().tobytes())
    return digest.hexdigest()
