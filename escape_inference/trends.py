"""Trends that a law leaves behind: residual log rates against ΔU/T, B/η and c, with a calibrated test.

The discrepancies δ of a draw from the posterior are, averaged over data and prior, independent normal variables of standard deviation σ: so is
every projection of δ/σ, whatever the law's parameters have absorbed, and the chance of a straight or bent trend at least as large is uniform
(Johnson, Biometrika 94, 719 (2007); Gosselin, PLoS ONE 6, e14770 (2011)). Twice the mean of these chances over all draws is a valid p-value
whatever their dependence (Rüschendorf 1982; Vovk and Wang, Biometrika 107, 791 (2020)), and errs on the side of silence.
"""

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from scipy.special import chdtrc

LEVEL = 0.01  #: below it a trend is announced
FEWEST = 5  #: conditions that a test needs
VARIABLES = {"barrier_over_temperature": "ΔU/T", "batch_size_over_learning_rate": "B/η", "barrier_ratio": "c"}


def residual_trends(fit: xr.DataTree) -> pd.DataFrame:
    """Is what a law misses a function of the settings?

    Args:
        fit: what :func:`escape_inference.infer` returns.

    Returns:
        One row for each of ΔU/T, B/η and c (index ``variable``): ``slope`` of the mean residual log rate against the variable (in its
        standard deviations), ``bend`` (coefficient of the second orthonormal polynomial), ``p_value`` (NaN where there are too few
        different values) and ``trend``, true below 0.01.
    """
    posterior, constant = fit["posterior"], fit["constant_data"]
    draws = (-1, posterior.sizes["condition"])
    residual = posterior["log_rate_residual"].to_numpy().reshape(draws)
    discrepancy = posterior["discrepancy"].to_numpy().reshape(-1, 1)
    log_barrier = np.median(posterior["log_barrier"].to_numpy().reshape(draws), axis=0)
    temperature = np.median(posterior["temperature"].to_numpy().reshape(draws), axis=0)
    values = {
        "barrier_over_temperature": log_barrier / temperature,
        "batch_size_over_learning_rate": (constant["batch_size"] / constant["learning_rate"]).to_numpy(),
        "barrier_ratio": np.exp(log_barrier),
    }
    rows = {name: trend(residual, discrepancy, value) for name, value in values.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("variable")


def trend(
    residual: Float[np.ndarray, "draw condition"],
    discrepancy: Float[np.ndarray, "draw 1"],
    variable: Float[np.ndarray, " condition"],
) -> dict[str, Any]:
    """One row of :func:`residual_trends`: draws of δ and of σ against the logarithm of a positive variable.

    >>> rng, x = np.random.default_rng(0), np.geomspace(1, 9, 40)
    >>> noise = rng.normal(size=(300, 40))
    >>> trend(noise, np.ones((300, 1)), x)["trend"], trend(noise + 2 * np.log(x), np.ones((300, 1)), x)["trend"]
    (False, True)
    """
    basis = _polynomials(np.log(variable))
    if basis is None:
        return {"slope": np.nan, "bend": np.nan, "p_value": np.nan, "trend": False}
    projection = (residual / discrepancy) @ basis
    chance = chdtrc(basis.shape[1], np.sum(projection**2, axis=1))
    p_value = float(min(1.0, 2 * chance.mean()))
    size = residual.mean(axis=0) @ basis / np.sqrt(len(basis))
    return {
        "slope": float(size[0]),
        "bend": float(size[1]) if len(size) > 1 else np.nan,
        "p_value": p_value,
        "trend": p_value < LEVEL,
    }


def trend_sentence(trends: pd.DataFrame) -> str:
    """What to say of the trends that a law leaves; empty if it leaves none.

    >>> rows = {"p_value": [0.5, 0.002], "trend": [False, True]}
    >>> trend_sentence(pd.DataFrame(rows, index=["barrier_ratio", "barrier_over_temperature"]))
    'its residual log rates have a trend against ΔU/T (p = 0.002)'
    """
    found = [f"{VARIABLES[str(name)]} (p = {row['p_value']:.1g})" for name, row in trends.iterrows() if row["trend"]]
    return f"its residual log rates have a trend against {' and '.join(found)}" if found else ""


def _polynomials(x: np.ndarray) -> np.ndarray | None:
    """Orthonormal polynomials of degree 1 and 2 (as far as the values differ), columns; None if nothing can be tested."""
    distinct = len(np.unique(np.round(x - x.mean(), 9)))
    if len(x) < FEWEST or distinct < 2 or not np.isfinite(x).all():
        return None
    scaled = (x - x.mean()) / x.std()
    q, _ = np.linalg.qr(np.stack([scaled**k for k in range(min(3, distinct))], axis=1))
    return q[:, 1:] * np.sign(scaled @ q[:, 1])
