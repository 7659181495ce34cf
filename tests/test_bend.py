"""Straight coordinates of a bent posterior: an exact transformation with a constant Jacobian."""

import jax
import numpy as np
import pytest

from escape_inference.bend import BENT, bent, fit_bend, straight, unbent
from escape_inference.precision import float64


def banana(count, dim, seed=0):
    w = np.random.default_rng(seed).normal(size=(count, dim))
    z = w * np.geomspace(2.0, 0.1, dim)
    z[:, 1] += z[:, 0] ** 2 / 4
    return z


@pytest.mark.parametrize("dim", [2, 5, 9])
@float64
def test_the_transformation_is_inverted_and_keeps_volumes_in_proportion(dim):
    z = banana(500, dim)
    bend = fit_bend(z)
    np.testing.assert_allclose(bent(bend, unbent(bend, z)), z, atol=1e-9)
    volume = [np.linalg.slogdet(jax.jacobian(lambda w: bent(bend, w))(w))[1] for w in unbent(bend, z)[:20]]
    np.testing.assert_allclose(volume, np.linalg.slogdet(bend.axes)[1], atol=1e-9)
    assert [x.shape for x in bend] == [x.shape for x in straight(dim)]


@float64
def test_a_bent_cloud_becomes_straight():
    w = unbent(fit_bend(banana(4000, 3)), banana(4000, 3, seed=1))
    squares = w[:, :2] ** 2
    for k in (1, 2):
        assert abs(np.corrcoef(squares[:, 0], w[:, k])[0, 1]) < 5 * np.sqrt(
            2 / 4000
        )  # the fit and the check each have so much noise
    assert abs(np.corrcoef(banana(4000, 3)[:, 0] ** 2, banana(4000, 3)[:, 1])[0, 1]) > 0.8


def test_a_few_points_are_left_as_they_are():
    z = banana(10, 5)
    assert np.array_equal(unbent(fit_bend(z), z), z)
    assert np.array_equal(unbent(fit_bend(z[:1]), z[:1]), z[:1])


@float64
def test_a_point_of_weight_two_counts_as_two_points():
    z = banana(400, 3)
    weights = np.where(np.arange(400) < 100, 2.0, 1.0)
    own, doubled = fit_bend(z, weights), fit_bend(np.concatenate([z, z[:100]]))
    np.testing.assert_allclose(own.center, doubled.center, atol=1e-12)
    points = banana(50, 3, seed=1)
    squares = [unbent(one, points)[:, 1:] ** 2 for one in (own, doubled)]  # axes have lengths by n or n − 1, and signs
    np.testing.assert_allclose(squares[0], squares[1], rtol=0.01)


@float64
def test_what_may_be_chance_is_not_straightened():
    straight_cloud = np.random.default_rng(0).normal(size=(200, 3)) * [3.0, 2.0, 1.0]
    assert fit_bend(straight_cloud).coefficients.any()
    assert not fit_bend(straight_cloud, least=BENT).coefficients.any()
    assert fit_bend(banana(200, 3), least=BENT).coefficients[:, 1].any()
