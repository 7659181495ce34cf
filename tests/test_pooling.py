"""Partial pooling between minima, and settings that are known with an error or not at all."""

import numpy as np
import pandas as pd
import pytest

import escape_inference as ei
from escape_inference.design import make_ramps
from escape_inference.sde import simulate_sde
from escape_inference.worlds import World, make_design

SHORT = {"draws": 300, "warmup": 300}
WORLD = World(noise="loss", dimension=2, barrier="saddle")
DESIGN = make_design(WORLD, minima=6, learning_rates=3, runs=30, seed=3)


@pytest.fixture(scope="module")
def table():
    return simulate_sde(WORLD, DESIGN, seed=3).drop(columns="effective_dimension")


@pytest.fixture(scope="module")
def complete(table):
    # so many draws that the noise of a sensitivity decides no status
    return ei.infer("power_law", table, draws=1000, warmup=300)


@pytest.fixture(scope="module")
def partial(table):
    return ei.infer("power_law", table, pooling="partial", **SHORT)


def test_partial_pooling_gives_a_value_for_each_minimum_and_for_the_population(partial, table):
    posterior = partial["posterior"]
    for name in ("temperature_scale", "effective_dimension", "log_prefactor"):
        assert posterior[f"{name}_by_minimum"].dims == ("chain", "draw", "minimum")
        assert (posterior[f"{name}_spread"] > 0).all()
        assert posterior[name].dims == ("chain", "draw")
    assert set(posterior["minimum"].to_numpy()) == set(table["minimum"])
    scale = posterior["temperature_scale_by_minimum"].to_numpy().reshape(-1, 6)
    low, high = np.quantile(scale, [0.01, 0.99], axis=0)
    assert ((low < 1.0) & (high > 1.0)).all()


def test_minima_whose_curvature_was_measured_wrongly_get_temperature_scales_of_their_own(table):
    wrong = pd.Series(np.exp([-0.6, 0.5, -0.3, 0.6, -0.5, 0.3]), index=table["minimum"].unique())
    # T = α η h*/B and the prefactor see the same h*: only the temperature scale can make up for it
    shifted = table.assign(hessian_minimum=table["hessian_minimum"] * table["minimum"].map(wrong))
    shifted["hessian_saddle"] = shifted["hessian_saddle"] / table["minimum"].map(wrong)
    own = ei.infer("power_law", shifted, pooling="partial", **SHORT)["posterior"]
    one = ei.infer("power_law", shifted, **SHORT)["posterior"]
    scale = np.log(own["temperature_scale_by_minimum"].sel(minimum=wrong.index.to_numpy()))
    z = (scale.mean(("chain", "draw")) + np.log(wrong.to_numpy())) / scale.std(("chain", "draw"))
    assert np.abs(z).max() < 3
    spread = own["temperature_scale_spread"]
    assert float(spread.quantile(0.05)) > 0.15
    assert float(one["discrepancy"].mean()) > 2 * float(own["discrepancy"].mean())


def test_an_error_of_the_curvature_widens_the_temperature_scale_and_the_truth_stays_inside(table, complete):
    rng = np.random.default_rng(0)
    shift = pd.Series(np.exp(0.15 * rng.normal(size=6)), index=table["minimum"].unique())
    noisy = table.assign(hessian_minimum=table["hessian_minimum"] * table["minimum"].map(shift).to_numpy())
    noisy["hessian_minimum_se"] = 0.15 * noisy["hessian_minimum"]
    fit = ei.infer("power_law", noisy, **SHORT)
    true = table.groupby("minimum", sort=False)["hessian_minimum"].first()
    found = fit["posterior"]["hessian_minimum"].sel(minimum=true.index.to_numpy()).to_numpy().reshape(-1, 6)
    z = (np.log(found).mean(axis=0) - np.log(true.to_numpy())) / np.log(found).std(axis=0)
    assert np.abs(z).max() < 4
    assert np.mean(np.log(found).std(axis=0)) < 0.15  # the escapes themselves say something about h*
    scale = fit["posterior"]["temperature_scale"].to_numpy().ravel()
    assert scale.std() > complete["posterior"]["temperature_scale"].to_numpy().std()
    assert np.quantile(scale, 0.005) < 1 < np.quantile(scale, 0.995)


def test_ramps_and_fixed_rates_together_say_more_than_either():
    ramps = simulate_sde(WORLD, make_ramps(DESIGN, levels=6, runs=12), seed=4).drop(columns="effective_dimension")
    fixed = simulate_sde(WORLD, DESIGN.assign(runs=10), seed=5).drop(columns="effective_dimension")
    both = pd.concat([fixed, ramps.assign(run="ramp " + ramps["run"].astype(str))], ignore_index=True)
    both["run"] = both["run"].astype(str)
    fits = [ei.infer("power_law", one, **SHORT) for one in (fixed, ramps, both)]
    width = [float(np.log(fit["posterior"]["temperature_scale"]).std()) for fit in fits]
    assert width[2] < min(width[:2])
    for fit in fits:
        low, high = np.quantile(fit["posterior"]["temperature_scale"], [0.005, 0.995])
        assert low < 1 < high
    found = ei.critical_learning_rates("power_law", fits[2])
    assert list(found["minimum"]) == list(DESIGN["minimum"].unique())
    inside = (found["predicted_q05"] <= found["measured_q95"]) & (found["measured_q05"] <= found["predicted_q95"])
    assert inside.sum() >= 5
    assert ei.critical_learning_rates("power_law", fits[0]).empty


def test_a_pooling_that_does_not_exist_is_refused(table):
    with pytest.raises(ei.InputError, match="pooling is one of complete, partial"):
        ei.infer("power_law", table, pooling="none")


def test_at_one_barrier_the_dimension_trades_off_with_the_prefactor_and_is_said_to():
    design = make_design(WORLD, minima=1, learning_rates=4, runs=60, seed=2)
    known = ei.identifiability(
        ei.infer("power_law", simulate_sde(WORLD, design, seed=2).drop(columns="effective_dimension"), **SHORT)
    )
    n = known.loc["effective_dimension"]
    assert n["status"] in ("combination", "not identified")
    assert n["prior_sensitivity"] > 0.05
    assert "its combination with the prefactor" in n["sentence"]
    assert "a second threshold" in n["sentence"]
    assert known.loc["temperature_scale", "status"] == "identified"


def test_a_table_with_many_barriers_identifies_every_parameter(complete):
    known = ei.identifiability(complete)
    assert list(known.index) == ["temperature_scale", "effective_dimension", "log_prefactor", "discrepancy"]
    assert (known["status"] == "identified").all()
    ratio = complete["posterior"]["temperature"] / complete["posterior"]["log_barrier"]
    sentence = known.loc["effective_dimension", "sentence"]
    assert float(sentence.split("T/ΔU = ")[1].rstrip(".")) == pytest.approx(float(ratio.mean()), rel=0.3)
    assert "leading order" not in known.loc["temperature_scale", "sentence"]
