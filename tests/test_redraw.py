"""Draws of another posterior from those of a known one, also where some of them carry nothing."""

import jax.numpy as jnp
import numpy as np

from escape_inference.importance import importance_sample
from escape_inference.precision import float64


def density(z):
    """Normal with mean 3 and variance 1/100 in each of two directions; its integral is π/50."""
    return -50 * jnp.sum((z - 3) ** 2)


@float64
def found_from(spoil):
    start = np.random.default_rng(0).normal(size=(2000, 2))
    log_weight = -50 * np.sum((start - 3) ** 2, axis=1)
    return importance_sample(density, start, spoil(log_weight))


def test_points_without_a_finite_weight_do_not_spoil_the_others():
    """0/0 and 0 come from draws that the known posterior or the new one rules out."""

    def spoil(log_weight):
        log_weight[::7], log_weight[3::50], log_weight[5::50] = np.nan, -np.inf, np.inf
        return log_weight

    found = found_from(spoil)
    assert abs(found.log_evidence - np.log(np.pi / 50)) < 3 * found.standard_error < 0.1
    assert np.abs(np.average(found.z, axis=0, weights=np.exp(found.log_weight)) - 3).max() < 0.02


def test_with_no_usable_point_the_answer_is_that_it_cannot_be_trusted():
    found = found_from(lambda log_weight: np.full_like(log_weight, np.nan))
    assert found.pareto_k == np.inf
    assert not np.isfinite(found.log_weight).any()
