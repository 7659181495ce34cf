"""From a table to a verdict, on worlds whose law is known because an equation of motion was stepped, not a likelihood sampled."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from escape_inference import workers
from escape_inference.comparison import compare
from escape_inference.errors import InputError
from escape_inference.sde import simulate_sde
from escape_inference.simulation import simulate_slide
from escape_inference.workers import processors
from escape_inference.worlds import World, make_design

LAWS = ["power_law", "arrhenius"]
SHORT = {"draws": 500, "warmup": 300}
STRENGTH = 0.03
GROUPS = {
    *("posterior", "prior", "posterior_predictive", "log_likelihood", "sample_stats", "observed_data", "constant_data"),
}


def world_table(noise, barrier, seed=3, minima=10):
    world = World(noise=noise, noise_strength=STRENGTH if noise == "uniform" else None, dimension=2, barrier=barrier)
    start = "minimum" if barrier == "saddle" else "quasi_stationary"
    design = make_design(world, minima=minima, learning_rates=3, runs=30, start=start, seed=seed)
    return simulate_sde(world, design, seed=seed)


@pytest.fixture(scope="module")
def power_at_saddles():
    return compare(world_table("loss", "saddle").drop(columns="effective_dimension"), LAWS, **SHORT)


def test_noise_proportional_to_the_loss_gives_the_power_law_at_saddles(power_at_saddles):
    assert power_at_saddles.verdict == "power_law", power_at_saddles.reason
    row = power_at_saddles.report["laws"]["power_law"]["parameters"]["effective_dimension"]
    assert row["q05"] < 2 < row["q95"]
    assert row["moved_by_data"]


def test_processes_find_what_threads_find(power_at_saddles, monkeypatch):
    monkeypatch.setattr(workers, "processors", lambda: processors()[:1] * 2)
    said = []
    with workers.Workers(2) as pool:
        assert len(pool.all) == 2
        table = world_table("loss", "saddle").drop(columns="effective_dimension")
        found = compare(table, LAWS, **SHORT, workers=pool, progress=said.append)
    assert {"power_law: sampling", "arrhenius: sampling"} <= set(said)
    assert found.verdict == power_at_saddles.verdict
    assert found.reason == power_at_saddles.reason
    pd.testing.assert_frame_equal(found.table, power_at_saddles.table, rtol=1e-6)
    for law, tree in found.fits.items():
        xr.testing.assert_allclose(tree["posterior"].ds, power_at_saddles.fits[law]["posterior"].ds, rtol=1e-6)


def test_uniform_noise_gives_arrhenius_at_saddles():
    result = compare(world_table("uniform", "saddle").drop(columns="effective_dimension"), LAWS, **SHORT)
    assert result.verdict == "arrhenius", result.reason
    row = result.report["laws"]["arrhenius"]["parameters"]["noise_strength"]
    assert abs(np.log(row["mean"] / STRENGTH)) < 0.3


@pytest.mark.parametrize(("noise", "law"), [("loss", "power_law"), ("uniform", "arrhenius")])
def test_the_law_of_the_noise_wins_at_thresholds(noise, law):
    result = compare(world_table(noise, "threshold"), LAWS, **SHORT)
    assert result.verdict == law, result.reason
    truth = {"power_law": ("temperature_scale", 1.0), "arrhenius": ("noise_strength", STRENGTH)}[law]
    row = result.report["laws"][law]["parameters"][truth[0]]
    assert abs(np.log(row["mean"] / truth[1])) < 4 * row["sd"] / row["mean"]


def test_one_minimum_at_three_learning_rates_is_inconclusive():
    result = compare(world_table("loss", "saddle", minima=1), LAWS, **SHORT)
    assert result.verdict == "inconclusive"
    assert "elpd difference" in result.reason


def test_times_that_hardly_vary_are_not_escape():
    world = World(dimension=2, barrier="threshold")
    design = make_design(world, minima=4, learning_rates=3, runs=40, seed=1)
    result = compare(simulate_slide(design, coefficient_of_variation=0.1, seed=1), LAWS)
    assert result.verdict == "not_escape"
    assert not result.fits
    assert result.report["escape_check"]["not_escape"] == 12
    assert result.report["escape_check"]["sentence"] == result.reason
    assert result.table.empty and list(result.table.columns)[:2] == ["elpd", "elpd_se"]
    assert result.table.index.name == "law" and "discrepancy_mean" in result.table


def test_no_law_is_refused_and_a_single_name_is_one_law():
    table = world_table("loss", "saddle", minima=1)
    with pytest.raises(InputError, match="no law to compare is named"):
        compare(table, [])
    with pytest.raises(InputError, match="there is no law 'powerlaw'"):
        compare(table, "powerlaw")


def test_the_report_has_what_the_contract_names(power_at_saddles):
    report = json.loads(json.dumps(power_at_saddles.report, allow_nan=False))
    assert set(report) >= {"verdict", "reason", "laws", "escape_check", "data", "settings"}
    entry = report["laws"]["power_law"]
    for name in ("elpd", "elpd_se", "elpd_diff", "stacking_weight", "log_evidence", "posterior_probability"):
        assert isinstance(entry[name], float), name
    assert entry["trustworthy"] is True
    assert set(entry["discrepancy"]) == {"mean", "q05", "q95"}
    assert sum(law["stacking_weight"] for law in report["laws"].values()) == pytest.approx(1)
    assert list(power_at_saddles.table.index) == ["power_law", "arrhenius"]
    known = entry["identifiability"]
    assert set(known) == {*entry["parameters"], "discrepancy"}
    assert known["discrepancy"]["status"] and "the discrepancy σ" in known["discrepancy"]["sentence"]


def test_both_evidences_agree_where_the_law_is_true(power_at_saddles):
    entry = power_at_saddles.report["laws"]["power_law"]
    gap = abs(entry["log_evidence"] - entry["log_evidence_smc"])
    assert entry["evidence_methods_agree"]
    assert gap < 3 * np.hypot(entry["log_evidence_se"], entry["log_evidence_smc_se"])


def test_a_posterior_file_opens_with_arviz_and_has_every_group(power_at_saddles, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    path = tmp_path / "power_law.nc"
    power_at_saddles.fits["power_law"].to_netcdf(path, engine="netcdf4")
    tree = arviz.from_netcdf(path)
    groups = set(tree.groups()) if callable(tree.groups) else {group.strip("/") for group in tree.groups}
    assert groups >= GROUPS
    posterior = xr.open_datatree(path, engine="netcdf4")["posterior"].to_dataset()
    assert posterior.sizes["condition"] == 30
    constant = xr.open_datatree(path, engine="netcdf4")["constant_data"]
    assert list(posterior["minimum"].to_numpy()) == list(constant["minimum"].to_numpy())
    assert list(posterior["minimum"].to_numpy()) == list(dict.fromkeys(constant["condition_minimum"].to_numpy()))
    assert {"temperature", "log_barrier", "log_rate", "discrepancy", "temperature_scale"} <= set(posterior.data_vars)
    assert posterior["temperature"].attrs["units"]
    for group in ("posterior", "prior", "posterior_predictive", "log_likelihood", "observed_data", "constant_data"):
        for name, variable in xr.open_datatree(path, engine="netcdf4")[group].data_vars.items():
            assert variable.attrs["units"] and variable.attrs["description"], (group, name)
    assert posterior["temperature"].attrs["equation"] == "T = α η h*/B"
    assert "(L^s/L*)^−(1/T + 1 − n/2)" in posterior["log_rate"].attrs["equation"]
    scale = power_at_saddles.fits["power_law"].posterior["temperature_scale"]
    np.testing.assert_array_equal(posterior["temperature_scale"], scale)


def test_log_likelihood_and_predictions_have_one_value_for_each_condition(power_at_saddles):
    tree = power_at_saddles.fits["power_law"]
    assert tree.log_likelihood["escapes"].shape == (4, 500, 30)
    predicted, seen = tree.posterior_predictive["escapes"], tree.observed_data["escapes"]
    low, high = predicted.quantile([0.005, 0.995], dim=("chain", "draw"))
    assert float(((seen >= low) & (seen <= high)).mean()) > 0.9
