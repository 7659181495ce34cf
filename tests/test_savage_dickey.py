"""Bayes factors of points inside a family, against closed forms and against bridge sampling of the two laws."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from escape_inference.comparison import compare
from escape_inference.law import load_law
from escape_inference.precision import float64
from escape_inference.savage_dickey import integrate, moved
from escape_inference.sde import simulate_sde
from escape_inference.worlds import World, make_design


@pytest.mark.parametrize("point", [0.3, 2.0, 4.0])
def test_the_density_of_one_coordinate_of_a_correlated_posterior_reaches_into_its_tail(point):
    covariance = np.array([[0.49, 0.5, -0.1], [0.5, 1.2, 0.2], [-0.1, 0.2, 0.8]])
    mean, precision = np.array([1.0, -2.0, 0.5]), np.linalg.inv(covariance)
    draws = np.random.default_rng(1).multivariate_normal(mean, covariance, size=4000)
    log_joint = lambda x: -0.5 * (x - mean) @ jnp.asarray(precision) @ (x - mean) - 7.3
    found = float64(integrate)(log_joint, moved(draws, 0, point), 0, point)
    log_evidence = -7.3 + 0.5 * np.log(np.linalg.det(2 * np.pi * covariance))
    assert 0 < found.standard_error < 0.05
    exact = norm.logpdf(point, 1.0, 0.7) + log_evidence
    assert found.log_evidence == pytest.approx(exact, abs=4 * found.standard_error)


def test_points_of_the_noise_exponent_family_agree_with_bridge_sampling_of_the_laws_that_they_are():
    world = World(noise="loss", noise_exponent=0.5, dimension=2, barrier="saddle")
    table = simulate_sde(world, make_design(world, minima=6, learning_rates=3, runs=15, seed=3), seed=3)
    table, family = table.drop(columns="effective_dimension"), load_law("noise_exponent")
    frozen = dataclasses.replace(
        family,
        name="frozen_noise",
        points=(),
        special_cases=(),
        parameters=family.parameters[1:],
        log_rate=lambda values, setting: family.log_rate({**values, "noise_exponent": 0.0}, setting),
    )
    laws = compare(table, [family, "power_law", frozen], draws=500, warmup=300).report["laws"]
    for name, point in (("power_law", "noise_exponent=1"), ("frozen_noise", "noise_exponent=0")):
        whole, held = laws["noise_exponent"], laws[name]
        assert whole["evidence_methods_agree"] and held["evidence_methods_agree"]
        found = whole["point_bayes_factors"][point]
        bridge = held["log_evidence"] - whole["log_evidence"]
        error = np.hypot(found["log_bayes_factor_se"], np.hypot(held["log_evidence_se"], whole["log_evidence_se"]))
        assert found["log_bayes_factor"] == pytest.approx(bridge, abs=4 * error)
        assert error < 0.2
