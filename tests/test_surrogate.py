"""Tables of log rates: their values and slopes against the functions that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from escape_inference.precision import float64
from escape_inference.surrogate import SLOTS, chebyshev_points, importance_of_nodes, tabulate

NAMES = ("temperature_scale", "effective_dimension", "noise_exponent")
POSITIVE = (True, True, False)
CENTER, REACH = np.array([0.2, 1.0, 0.8]), np.array([0.3, 0.4, 0.25])


def log_rates(values, dimension):
    """A power law with noise of exponent q at nine conditions, as a function of one to three parameters."""
    ratio, heat = jnp.linspace(1.4, 3.0, 9), jnp.geomspace(0.05, 0.3, 9)
    scale = values["temperature_scale"]
    n = values["effective_dimension"] if dimension > 1 else 3.0
    q = values["noise_exponent"] if dimension > 2 else 0.6
    potential = (ratio ** (1 - q) - 1) / (1 - q)
    return -potential / (scale * heat) + n / 2 * jnp.log(ratio) - jnp.log1p(scale * n * heat * q**2)


@pytest.mark.parametrize(("dimension", "extent"), [(1, "near"), (2, "near"), (3, "near"), (2, "fine"), (3, "fine")])
@float64
def test_a_table_gives_the_values_and_slopes_of_its_function(dimension, extent):
    center, reach = CENTER[:dimension], REACH[:dimension]
    names, positive = NAMES[:dimension], POSITIVE[:dimension]

    def exact(place):
        raw = center + reach * place
        return log_rates({k: jnp.exp(x) if p else x for k, x, p in zip(names, raw, positive, strict=True)}, dimension)

    points = chebyshev_points(dimension, extent)
    table = tabulate(np.asarray(jax.vmap(exact)(points)), center, reach, names, positive, extent)

    def tabulated(place):
        raw = center + reach * place
        return table({k: jnp.exp(x) if p else x for k, x, p in zip(names, raw, positive, strict=True)})

    inside = np.random.default_rng(0).uniform(-0.95, 0.95, (40, dimension))
    size = np.ptp(np.asarray(jax.vmap(exact)(inside)))
    values = jax.jit(jax.vmap(lambda place: tabulated(place) - exact(place)))(inside)
    slopes = jax.jit(jax.vmap(lambda place: jax.jacobian(tabulated)(place) - jax.jacobian(exact)(place)))(inside)
    assert np.abs(values).max() < 1e-6 * size
    assert np.abs(slopes).max() < 1e-4 * size
    assert table.polynomials.shape[0] == SLOTS  # every law has the same shapes, whatever parameters it has


@float64
def test_a_table_is_constant_beyond_its_box_and_has_finite_slopes_at_the_edge():
    points = chebyshev_points(2, "near")
    rates = np.stack([points[:, 0] - points[:, 1], points[:, 0] * points[:, 1] ** 2], axis=1)
    table = tabulate(rates, np.zeros(2), np.ones(2), ("a", "b"), (False, False), "near")
    far = table({"a": jnp.array(7.0), "b": jnp.array(-9.0)})
    np.testing.assert_allclose(far, [2.0, 1.0], atol=1e-12)
    slopes = jax.jacobian(lambda a: table({"a": a, "b": jnp.array(0.5)}))(jnp.array(1.0))
    assert np.isfinite(slopes).all()


@float64
def test_a_table_is_most_exact_where_most_draws_are():
    def corner(place):  # each condition's rate turns in another direction: more polynomials than a table holds
        steepness = jnp.linspace(-4.0, 4.0, 20)
        return -jnp.logaddexp(0.0, 2 * place[0] + steepness * place[1])

    points, draws = chebyshev_points(2, "near"), np.random.default_rng(0).normal(0.1, 0.2, (1000, 2)).clip(-1, 1)
    rates, box = np.asarray(jax.vmap(corner)(points)), (np.zeros(2), np.ones(2), ("a", "b"), (False, False))

    def worst(importance, places):
        table = tabulate(rates, *box, "near", importance)
        return np.abs(jax.vmap(lambda x: table({"a": x[0], "b": x[1]}) - corner(x))(places)).max(axis=1)

    importance = importance_of_nodes(draws, "near")
    even, weighted = worst(None, draws), worst(importance, draws)
    assert np.sqrt(np.mean(weighted**2)) < np.sqrt(np.mean(even**2)) / 3
    edges = np.array([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])  # a chain that comes there finds a way back
    assert worst(importance, edges).max() < 0.1 * np.ptp(rates)
