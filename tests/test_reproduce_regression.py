"""The regression scripts: their densities against independent ones, fits that find a known answer, and files that come out."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pandas as pd
import pytest
import scipy.stats

SCRIPTS = Path(__file__).parents[1] / "scripts"


def _load(name: str) -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(SCRIPTS))


stationary, passage = _load("reproduce_stationary"), _load("reproduce_passage_times")


def _student_excess(
    rng: np.random.Generator, exponent: float, growth: float, dimension: int, shape: tuple
) -> np.ndarray:
    """Excess u of samples of the multivariate Student density ∝ (1 + g u)^-p, by SciPy's F distribution.

    With nu = 2p - d degrees of freedom and position z, |z|^2 / d of a standard one is F(d, nu), and g u = |z|^2 / nu.
    """
    freedom = 2 * exponent - dimension
    return scipy.stats.f.rvs(dimension, freedom, size=shape, random_state=rng) * dimension / freedom / growth


@pytest.mark.parametrize(("exponent", "growth"), [(1.03, 0.5), (1.2, 2.0), (11.0, 1.0), (60.0, 5.0)])
def test_condensed_samples_have_the_likelihood_of_all_of_them(exponent: float, growth: float) -> None:
    excess = _student_excess(np.random.default_rng(9), exponent, 1.0, 1, (10_000,))
    points, weights = stationary.condense(excess)
    with jax.enable_x64(True):
        law = stationary.LossPower(exponent, growth, 1)
        whole, condensed = float(law.log_prob(excess).sum()), float(weights @ law.log_prob(points))
    assert weights.sum() == pytest.approx(10_000, rel=1e-12)
    assert condensed == pytest.approx(whole, abs=1e-3)


@pytest.mark.parametrize("dimension", [1, 3])
def test_density_of_a_power_of_the_loss_is_the_multivariate_student_of_scipy(dimension: int) -> None:
    exponent, growth = 4.2, 0.7
    freedom = 2 * exponent - dimension
    points = np.random.default_rng(1).normal(size=(20, dimension))
    shape = np.eye(dimension) / (growth * freedom)
    reference = scipy.stats.multivariate_t(shape=shape, df=freedom).logpdf(points)
    with jax.enable_x64(True):
        found = stationary.LossPower(exponent, growth, dimension).log_prob((points**2).sum(axis=1))
    np.testing.assert_allclose(np.asarray(found), reference, rtol=1e-10)


def test_posterior_of_the_exponent_finds_the_exponents_that_made_the_samples() -> None:
    rng, dimension = np.random.default_rng(2), np.array([1, 4, 1])
    truth, growth = np.array([3.0, 9.0, 40.0]), np.array([1.0, 1.0, 1.0])
    excess = np.array([_student_excess(rng, *one, (3000,)) for one in zip(truth, growth, dimension, strict=True)])
    draws = stationary.posterior(stationary.exponent_model, excess, np.full(3, 3000), dimension, True)["phi"]
    assert np.all(np.abs(draws.mean(axis=0) - truth) < 3.5 * draws.std(axis=0))
    # for large phi the density is Gaussian and its width known to a relative error of sqrt(2/n)
    assert draws[:, 2].std() / 40 == pytest.approx(np.sqrt(2 / 3000), rel=0.1)


def test_samples_that_count_for_a_quarter_double_the_width_of_the_posterior() -> None:
    excess = np.repeat(_student_excess(np.random.default_rng(3), 6.0, 1.0, 2, (1, 4000)), 2, axis=0)
    effective, dimension = np.array([4000, 1000]), np.array([2, 2])
    widths = stationary.posterior(stationary.exponent_model, excess, effective, dimension, True)["phi"].std(axis=0)
    assert widths[1] / widths[0] == pytest.approx(2.0, rel=0.15)


def test_shape_of_the_density_is_found_where_it_is_no_power_of_the_loss() -> None:
    rng = np.random.default_rng(4)
    excess = np.array([_student_excess(rng, 2.5, growth, 1, (6000,)) for growth in (1.0, 2.0)])
    growth = stationary.posterior(stationary.growth_model, excess, np.full(2, 6000), np.ones(2), True)["growth"]
    assert np.all(np.abs(growth.mean(axis=0) - [1.0, 2.0]) < 3.5 * growth.std(axis=0))
    assert np.quantile(growth[:, 1], 0.05) > 1.0


def test_exponent_for_gaussian_inputs_is_that_of_samples_of_their_density() -> None:
    a, step, dimension = 12.0, 0.1, 3
    power = (dimension + 3) / 4 + a * (1 - step / 2) / 2
    logs = np.log1p(_student_excess(np.random.default_rng(5), power, 2.0, dimension, (40_000,)))
    found = stationary.most_likely(float(logs.mean()), dimension)
    expected = stationary.gaussian_inputs_exponent(a, step, dimension)
    assert expected == pytest.approx(found, rel=0.02)
    assert expected < 0.97 * (1 + a)


def test_sampled_width_is_that_of_the_recursion_of_sgd() -> None:
    well = stationary.make_well(100_000, 2)
    excess = stationary.measure(well, 2, (0.2,), 1500, 7)[0]
    # E theta^2 for standard normal x and y in d dimensions: eta / (B (2 - eta) - (d + 1) eta) for each weight, 2 L* = 1
    expected = 2 * 0.2 / (2 * 1.8 - 3 * 0.2) * well.curvature / (2 * well.loss_minimum)
    means = excess.mean(axis=1)
    assert abs(means.mean() - expected) < 4 * excess.std() / np.sqrt(excess.size) + 0.01 * expected


def test_misfit_is_below_its_limit_for_samples_of_the_density_and_above_for_others() -> None:
    rng = np.random.default_rng(6)
    right, wrong = _student_excess(rng, 5.0, 1.0, 1, (5000,)), rng.exponential(0.1, 5000)
    for excess, low, high in ((right, 0.0, 1.0), (wrong, 1.5, np.inf)):
        phi = stationary.most_likely(float(np.log1p(excess).mean()), 1)
        assert low < stationary.fit_quality(excess, phi, 1, 5000) < high


def test_straight_line_reads_the_dimension_off_an_exact_power() -> None:
    threshold = np.array([1.2, 1.5, 2.0, 3.0])
    table = pd.DataFrame({"threshold": threshold, "mean_time": 7 * threshold ** (10 + 1 - 3 / 2), "escapes": 100})
    found = passage.straight_line(table, 10.0)
    assert found["mean"] == pytest.approx(3.0)
    assert found["q05"] <= found["q95"]


def test_rates_of_the_theory_are_those_of_the_reference_integral_with_the_threshold_shifted() -> None:
    well = pd.DataFrame({"loss_minimum": [0.5], "hessian_minimum": [1.0]})
    shifted = passage.theory_rates(well, np.array([1.4]), 2)[0]
    assert 0.05 < shifted < 0.1640  # 0.1640 at c = 1.4, T = 0.1, n = 2, looked at always
    small = passage.theory_rates(well, np.array([1.25]), 2)[0]
    assert small > shifted


def test_most_intervals_must_contain_the_truth() -> None:
    assert passage._verdict(5, 5) == "agree"
    assert passage._verdict(4, 5) == "agree"
    assert passage._verdict(3, 5) == "cannot tell"
    assert passage._verdict(2, 5) == "differ"
    assert passage._verdict(0, 0) == "cannot tell"


def _run(name: str, output: Path) -> tuple[dict, dict[str, pd.DataFrame]]:
    command = [sys.executable, str(SCRIPTS / f"reproduce_{name}.py"), "--quick", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((output / f"{name}.json").read_text(encoding="utf-8"))
    for figure in record["figures"]:
        content = (output / figure).read_bytes()
        assert content.startswith(b"\x89PNG") and 10_000 < len(content) < 200 * 1024
    assert not list(output.glob(".*"))
    return record, {path: pd.read_csv(output / path) for path in record["tables"]}


def test_stationary_experiment_in_its_small_form(tmp_path: Path) -> None:
    record, tables = _run("stationary", tmp_path)
    assert {claim["conclusion"] for claim in record["claims"]} <= {"agree", "differ", "cannot tell"}
    table = tables["stationary_exponents.csv"]
    small = table[table["learning_rate"] < 1]
    expected = small["gaussian_inputs_exponent"]
    assert np.all(np.abs(small["exponent"] - expected) < 4 * small["exponent_sd"] + 0.05 * expected)
    assert np.all(small["exponent"] < small["paper_exponent"])
    far = table[table["learning_rate"] == 1].iloc[0]
    assert far["exponent_q95"] < far["paper_exponent"]


def test_passage_experiment_in_its_small_form(tmp_path: Path) -> None:
    record, tables = _run("passage_times", tmp_path)
    assert {claim["conclusion"] for claim in record["claims"]} <= {"agree", "differ", "cannot tell"}
    conditions, posteriors = tables["passage_times_conditions.csv"], tables["passage_times_posteriors.csv"]
    control = conditions[(conditions["data"] == "diffusion") & (conditions["escapes"] >= 20)]
    off = np.abs(np.log(control["rate_over_law"]))
    assert np.all(off < 4 * control["mean_time_relative_se"] + 0.1)
    row = passage.choose(posteriors, "diffusion", "theory", "effective_dimension").iloc[0]
    assert row["q05"] - (row["q95"] - row["q05"]) < 2 < row["q95"] + (row["q95"] - row["q05"])
    sgd = conditions[(conditions["data"] == "sgd") & (conditions["escapes"] >= 20)]
    assert np.all(np.diff(sgd["mean_time"]) > 0)
