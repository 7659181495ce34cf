"""Gamma waiting times: tails, the exponential limit, the shape integrated out."""

import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy.integrate import quad
from scipy.special import gammaln, logsumexp
from scipy.stats import gamma, kstest

from escape_inference.conditions import aggregate
from escape_inference.gamma_intervals import interval_counts, log_gamma_tails, maximum, profile
from escape_inference.waiting import GammaLikelihood, gamma_likelihood


def experiment(shape: float, runs: int, interval: int = 1, limit: float = np.inf, seed: int = 0) -> pd.DataFrame:
    """Waiting times of mean 2,000 iterations (κ = 0.01 at η = 0.05), looked at every ``interval``, until ``limit``."""
    times = np.random.default_rng(seed).gamma(shape, 2000.0 / shape, runs)
    steps = np.ceil(times / interval) * interval
    return pd.DataFrame(
        {
            "minimum": "m1",
            "run": range(runs),
            "learning_rate": 0.05,
            "batch_size": 8,
            "steps": np.minimum(steps, limit).astype(int),
            "escaped": steps <= limit,
            "check_interval": interval,
        }
    )


def log_integral(log_density: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> float:
    """Log of an integral by Gauss-Legendre in panels that shrink geometrically towards both ends."""
    graded = np.append(0.0, 0.5 * np.logspace(-12, 0, 200))
    edges = np.concatenate([graded, 1.0 - graded[-2::-1]])
    node, weight = np.polynomial.legendre.leggauss(20)
    middle, half = 0.5 * (edges[1:] + edges[:-1]), 0.5 * np.diff(edges)
    place = middle[:, None] + half[:, None] * node
    return float(
        logsumexp(log_density(low + (high - low) * place) + np.log(half[:, None] * weight)) + np.log(high - low)
    )


@pytest.mark.parametrize("shape", [0.05, 0.7, 1.0, 3.3, 40.0, 2000.0])
@pytest.mark.parametrize("ratio", [1e-8, 1e-4, 0.03, 0.5, 0.99, 1.7, 10.0, 1e3])
def test_log_tails_of_the_gamma_are_exact_from_1e_minus_8_to_1e3(shape: float, ratio: float) -> None:
    x = shape * ratio
    below, above = (float(value[0]) for value in log_gamma_tails(np.array([shape]), np.array([x])))
    if ratio < 1:
        # t = x exp(−y / a) turns the lower integral into a smooth one
        tail = log_integral(lambda y: -y - x * np.exp(-y / shape), 0.0, 60.0 / (1.0 - ratio))
        expected = shape * np.log(x) - gammaln(shape + 1.0) + tail
        pair = (below, above)
    else:
        expected = log_integral(lambda t: (shape - 1) * np.log(t) - t, x, x + 60.0 * (10 + shape)) - gammaln(shape)
        pair = (above, below)
    assert pair[0] == pytest.approx(expected, rel=1e-9, abs=1e-11)
    assert pair[1] == pytest.approx(np.log(-np.expm1(expected)), rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("shape", [0.3, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("hazard", [1e-8, 1e-3, 0.7, 20.0, 1e3])
@pytest.mark.parametrize("width", [1e-9, 1e-4, 0.02, 0.5])
def test_interval_probabilities_are_safe_for_narrow_and_wide_intervals(
    shape: float, hazard: float, width: float
) -> None:
    low, high = 7.0, 7.0 * (1 + width)
    counts = interval_counts(pd.DataFrame({"lower": [low], "upper": [high], "escapes": 1, "censored": 0}), 1.0)
    found = float(counts.log_likelihood(np.array(np.log(hazard / low)), np.array(np.log(shape))))
    rate = shape * hazard / low
    expected = log_integral(lambda t: shape * np.log(rate) + (shape - 1) * np.log(t) - rate * t, low, high)
    assert found == pytest.approx(expected - gammaln(shape), rel=1e-9, abs=1e-7)


def test_shape_one_is_the_memoryless_likelihood_with_the_same_constant() -> None:
    conditions = aggregate(experiment(1.0, 80, interval=150, limit=4500))
    setting = conditions.frame.iloc[0]
    rate = np.exp(np.linspace(-12.0, 2.0, 30))
    expected = setting["escapes"] * np.log(-np.expm1(-rate * setting["look_width"])) - rate * setting["exposure_before"]
    counts = interval_counts(conditions.times, 0.05)
    np.testing.assert_allclose(counts.log_likelihood(np.log(rate), np.zeros(30)), expected, rtol=1e-11)


def test_the_likelihood_of_exact_times_is_the_density_times_the_look() -> None:
    steps = experiment(4.0, 30, seed=4)["steps"].to_numpy()
    times = pd.DataFrame({"lower": steps - 1, "upper": steps, "escapes": 1, "censored": 0})
    found = interval_counts(times, 0.05).log_likelihood(np.array(np.log(0.011)), np.array(np.log(3.0)))
    middle = 0.05 * (steps - 0.5)
    expected = gamma.logpdf(middle, 3.0, scale=1 / (3.0 * 0.011)).sum() + 30 * np.log(0.05)
    assert float(found) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("shape", "runs", "limit"), [(4.0, 25, np.inf), (0.6, 40, 3000.0), (9.0, 300, 2200.0)])
def test_the_shape_is_integrated_out_as_by_quadrature(shape: float, runs: int, limit: float) -> None:
    conditions = aggregate(experiment(shape, runs, interval=40, limit=limit, seed=runs))
    table = gamma_likelihood(conditions.times, 0.05)
    counts = interval_counts(conditions.times, 0.05)
    for point in (20, 60, 77):
        z = table.log_rate[point]
        fine = np.linspace(-6.0, 7.0, 4001)
        log_joint = counts.log_likelihood(np.full_like(fine, z), fine) - 0.5 * fine**2 - 0.5 * np.log(2 * np.pi)
        assert table.log_likelihood[point] == pytest.approx(logsumexp(log_joint) + np.log(fine[1] - fine[0]), abs=1e-5)


@pytest.mark.parametrize(
    ("shape", "runs", "interval", "limit"),
    [
        (5.0, 40, 1, np.inf),
        (8.0, 400, 1, 2500.0),
        (1.0, 400, 50, np.inf),
        (6.0, 20_000, 1, np.inf),
        (0.6, 30, 200, 2600.0),
    ],
)
def test_a_cubic_spline_of_the_table_is_accurate_and_the_table_is_fast(
    shape: float, runs: int, interval: int, limit: float
) -> None:
    times = aggregate(experiment(shape, runs, interval, limit)).times
    start = time.process_time()
    table = gamma_likelihood(times, 0.05)
    # on a busy machine the clock of the process runs about twice as fast
    assert time.process_time() - start < 0.3
    assert table.log_rate.shape == (121,)
    np.testing.assert_allclose(np.diff(table.log_rate), table.log_rate[1] - table.log_rate[0])
    middle = 0.5 * (table.log_rate[1:] + table.log_rate[:-1])
    fine = gamma_likelihood(times, 0.05, points=241, half_width=table.log_rate[-1] - table.log_rate[60])
    np.testing.assert_allclose(fine.log_rate[1::2], middle)
    np.testing.assert_allclose(table.at(middle), fine.log_likelihood[1::2], atol=1e-4)
    # ten posterior standard deviations on either side, the maximum in the middle
    weight = np.exp(table.log_likelihood - table.log_likelihood.max())
    mean = np.average(table.log_rate, weights=weight)
    sd = np.sqrt(np.average((table.log_rate - mean) ** 2, weights=weight))
    assert np.abs(table.log_rate[[0, -1]] - mean).min() > 9.5 * sd or table.log_rate[-1] - table.log_rate[0] >= 6.0
    assert abs(table.log_rate[np.argmax(table.log_likelihood)] - mean) < sd


def test_far_from_the_maximum_the_likelihood_is_finite_and_falls() -> None:
    table = gamma_likelihood(aggregate(experiment(3.0, 60, limit=2500)).times, 0.05, half_width=20.0)
    assert np.isfinite(table.log_likelihood).all()
    peak = int(np.argmax(table.log_likelihood))
    assert (np.diff(table.log_likelihood[:peak]) > 0).all()
    assert (np.diff(table.log_likelihood[peak:]) < 0).all()


def test_sampled_shapes_follow_the_conditional_posterior() -> None:
    times = aggregate(experiment(4.0, 50)).times
    table = gamma_likelihood(times, 0.05)
    point = 66
    drawn = np.log(table.sample_shape(np.full(4000, table.log_rate[point]), seed=1))
    density = np.exp(table.log_shape_density[point])
    grid = table.log_shape[point]
    cumulative = np.append(0.0, np.cumsum(0.5 * (density[1:] + density[:-1]) * np.diff(grid)))
    assert cumulative[-1] == pytest.approx(1.0, abs=1e-6)
    assert kstest(drawn, lambda x: np.interp(x, grid, cumulative)).pvalue > 0.01
    counts = interval_counts(times, 0.05)
    log_joint = lambda x: float(counts.log_likelihood(np.array(table.log_rate[point]), np.array(x))) - 0.5 * x**2
    top = max(log_joint(x) for x in grid)
    weight = lambda x: np.exp(log_joint(x) - top)
    mean = quad(lambda x: x * weight(x), grid[0], grid[-1])[0] / quad(weight, grid[0], grid[-1])[0]
    assert drawn.mean() == pytest.approx(mean, abs=4 * drawn.std() / np.sqrt(4000))


def test_rate_and_shape_are_recovered_with_honest_widths() -> None:
    misses = []
    for seed in range(60):
        table = gamma_likelihood(aggregate(experiment(5.0, 60, interval=100, limit=3000, seed=seed)).times, 0.05)
        weight = np.exp(table.log_likelihood - table.log_likelihood.max())
        mean = np.average(table.log_rate, weights=weight)
        sd = np.sqrt(np.average((table.log_rate - mean) ** 2, weights=weight))
        misses.append((mean - np.log(0.01)) / sd)
    assert abs(np.mean(misses)) < 4 / np.sqrt(60)
    assert 0.75 < np.std(misses) < 1.3


def test_the_fit_finds_the_maximum_of_the_likelihood() -> None:
    counts = interval_counts(aggregate(experiment(2.5, 300, interval=300, limit=3000)).times, 0.05)
    z, s, _ = maximum(counts)
    grid = np.meshgrid(z + np.linspace(-0.2, 0.2, 9), s + np.linspace(-0.3, 0.3, 9), indexing="ij")
    assert counts.log_likelihood(np.array(z), np.array(s)) > counts.log_likelihood(*grid).max() - 1e-6
    heights = profile(counts, s + np.array([-0.4, 0.0, 0.4]), z)
    rates = np.linspace(z - 1.5, z + 1.5, 3001)
    expected = [counts.log_likelihood(rates, np.full(3001, s + shift)).max() for shift in (-0.4, 0.0, 0.4)]
    np.testing.assert_allclose(heights, expected, atol=1e-3)


def test_without_an_escape_the_table_falls_with_the_rate() -> None:
    times = pd.DataFrame({"lower": [990.0], "upper": [1000.0], "escapes": 0, "censored": 5})
    table = gamma_likelihood(times, 0.05)
    assert isinstance(table, GammaLikelihood)
    assert (np.diff(table.log_likelihood) <= 0).all()
    assert table.log_likelihood[0] == pytest.approx(0.0, abs=0.05)
