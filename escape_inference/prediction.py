"""What a fitted law says about settings that were not measured: rates at other learning rates, and critical learning rates.

A ramp holds the learning rate at level after level; under any law a run survives level j with probability ``exp(−η_j κ(η_j) k_j)``. The
critical learning rate is where half of the runs have jumped. Ramps and fixed learning rates are one likelihood, so a law fitted to either
predicts both (the statistics of force spectroscopy: Evans and Ritchie 1997; Dudko, Hummer and Szabo 2006). Beside it stand the stability limit
of the power law, ``η_c = 2 B/((n − 2) α h*)`` (Mori et al. 2022), and the limit of gradient descent, ``2/h*``.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from escape_inference.law import Law, Setting, load_law
from escape_inference.passage_table import tables_for
from escape_inference.precision import float64

DRAWS = 200  #: posterior draws that predictions use
EXTENSION = 12  #: levels beyond the highest one that was visited
QUANTILES = (0.05, 0.5, 0.95)


@float64
def predict_log_rates(
    law: str | Path | Law,
    fit: xr.DataTree,
    condition: Sequence[int],
    learning_rate: Float[np.ndarray, " setting"],
    *,
    draws: int = DRAWS,
    discrepancy: bool = True,
    seed: int = 0,
) -> Float[np.ndarray, "draw setting"]:
    """Natural log rates at the settings of measured conditions, but for the learning rate.

    Args:
        law: the law that was fitted.
        fit: its posterior.
        condition: position of the condition whose other settings are taken, one for each new setting.
        learning_rate: η of the new settings.
        draws: number of posterior draws used, evenly spaced.
        discrepancy: whether every new setting gets a discrepancy of its own.
        seed: of the discrepancies.

    Returns:
        ``log κ`` per unit time at each draw and setting.
    """
    law, where = load_law(law), np.asarray(condition, int)
    posterior, constant = fit["posterior"], fit["constant_data"]
    total = posterior.sizes["chain"] * posterior.sizes["draw"]
    chosen = np.linspace(0, total - 1, min(draws, total)).astype(int)
    minima = list(posterior["minimum"].to_numpy()) if "minimum" in posterior.coords else []
    of_minimum = np.array([minima.index(m) if minima else 0 for m in constant["condition_minimum"].to_numpy()])[where]

    def drawn(name: str) -> np.ndarray:
        value = posterior[name]
        array = value.to_numpy().reshape(total, -1)[chosen]
        index = of_minimum if "minimum" in value.dims else where if "condition" in value.dims else 0 * where
        return array[:, index]

    def setting(name: str) -> np.ndarray:
        if name in posterior:
            return drawn(name)
        source = constant[f"measured_{name}"] if f"measured_{name}" in constant else constant[name]
        return np.broadcast_to(source.to_numpy()[where], (len(chosen), len(where)))

    values = {}
    for p in law.parameters:
        by_minimum = f"{p.name}_by_minimum"
        name = by_minimum if by_minimum in posterior else p.name
        if name in posterior:
            values[p.name] = drawn(name)
    log_prefactor = drawn("log_prefactor_by_minimum" if "log_prefactor_by_minimum" in posterior else "log_prefactor")
    arrays = {
        "batch_size": setting("batch_size"),
        "check_interval": setting("check_interval"),
        "loss_minimum": setting("loss_minimum"),
        "log_barrier": drawn("log_barrier"),
        "hessian_minimum": setting("hessian_minimum"),
        "hessian_saddle": setting("hessian_saddle"),
        "learning_rate": np.broadcast_to(learning_rate, (len(chosen), len(where))),
    }
    barrier, start = (constant[name].to_numpy()[where] for name in ("barrier", "start"))
    result = np.empty((len(chosen), len(where)))
    for kind in dict.fromkeys(zip(barrier, start, strict=True)):
        part = (barrier == kind[0]) & (start == kind[1])
        here = Setting(
            **{name: jnp.asarray(x[:, part].ravel()) for name, x in arrays.items()},
            barrier=str(kind[0]),  # type: ignore[arg-type]
            start=str(kind[1]),  # type: ignore[arg-type]
        )
        here = replace(here, passage=tables_for(law, [(here, 0.0)], only_shipped=True).get(here.start))
        flat = {name: jnp.asarray(x[:, part].ravel()) for name, x in values.items()}
        rates = jnp.broadcast_to(law.log_rate(flat, here), here.learning_rate.shape)
        result[:, part] = np.asarray(rates).reshape(len(chosen), -1)
    if discrepancy:
        noise = np.random.default_rng(seed).normal(size=result.shape)
        result += drawn("discrepancy") * noise
    return result + log_prefactor


def critical_learning_rates(law: str | Path | Law, fit: xr.DataTree, *, seed: int = 0) -> pd.DataFrame:
    """Measured and predicted critical learning rates of the ramps in the data of a fit.

    Args:
        law: the law that was fitted.
        fit: its posterior.
        seed: of the discrepancies and of the measured intervals.

    Returns:
        One row for each ramp: ``minimum``, ``batch_size``, ``runs``, ``jumped``; the η at which half of the runs have jumped, ``measured``
        with ``measured_q05`` and ``measured_q95`` (Bayesian bootstrap of the runs; infinite where fewer than half jumped)
        and ``predicted`` with its 90 % band; ``stability_limit`` 2 B/((n − 2) α h*) with its band (infinite for n ≤ 2, NaN for laws without
        n) and ``gradient_descent_limit`` 2/h*. Empty if no run of the data is a ramp.
    """
    constant = fit["constant_data"]
    names = [str(name) for name, value in constant.data_vars.items() if value.dims == ("condition",)]
    frame = pd.DataFrame({name: constant[name].to_numpy() for name in names}).assign(
        minimum=constant["condition_minimum"].to_numpy(), escapes=fit["observed_data"]["escapes"].to_numpy()
    )
    frame = frame[frame["ramp"].astype(bool)]
    rng, rows = np.random.default_rng(seed), []
    keys = ["minimum", "batch_size", "barrier", "start", "loss_barrier", "check_interval"]
    for key, levels in frame.groupby(keys, dropna=False, sort=False):
        levels = levels.sort_values("learning_rate")
        eta, runs, escapes = (levels[name].to_numpy(float) for name in ("learning_rate", "runs", "escapes"))
        chance = rng.beta(np.maximum(escapes, 1e-9), np.maximum(runs - escapes, 1e-9), size=(2000, len(eta)))
        chance = np.where(escapes == 0, 0.0, np.where(escapes == runs, 1.0, chance))
        measured = _crossing(eta, np.minimum(-np.log1p(-np.minimum(chance, 1 - 1e-15)), 30.0))
        step = eta[-1] / eta[-2] if len(eta) > 1 else 1.3
        grid = np.concatenate([eta, eta[-1] * step ** np.arange(1, EXTENSION + 1)])
        base = [int(levels.index[0])] * len(grid)
        held = _held(levels)
        held = np.concatenate([held, np.repeat(held[-1], EXTENSION)])
        hazard = np.exp(np.minimum(predict_log_rates(law, fit, base, grid, seed=seed), 50.0)) * grid * held
        predicted = _crossing(grid, hazard)
        row = {"minimum": key[0], "batch_size": key[1], "runs": int(runs.max()), "jumped": int(escapes.sum())}
        for name, values in (
            ("measured", measured),
            ("predicted", predicted),
            ("stability_limit", _limit(fit, base[0])),
        ):
            low, middle, high = np.quantile(values, QUANTILES, method="nearest")
            row |= {name: middle, f"{name}_q05": low, f"{name}_q95": high}
        rows.append(row | {"gradient_descent_limit": float(2 / np.median(_curvature(fit, base[0])))})
    return pd.DataFrame(rows)


def _held(levels: pd.DataFrame) -> Float[np.ndarray, " level"]:
    """Iterations for which each level of a ramp is held, as the runs that survived it show.

    Where every run jumped, the level was held at least as long as the longest run, and otherwise like the level before it.

    >>> _held(pd.DataFrame({"runs": [9, 7, 4], "escapes": [2, 3, 4], "longest": [5000, 200, 90]})).tolist()
    [5000.0, 200.0, 200.0]
    """
    survived, longest = (levels["runs"] > levels["escapes"]).to_numpy(), levels["longest"].to_numpy(float)
    before = pd.Series(np.where(survived, longest, np.nan)).ffill().to_numpy()
    return np.where(survived, longest, np.fmax(longest, before))


def _crossing(eta: Float[np.ndarray, " level"], hazard: Float[np.ndarray, "draw level"]) -> Float[np.ndarray, " draw"]:
    """η at which the cumulative hazard of a ramp reaches log 2, linear within a level; ∞ if it never does."""
    total = np.cumsum(hazard, axis=1)
    reached = total >= np.log(2.0)
    level = np.argmax(reached, axis=1)
    rows = np.arange(len(total))
    before = total[rows, level] - hazard[rows, level]
    share = np.clip((np.log(2.0) - before) / np.maximum(hazard[rows, level], 1e-300), 0.0, 1.0)
    lower = np.where(level > 0, eta[np.maximum(level - 1, 0)], eta[0] ** 2 / eta[min(1, len(eta) - 1)])
    return np.where(reached.any(axis=1), lower + share * (eta[level] - lower), np.inf)


def _curvature(fit: xr.DataTree, condition: int) -> np.ndarray:
    posterior, constant = fit["posterior"], fit["constant_data"]
    minimum = constant["condition_minimum"].to_numpy()[condition]
    if "hessian_minimum" in posterior:
        return posterior["hessian_minimum"].sel(minimum=minimum).to_numpy().ravel()
    return constant["measured_hessian_minimum"].to_numpy()[condition : condition + 1]


def _limit(fit: xr.DataTree, condition: int) -> np.ndarray:
    """Draws of 2 B/((n − 2) α h*)."""
    posterior, constant = fit["posterior"], fit["constant_data"]
    if "effective_dimension" not in posterior or "temperature_scale" not in posterior:
        return np.array([np.nan])

    def of_minimum(name: str) -> np.ndarray:
        value = posterior[f"{name}_by_minimum" if f"{name}_by_minimum" in posterior else name]
        if "minimum" in value.dims:
            value = value.sel(minimum=constant["condition_minimum"].to_numpy()[condition])
        return value.to_numpy().ravel()

    n, scale = of_minimum("effective_dimension"), of_minimum("temperature_scale")
    batch = float(constant["batch_size"].to_numpy()[condition])
    with np.errstate(divide="ignore"):
        return np.where(n > 2, 2 * batch / (np.maximum(n - 2, 0) * scale * _curvature(fit, condition)), np.inf)
