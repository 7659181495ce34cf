"""Cells of a measured table as they come from CSV, Parquet or a data frame, turned into numbers, flags and labels.

Each function takes one pandas column of whatever type and returns the clean values together with masks of the cells
that could not be understood. Columns of a plain type take a vectorised path; mixed or textual columns are read cell
by cell.
"""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

_MISSING = frozenset({"", "na", "n/a", "#n/a", "nan", "-nan", "null", "none", "<na>", "nat"})
_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def as_numbers(column: pd.Series) -> tuple[Float[np.ndarray, "row"], Bool[np.ndarray, "row"]]:
    """Numbers as float64 with NaN for an empty cell, and a mask of the cells that are not a number.

    >>> values, bad = as_numbers(pd.Series(["1e3", "", "many", True], dtype=object))
    >>> values.tolist(), bad.tolist()
    ([1000.0, nan, nan, nan], [False, False, True, True])
    """
    kind = column.dtype
    none = np.zeros(len(column), dtype=bool)
    if isinstance(kind, np.dtype) and kind.kind in "iuf":
        return column.to_numpy().astype(np.float64, copy=False), none
    if _is_real(kind):
        return column.to_numpy(dtype=np.float64, na_value=np.nan), none
    cells = [_number(cell) for cell in _cells(column)]
    return (
        np.array([np.nan if cell is None else cell for cell in cells], dtype=np.float64),
        np.array([cell is None for cell in cells], dtype=bool),
    )


def as_flags(
    column: "pd.Series | None",
) -> tuple[Bool[np.ndarray, "row"], Bool[np.ndarray, "row"], Bool[np.ndarray, "row"]]:
    """Booleans, a mask of the cells that are neither true nor false, and a mask of the empty cells.

    >>> flags, bad, empty = as_flags(pd.Series(["True", "0", "yes", None], dtype=object))
    >>> flags.tolist(), bad.tolist(), empty.tolist()
    ([True, False, False, False], [False, False, True, False], [False, False, False, True])
    """
    assert column is not None
    none = np.zeros(len(column), dtype=bool)
    kind = column.dtype
    if kind == np.dtype(bool):
        return column.to_numpy(), none, none
    if _is_real(kind):
        values, _ = as_numbers(column)
        empty = np.isnan(values)
        return values == 1.0, ~np.isin(values, (0.0, 1.0)) & ~empty, empty
    cells = [_flag(cell) for cell in _cells(column)]
    return (
        np.array([cell is True for cell in cells], dtype=bool),
        np.array([cell == "bad" for cell in cells], dtype=bool),
        np.array([cell is None for cell in cells], dtype=bool),
    )


def as_labels(column: pd.Series, categorical: bool) -> tuple[Any, Bool[np.ndarray, "row"], Bool[np.ndarray, "row"]]:
    """Labels, a mask of the cells that are no label (neither text nor integer), and a mask of the empty cells.

    The labels are a ``Categorical`` of strings when ``categorical`` (empty cells have no category), otherwise integers
    if the column is of an integer type and strings if not.

    >>> labels, bad, empty = as_labels(pd.Series([1, " b ", 2.5, None], dtype=object), categorical=True)
    >>> list(labels.categories), bad.tolist(), empty.tolist()
    (['1', 'b'], [False, False, True, False], [False, False, False, True])
    """
    none = np.zeros(len(column), dtype=bool)
    kind = column.dtype
    if isinstance(kind, np.dtype) and kind.kind in "iu" and (kind.kind == "i" or (column < 2**63).all()):
        if not categorical:
            return column.to_numpy().astype(np.int64, copy=False), none, none
        codes, distinct = pd.factorize(column)
        return pd.Categorical.from_codes(codes, categories=pd.Index([str(label) for label in distinct])), none, none
    if isinstance(kind, pd.StringDtype) and not categorical:
        missing = column.isna().to_numpy() | (column == "").fillna(False).to_numpy(dtype=bool)
        return column, none, missing
    if categorical:
        return _as_categories(column)
    cells = [_label(cell) for cell in _cells(column)]
    bad = np.array([cell is None for cell in cells], dtype=bool)
    empty = np.array([cell == "" for cell in cells], dtype=bool)
    return pd.Series([cell or "" for cell in cells], dtype="str"), bad, empty


