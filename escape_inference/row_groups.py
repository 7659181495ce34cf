"""Rows that belong together: equal in several columns, or levels of one ramp."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int


def combined_codes(*columns: Any) -> Int[np.ndarray, "row"]:
    """One integer for each row, equal for two rows exactly when they agree in every column (NaN equals NaN).

    >>> combined_codes(np.array([1.0, 2.0, 1.0, np.nan, np.nan]), np.array([5, 5, 5, 5, 6])).tolist()
    [0, 2, 0, 4, 5]
    """
    key: np.ndarray | None = None
    size = 1
    for column in columns:
        codes, levels = _codes(column)
        if levels == 1:
            continue
        if key is None:
            key, size = codes.astype(np.int64), levels
            continue
        if size > 2**62 // levels:
            key, distinct = pd.factorize(key)
            size = len(distinct)
        key *= levels
        key += codes
        size *= levels
    return np.zeros(len(columns[0]), dtype=np.int64) if key is None else key


def first_rows(codes: Int[np.ndarray, "row"], count: int) -> Int[np.ndarray, "code"]:
    """Position of the first row of each of the codes 0 to ``count`` − 1, all of which occur.

    >>> first_rows(np.array([1, 0, 1, 0]), 2).tolist()
    [1, 0]
    """
    first = np.full(count, len(codes), dtype=np.int64)
    block = 1 << 20
    for start in range(0, len(codes), block):
        part = codes[start : start + block]
        if (first == len(codes)).any():
            found = np.full(count, len(codes), dtype=np.int64)
            found[part[::-1]] = np.arange(start + len(part) - 1, start - 1, -1)
            first = np.minimum(first, found)
    return first


def ramp_codes(table: pd.DataFrame) -> tuple[Bool[np.ndarray, "row"], Int[np.ndarray, "row"]]:
    """Which rows are levels of a ramp, and an integer that names the ramp (−1 outside of one).

    Rows of one run (the same ``minimum``, ``run``, ``batch_size``, ``barrier``, ``loss_barrier``) that started at the
    minimum are one ramp when there are several of them. Gaps of a replica slot (``start`` quasi-stationary) are not.

    A ramp that jumped at its first level has one row. Runs of one row at the first level of other ramps are such ramps when
    all of them escaped while those ramps held that level; if one went on for longer, or did not escape, they are runs at a
    fixed learning rate. Told apart, the runs of that level would be sorted by whether they escaped.

    >>> from escape_inference.table import read_measurements
    >>> table = read_measurements(pd.DataFrame({
    ...     "minimum": "m1", "run": [1, 1, 2], "learning_rate": [0.05, 0.06, 0.05], "batch_size": 8,
    ...     "steps": [500, 20, 300], "escaped": [False, True, True]}))
    >>> ramp_codes(table)[0].tolist()
    [True, True, True]
    >>> ramp_codes(read_measurements(table.assign(steps=[500, 20, 700])))[0].tolist()
    [True, True, False]
    """
    names = np.full(len(table), -1, dtype=np.int64)
    from_minimum = (table["start"] == "minimum").to_numpy()
    everything = bool(from_minimum.all())
    part = table if everything else table.loc[from_minimum]
    if len(part):
        key = combined_codes(*(part[name] for name in ("minimum", "batch_size", "barrier", "loss_barrier", "run")))
        ordered = np.sort(key)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if repeated.size:
            inside = pd.Series(key).duplicated(keep=False).to_numpy()
            inside = inside | _jumped_at_first_level(part, key, inside)
            found = np.full(len(part), -1, dtype=np.int64)
            found[inside] = pd.factorize(key[inside])[0]
            names[from_minimum] = found
    return names >= 0, names


def _jumped_at_first_level(
    part: pd.DataFrame, key: Int[np.ndarray, "row"], inside: Bool[np.ndarray, "row"]
) -> Bool[np.ndarray, "row"]:
    """Runs of one row that are ramps, among rows from the minimum; ``inside`` are rows of runs with several."""
    names = ("minimum", "batch_size", "barrier", "loss_barrier", "check_interval", "learning_rate")
    place = pd.factorize(combined_codes(*(part[name] for name in names)))[0]
    steps, first = part["steps"].to_numpy(), inside & ~pd.Series(key).duplicated().to_numpy()
    held = np.zeros(place.max() + 1, dtype=np.int64)  # iterations at each first level, 0 at other settings
    np.maximum.at(held, place[first], steps[first])
    fixed = np.zeros(len(held), dtype=bool)
    fixed[place[~inside & ~(part["escaped"].to_numpy() & (steps <= held[place]))]] = True
    return ~inside & ~fixed[place]


def _codes(column: Any) -> tuple[np.ndarray, int]:
    """Integer codes of one column and the number of values they can take (the codes are left out if that is 1)."""
    if isinstance(column, pd.Series) and isinstance(column.dtype, pd.CategoricalDtype):
        return column.cat.codes.to_numpy(), max(len(column.cat.categories), 1)
    values = column.to_numpy() if isinstance(column, pd.Series) else np.asarray(column)
    if values.dtype == bool:
        return values, 2
    if values.dtype.kind == "i" and values.size:
        low, high = int(values.min()), int(values.max())
        if high - low < 2**40:
            return values if low == 0 else values - low, high - low + 1
    elif (
        values.dtype.kind == "f"
        and values.size
        and (np.isnan(values) if np.isnan(values[0]) else values == values[0]).all()
    ):
        return np.zeros(0, dtype=np.int64), 1
    codes, distinct = pd.factorize(column if values.dtype == object else values, use_na_sentinel=False)
    return codes, max(len(distinct), 1)
