"""Units of a law's parameters, and the same conditions in other units of time and loss."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from escape_inference.law import Law, Parameter, Setting

_FACTOR = re.compile(r"(loss|time|1)(?:\^(-?\d+(?:\.\d+)?))?")
_LOSSES, _RATES, _TIMES = ("loss_minimum", "loss_barrier"), ("hessian_minimum", "hessian_saddle"), ("learning_rate",)


class UnitError(ValueError):
    """A unit that is no product of powers of loss and time."""


def unit_factor(unit: str, time: float, loss: float) -> float:
    """By what the number changes that a quantity has when times become ``time`` and losses ``loss`` times larger numbers.

    >>> unit_factor("loss/time", 2.0, 10.0), unit_factor("1", 2.0, 10.0), unit_factor("loss^2 * time", 2.0, 10.0)
    (5.0, 1.0, 200.0)
    """
    result = 1.0
    for place, part in enumerate(unit.replace("**", "^").split("/")):
        for word in part.replace("·", "*").split("*"):
            match = _FACTOR.fullmatch(word.strip())
            if match is None:
                raise UnitError(unit)
            base = {"loss": loss, "time": time, "1": 1.0}[match[1]]
            result *= base ** (float(match[2] or 1) * (-1 if place else 1))
    return result


def rescaled_values(law: Law, values: Mapping[str, Any], time: float, loss: float) -> dict[str, Any]:
    """The law's parameters in other units."""
    units = {p.name: p.unit for p in law.parameters}
    return {name: value * unit_factor(units[name], time, loss) for name, value in values.items()}


def rescaled_settings(setting: Setting, time: float, loss: float) -> Setting:
    """The same conditions in other units."""
    return dataclasses.replace(
        setting,
        learning_rate=setting.learning_rate * time,
        hessian_minimum=setting.hessian_minimum / time,
        hessian_saddle=setting.hessian_saddle / time,
        loss_minimum=setting.loss_minimum * loss,
    )


def median_in_units(parameter: Parameter, frame: pd.DataFrame, time: float, loss: float) -> tuple[float, float]:
    """A prior's median for the conditions in other units, and what it should be by the parameter's unit.

    A median that is a plain number is taken to be known in the units of the data; so is every median if no loss is measured.
    """
    here = parameter.median_for(frame)
    if not callable(parameter.median):
        return here, here
    loss = 1.0 if frame[list(_LOSSES)].isna().all(axis=None) else loss
    scales = dict.fromkeys(_LOSSES, loss) | dict.fromkeys(_RATES, 1 / time) | dict.fromkeys(_TIMES, time)
    scaled = frame.assign(**{name: frame[name] * scale for name, scale in scales.items() if name in frame})
    return parameter.median_for(scaled), here * unit_factor(parameter.unit, time, loss)
