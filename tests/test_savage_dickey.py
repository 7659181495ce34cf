"""Bayes factors of points inside a family, against closed forms and against bridge sampling of the two laws."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from escape_inference.precision import float64
from escape_inference.savage_dickey import log_marginal_density


@pytest.mark.parametrize("point", [0.3, 2.0, 4.0])
def test_the_density_of_one_coordinate_of_a_correlated_posterior_reaches_into_its_tail(point):
    covariance = np.array([[0.49, 0.5, -0.1], [0.5, 1.2, 0.2], [-0.1, 0.2, 0.8]])
    mean, precision = np.array([1.0, -2.0, 0.5]), np.linalg.inv(covariance)
    draws = np.random.default_rng(1).multivariate_normal(mean, covariance, size=(4, 1000))
    log_joint = lambda x: -0.5 * (x - mean) @ jnp.asarray(precision) @ (x - mean) - 7.3
    density, error = float64(log_marginal_density)(log_joint, draws, 0, point)
    assert 0 < error < 0.1
    assert density == pytest.approx(norm.logpdf(point, 1.0, 0.7), abs=4 * error)
