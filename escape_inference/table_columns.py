"""The columns of the measured table by name, and the one form of every message about a cell."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from escape_inference.errors import InputError

REQUIRED = ("minimum", "run", "learning_rate", "batch_size", "steps", "escaped")
CHOICES = {"barrier": ("saddle", "threshold"), "start": ("minimum", "quasi_stationary")}
COVARIATES = ("loss_minimum", "loss_barrier", "hessian_minimum", "hessian_saddle", "effective_dimension")
ERRORS = tuple(f"{name}_se" for name in COVARIATES)
COUNTS = ("batch_size", "steps", "check_interval")
NUMBERS = ("learning_rate", *COUNTS, *COVARIATES, *ERRORS)
COLUMNS = (*REQUIRED, "check_interval", *CHOICES, *COVARIATES, *ERRORS)
OF_THE_MINIMUM = ("loss_minimum", "hessian_minimum", "effective_dimension")

LARGEST_COUNT = 2.0**53
MEANING = {
    "learning_rate": "the learning rate η of this row",
    "batch_size": "the number of samples of one gradient",
    "steps": "SGD iterations spent in this row",
    "check_interval": "iterations between two looks at the loss",
}


def refuse(
    source: str,
    name: str,
    wrong: Bool[np.ndarray, "row"],
    column: Any,
    rule: str,
    remedy: str | None = None,
) -> None:
    """Raise the message for the rows that break a rule, if there are any."""
    rows = np.flatnonzero(wrong)
    if rows.size == 0:
        return
    shown = rows[:5]
    several = rows.size > 1
    values = ", ".join(show(column.iloc[int(row)]) for row in shown)
    place = f"{'rows' if several else 'row'} {', '.join(str(row + 1) for row in shown)}"
    place += f" (first 5 of {rows.size})" if rows.size > 5 else ""
    advice = remedy or f"Correct or remove the row{'s' if several else ''}"
    raise InputError(
        f"{source}: column {name!r}, {place} (value{'s' if several else ''} {values}): {rule}. {advice}. "
        "Row 1 is the first below the header."
    )


def show(value: Any) -> str:
    """One cell, short."""
    try:
        if (
            value is None
            or value is pd.NA
            or value is pd.NaT
            or (isinstance(value, float) and np.isnan(value))
            or value == ""
        ):
            return "empty"
        text = f"{value:.6g}" if isinstance(value, float) else repr(value) if isinstance(value, str) else str(value)
    except (TypeError, ValueError):
        text = type(value).__name__
    return text.encode("utf-8", "replace").decode()[:40]
