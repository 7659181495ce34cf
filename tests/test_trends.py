"""Trends in residual log rates: silent when there is none, loud when there is one."""

import numpy as np
import pytest

from escape_inference.trends import trend


def posterior_of(rates, noise, sigma, rng, draws=400):
    """Draws of δ given noisy measurements of it, with σ known: normal with the conjugate mean and variance."""
    variance = 1 / (1 / sigma**2 + 1 / noise**2)
    return variance * rates / noise**2 + np.sqrt(variance) * rng.normal(size=(draws, len(rates)))


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_without_a_trend_small_p_values_are_no_more_frequent_than_they_say(noise):
    rng, x, sigma = np.random.default_rng(3), np.geomspace(1.1, 20, 30), 0.2
    values = []
    for _ in range(400):
        rates = sigma * rng.normal(size=30) + noise * rng.normal(size=30)
        draws = posterior_of(rates, noise, sigma, rng)
        values.append(trend(draws, np.full((len(draws), 1), sigma), x)["p_value"])
    values = np.array(values)
    for level in (0.02, 0.1, 0.3):
        error = np.sqrt(level * (1 - level) / len(values))
        assert np.mean(values < level) < level + 3 * error


@pytest.mark.parametrize("shape", ["line", "bend"])
def test_a_straight_and_a_bent_trend_are_seen(shape):
    rng, x, sigma, noise = np.random.default_rng(4), np.geomspace(1.1, 20, 40), 0.4, 0.1
    place = (np.log(x) - np.log(x).mean()) / np.log(x).std()
    size = place if shape == "line" else (place**2 - 1) / np.std(place**2)
    draws = posterior_of(0.38 * size + 0.05 * rng.normal(size=40), noise, sigma, rng)
    found = trend(draws, np.full((len(draws), 1), sigma), x)
    assert found["trend"] and found["p_value"] < 1e-3
    if shape == "line":
        assert found["slope"] == pytest.approx(0.38 * sigma**2 / (sigma**2 + noise**2), abs=0.05)


def test_a_variable_that_does_not_vary_cannot_be_tested():
    found = trend(np.random.default_rng(0).normal(size=(50, 12)), np.ones((50, 1)), np.full(12, 3.0))
    assert np.isnan(found["p_value"]) and not found["trend"]
