"""Critical learning rates of ramps, from posteriors that know the truth."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from escape_inference.conditions import aggregate
from escape_inference.design import make_ramps
from escape_inference.law import load_law
from escape_inference.prediction import critical_learning_rates
from escape_inference.simulation import law_log_rate, simulate
from escape_inference.worlds import World, make_design

LAW = load_law("power_law")
TRUTH = {"temperature_scale": 1.2, "effective_dimension": 3.4}
RAMPS = make_ramps(make_design(World(dimension=3), minima=3, learning_rates=3, runs=2000, seed=1), levels=6)


def posterior_at_the_truth(table: pd.DataFrame) -> xr.DataTree:
    """What a fit of a table would return if its four draws were all the truth."""
    frame = aggregate(table.drop(columns="effective_dimension", errors="ignore")).frame
    names = ("learning_rate", "batch_size", "check_interval", "loss_barrier", "hessian_saddle", "runs", "longest")
    constant = {name: frame[name].to_numpy() for name in (*names, "barrier", "start", "ramp")}
    constant |= {f"measured_{name}": frame[name].to_numpy() for name in ("loss_minimum", "hessian_minimum")}
    one = np.ones((2, 2))
    scalars = TRUTH | {"log_prefactor": 0.0, "discrepancy": 0.0}
    posterior = xr.Dataset({name: (("chain", "draw"), value * one) for name, value in scalars.items()})
    log_barrier = np.log(frame["loss_barrier"] / frame["loss_minimum"]).to_numpy()
    posterior["log_barrier"] = (("chain", "draw", "condition"), one[..., None] * log_barrier)
    where = {"condition": frame["condition"], "condition_minimum": ("condition", frame["minimum"])}
    return xr.DataTree.from_dict(
        {
            "posterior": posterior,
            "constant_data": xr.Dataset({name: ("condition", x) for name, x in constant.items()}, coords=where),
            "observed_data": xr.Dataset({"escapes": ("condition", frame["escapes"].to_numpy())}),
        }
    )


def true_critical_learning_rates(ramps: pd.DataFrame) -> list[float]:
    """η at which the cumulative hazard is log 2; within a level it rises from the η of the level before."""
    ramps = ramps.reset_index(drop=True)
    hazard = np.exp(law_log_rate(LAW, ramps, TRUTH, "saddle")) * ramps["learning_rate"] * ramps["max_steps"]
    found = []
    for _, rows in ramps.groupby("minimum", sort=False):
        eta = rows["learning_rate"].to_numpy()
        ends = np.concatenate([[0.0], np.cumsum(hazard[rows.index])])
        found.append(float(np.interp(np.log(2), ends, np.concatenate([[eta[0] ** 2 / eta[1]], eta]))))
    return found


@pytest.mark.parametrize("longer", [1, 4, 20])
def test_critical_learning_rates_are_the_true_ones_however_long_the_first_level_is_held(longer: int) -> None:
    ramps = RAMPS.copy()
    ramps.loc[~ramps.duplicated("minimum"), "max_steps"] *= longer
    table = simulate("power_law", ramps, TRUTH, seed=3)
    found = critical_learning_rates(LAW, posterior_at_the_truth(table))
    true = true_critical_learning_rates(ramps)
    assert found["predicted"].tolist() == pytest.approx(true, rel=1e-3)
    assert (found["measured_q05"] < found["measured_q95"]).all()
    assert found["measured"].tolist() == pytest.approx(true, rel=0.03)
    assert found["runs"].tolist() == [2000] * 3
    assert found["jumped"].tolist() == table.groupby("minimum", sort=False)["escaped"].sum().tolist()
