"""The spline of the threshold laws against the laws themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from escape_inference.law import Setting, load_law
from escape_inference.passage import log_leading_rate, log_mean_passage_rate
from escape_inference.passage_table import build_passage_table, tables_for
from escape_inference.precision import float64

EXACT = {"minimum": log_mean_passage_rate, "quasi_stationary": log_leading_rate}


@pytest.mark.parametrize(("start", "q"), [("minimum", 0.0), ("quasi_stationary", 1.0)])
@float64
def test_the_spline_is_the_law_where_posteriors_live(start, q):
    table = build_passage_table(start, (float(np.log(0.3)), float(np.log(1.5))), q)
    rng = np.random.default_rng(2)
    T, n = np.exp(rng.uniform(np.log(0.02), np.log(1.0), 400)), np.exp(rng.uniform(np.log(0.3), np.log(12), 400))
    c = 1 + np.exp(rng.uniform(np.log(0.3), np.log(1.5), 400))
    exact = np.asarray(EXACT[start](T, c, n, q))
    difference = np.abs(np.asarray(table(jnp.asarray(T), jnp.asarray(c), jnp.asarray(n), q)) - exact)
    assert difference.max() < 5e-3  # a rate within half a per cent, far below any discrepancy
    assert np.quantile(difference, 0.9) < 5e-4

    def total(law):
        return jax.grad(lambda x: jnp.sum(law(*(jnp.asarray(v) for v in (x[0], c, x[1], q)))), holomorphic=False)

    x = jnp.stack([jnp.asarray(T), jnp.asarray(n)])
    slope, exact_slope = total(table)(x), total(EXACT[start])(x)
    np.testing.assert_allclose(slope * x, exact_slope * x, atol=0.05, rtol=0.01)


@float64
def test_a_law_is_asked_which_noise_exponent_it_uses():
    one = jnp.ones(2)
    setting = Setting(0.1 * one, 8 * one, one, one, 0.5 * one, one, one, barrier="threshold", start="minimum")
    assert tables_for(load_law("power_law"), [(setting, 0.0)])["minimum"].coefficients.ndim == 3
    saddle = dataclasses.replace(setting, barrier="saddle")
    assert tables_for(load_law("power_law"), [(saddle, 0.0)]) == {}
    assert tables_for(load_law("constant_rate"), [(setting, 0.0)]) == {}
