"""What the posterior of a law says about its parameters, and whether it agrees with the law's own theory."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from escape_inference.model import MEAN_SPREAD
from escape_inference.trends import trend_sentence

if TYPE_CHECKING:
    from escape_inference.inference import Fit

MOVED_SHRINKAGE = 0.8
MOVED_SHIFT = 1.0
ROUNDING = 1e-9  #: of an interval without width


def parameter_summary(fit: "Fit") -> dict[str, dict[str, Any]]:
    """Mean, sd and 90 % interval of every parameter, beside its prior and the value of the theory.

    Among them are n of the minima for which it was not measured, where the data carry it for others, and with partial pooling the
    spreads between minima.

    ``moved_by_data`` is true when the posterior sd (of the logarithm, for positive parameters) is below 0.8 of the prior's, or the
    posterior mean lies more than one prior sd from the prior's. ``contains_theory`` refers to the 90 % interval.
    """
    problem = fit.problem
    inputs = problem.inputs
    rows = {}
    for p in problem.law.parameters_for(inputs.barriers):
        median, names = float(inputs.medians[p.name]), [p.name]
        if p.name == "effective_dimension" and inputs.dimension_carried != "none":
            rows[p.name] = _measured_dimension(fit)
            names = ["effective_dimension_unmeasured"] if inputs.dimension_carried == "some" else []
        center = np.log(median) if p.positive else median
        prior_sd = median * np.exp(p.width**2 / 2) * np.sqrt(np.expm1(p.width**2)) if p.positive else p.width
        for name in names:
            rows[name] = _row(fit.sites[name], center, p.width, p.positive, prior_sd, p.theory)
    rows["log_prefactor"] = _row(fit.sites["log_prefactor"], 0.0, 1.0, False, 1.0, 0.0)
    for name in inputs.pooled:
        if (spread := f"{name}_spread") in fit.sites:
            center = np.log(MEAN_SPREAD) - np.euler_gamma  # mean of the logarithm of an exponential variable
            rows[spread] = _row(fit.sites[spread], center, np.pi / np.sqrt(6), True, MEAN_SPREAD, None)
    return rows


def law_sentence(entry: dict[str, Any], trends: pd.DataFrame) -> str:
    """What the winner's posterior adds to the verdict: the size of its error, parameters that contradict its theory, trends."""
    off = [
        f"{name} {row['mean']:.2f} [{row['q05']:.2f}, {row['q95']:.2f}] excludes the theory's {row['theory']:g}"
        for name, row in entry["parameters"].items()
        if row["contains_theory"] is False
    ]
    text = f"; it misses the rates by a typical factor of {np.exp(entry['discrepancy']['mean']):.2f}"
    text += "; but it disagrees with its own theory: " + ", ".join(off) if off else ""
    left = trend_sentence(trends)
    return text + (f"; but {left}" if left else "")


def jsonable(value: Any) -> Any:
    """The same value in types that JSON knows; numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value


def _row(
    values: np.ndarray, center: float, width: float, positive: bool, prior_sd: float, theory: float | None
) -> dict[str, Any]:
    scale = np.log(values) if positive else values
    moved = scale.std() < MOVED_SHRINKAGE * width or abs(scale.mean() - center) > MOVED_SHIFT * width
    return _described(values, prior_sd, bool(moved), theory)


def _described(values: np.ndarray, prior_sd: float, moved: bool, theory: float | None) -> dict[str, Any]:
    low, high = np.quantile(values, [0.05, 0.95])
    return {
        "mean": values.mean(),
        "sd": values.std(),
        "q05": low,
        "q95": high,
        "prior_sd": prior_sd,
        "moved_by_data": moved,
        "theory": theory,
        "contains_theory": None if theory is None else bool(low - ROUNDING <= theory <= high + ROUNDING),
    }


def _measured_dimension(fit: "Fit") -> dict[str, Any]:
    """Mean over the minima of n, which the data carry; its prior is the measurement with its error."""
    measured, known = (
        fit.problem.inputs.measured["effective_dimension"],
        np.asarray(fit.problem.inputs.dimension_measured),
    )
    values = fit.sites["effective_dimension"][..., known].mean(axis=-1)
    center, spread = np.exp(np.asarray(measured.center))[known], np.asarray(measured.spread)[known]
    prior_sd = float(np.sqrt(np.sum((center * spread) ** 2)) / len(center))
    theory = float(center.mean())
    moved = prior_sd > 0 and (values.std() < MOVED_SHRINKAGE * prior_sd or abs(values.mean() - theory) > prior_sd)
    return _described(values, prior_sd, bool(moved), theory)