def _as_categories(column: pd.Series) -> tuple[pd.Categorical, np.ndarray, np.ndarray]:
    """Read each distinct value once."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        codes, levels = column.cat.codes.to_numpy(), list(column.cat.categories)
    elif isinstance(column.dtype, pd.StringDtype):
        codes, distinct = pd.factorize(column)
        levels = list(distinct)
    else:
        levels = list(_cells(column))
        codes = np.arange(len(levels))
    texts = [_label(level) for level in levels]
    clean = isinstance(column.dtype, pd.CategoricalDtype) and all(texts) and texts == levels
    if clean and codes.min(initial=0) >= 0 and np.bincount(codes, minlength=len(levels)).all():
        none = np.zeros(len(column), dtype=bool)
        labels = pd.Categorical.from_codes(codes, categories=pd.Index(levels, dtype="str"), validate=False)
        return labels, none, none
    ordered = list(dict.fromkeys(text for text in texts if text))
    place = {text: position for position, text in enumerate(ordered)}
    # one more entry at the end, so that the code -1 of an empty cell finds it
    target = np.array([place.get(text or "", -1) for text in texts] + [-1], dtype=np.int64)
    wrong = np.array([text is None for text in texts] + [False], dtype=bool)
    blank = np.array([text == "" for text in texts] + [True], dtype=bool)
    return (
        pd.Categorical.from_codes(target[codes], categories=pd.Index(ordered, dtype="str")),
        wrong[codes],
        blank[codes],
    )


def _is_real(kind: Any) -> bool:
    """A real number type of numpy, pandas or Arrow, and not a boolean, a date or a decimal."""
    try:
        return bool(pd.api.types.is_integer_dtype(kind) or pd.api.types.is_float_dtype(kind))
    except (TypeError, NotImplementedError):
        return False


def _cells(column: pd.Series) -> list[Any]:
    return column.astype(object).tolist()


def _missing(cell: Any) -> bool:
    return (
        cell is None
        or cell is pd.NA
        or cell is pd.NaT
        or (isinstance(cell, float | np.floating) and bool(np.isnan(cell)))
    )


def _number(cell: Any) -> float | None:
    """NaN for an empty cell, None for a cell that is no number."""
    if _missing(cell):
        return float("nan")
    if isinstance(cell, bool | np.bool_):
        return None
    if isinstance(cell, str):
        text = cell.strip()
        if text.lower() in _MISSING:
            return float("nan")
        cell = text.replace("_", "?")
    elif not hasattr(cell, "__float__") or (hasattr(cell, "__array__") and getattr(cell, "ndim", False)):
        return None
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None
    except OverflowError:
        return float("inf")


def _flag(cell: Any) -> bool | str | None:
    """True, False, None for an empty cell, "bad" for anything else."""
    if _missing(cell):
        return None
    if isinstance(cell, bool | np.bool_):
        return bool(cell)
    if isinstance(cell, str):
        text = cell.strip().lower()
        return None if text in _MISSING else _FLAGS.get(text, "bad")
    if isinstance(cell, int | float | np.integer | np.floating) and cell in (0, 1):
        return bool(cell)
    return "bad"


def _label(cell: Any) -> str | None:
    """The text of a label, "" for an empty cell, None for a cell that is no label."""
    if _missing(cell):
        return ""
    if isinstance(cell, bool | np.bool_):
        return None
    if isinstance(cell, float | np.floating):
        return str(int(cell)) if np.isfinite(cell) and cell == int(cell) else None
    if not isinstance(cell, str | int | np.integer):
        return None
    text = str(cell).strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text
