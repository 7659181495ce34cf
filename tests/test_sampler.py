"""Trajectories of one length against exact draws, and against NUTS."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest, norm

from escape_inference.bend import fit_bend, straight, unbent
from escape_inference.diagnostics import check_convergence
from escape_inference.precision import float64
from escape_inference.programs import random_keys
from escape_inference.sampler import Draws, hmc_chains, nuts_chains

CURVATURE = 0.3


def banana(z, data):
    return -0.5 * z[0] ** 2 - 0.5 * ((z[1] - CURVATURE * z[0] ** 2) / data) ** 2


def exact(count, width, seed):
    a, b = np.random.default_rng(seed).normal(size=(2, count))
    return np.stack([a, CURVATURE * a**2 + width * b], axis=1)


@float64
def draws(sampler, start, bend, width, *, warmup, count, seed=0, acceptance=0.9, covariance=None) -> Draws:
    covariance = np.cov(unbent(bend, exact(4000, width, 9)).T) if covariance is None else covariance
    arrays = random_keys(seed, 1, count=len(start)), start, covariance, bend, jnp.asarray(width)
    return jax.tree.map(
        np.asarray,
        sampler(*arrays, np.asarray(count), np.asarray(acceptance), log_joint=banana, warmup=warmup, draws=count),
    )


@pytest.mark.parametrize("kind", ["plain", "bent"])
def test_exact_draws_stay_exact_whatever_the_step(kind):
    """Of many chains that start from exact draws, the tenth states are exact draws again: steps are accepted by the right odds."""
    bend = straight(2) if kind == "plain" else fit_bend(exact(4000, 0.5, 3))
    found = draws(hmc_chains, unbent(bend, exact(3000, 0.5, 1)), bend, 0.5, warmup=0, count=10)
    assert 0.2 < found.acceptance_rate.mean() < 0.97  # so that odds matter
    last = found.z[:, -1]
    for values in (last[:, 0], (last[:, 1] - CURVATURE * last[:, 0] ** 2) / 0.5):
        assert kstest(values, norm.cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(last[:, 0], found.z[:, 0, 0])[0, 1]) < 0.5


def test_a_bent_posterior_is_found_from_a_few_chains_as_by_nuts():
    bend = fit_bend(exact(4000, 0.2, 3))
    start = unbent(bend, exact(4, 0.2, 1))
    for sampler in (hmc_chains, nuts_chains):
        found = draws(sampler, start, bend, 0.2, warmup=300, count=1000)
        assert check_convergence(found.z, found.diverging, found.energy).trustworthy
        for power, mean in ((1, 0.0), (2, 1.0), (4, 3.0)):
            moments = (found.z[..., 0] ** power).mean(axis=1)
            assert abs(moments.mean() - mean) < 4 * np.sqrt(moments.var(ddof=1) / len(moments) + 1e-3)
        assert found.z.shape == (4, 1000, 2)
        assert found.n_steps.min() >= 1


def test_steps_are_as_long_as_the_wanted_acceptance_allows_and_all_chains_share_them():
    bend, found = straight(2), {}
    for wanted in (0.7, 0.95):
        found[wanted] = draws(hmc_chains, exact(4, 0.5, 1), bend, 0.5, warmup=400, count=1000, acceptance=wanted)
        assert (np.ptp(found[wanted].step_size, axis=0) == 0).all()
    assert found[0.7].acceptance_rate.mean() < 0.85 < 0.9 < found[0.95].acceptance_rate.mean()
    assert found[0.7].step_size.mean() > 1.2 * found[0.95].step_size.mean()
    assert np.ptp(found[0.95].n_steps) > 0  # the length of a trajectory is drawn anew


def test_the_first_state_is_where_the_chain_starts():
    """A step that is never accepted leaves a chain where it began, with the density there."""
    start = np.array([[0.3, 0.1]])
    found = draws(hmc_chains, start, straight(2), 0.5, warmup=0, count=3, covariance=1e12 * np.eye(2))
    np.testing.assert_array_equal(found.z[0], np.broadcast_to(start, (3, 2)))
    np.testing.assert_allclose(found.potential[0], 0.5 * 0.3**2 + 0.5 * ((0.1 - CURVATURE * 0.3**2) / 0.5) ** 2)
    assert found.diverging.all()
