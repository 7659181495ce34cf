"""First passage of a loss threshold: the theory's figures, independent integrals and solvers, limits, and gradients."""

import importlib.util
import itertools
import logging
from decimal import Decimal, localcontext
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kramers.solvers import FirstPassage1D
from scipy.integrate import quad
from scipy.special import beta, betainc, gammainc, gammaln, hyp1f1
from scipy.special import gamma as gamma_function

from escape_inference.passage import (
    log_leading_rate,
    log_mean_passage_rate,
    log_potential,
    overshoot_ratio,
)
from escape_inference.passage_edges import panel_edges, start_length
from escape_inference.passage_operator import (
    Function,
    constant,
    drive,
    generator_of,
    to_threshold,
    trace,
)
from escape_inference.passage_panels import PANELS, RULE, START, build_grid
from escape_inference.passage_potential import potential, potential_slope

SIZE = 48
LAWS = (log_mean_passage_rate, log_leading_rate)
METASTABLE = 0.2  # rates in units of h* below which there is a well to escape from
QUICK = {"xla_backend_optimization_level": 0}  # programs that run once are compiled without optimisation

_spec = importlib.util.spec_from_file_location(
    "bench_passage", Path(__file__).parents[1] / "scripts" / "bench_passage.py"
)
bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def rates(law, *arguments):
    return np.exp(np.asarray(law(*arguments)))


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _value_and_slopes(law, *arguments):
    value, pull = jax.vjp(law, *arguments)
    return value, pull(jnp.ones_like(value))


def value_and_slopes(law, *arguments):
    """Log rates and their four derivatives, always computed for the same number of conditions."""
    columns = np.broadcast_arrays(*(np.asarray(x, float) for x in arguments))
    count = columns[0].size
    value, slopes = _value_and_slopes(law, *(np.resize(x.ravel(), SIZE) for x in columns))
    return np.asarray(value)[:count], np.array(slopes)[:, :count]


def whole_range():
    """The sixteen corners of the range of validity, then random points inside it."""
    ends = [bench.RANGE[k] for k in ("temperature", "excess", "dimension", "noise_exponent")]
    corners = np.array(list(itertools.product(*ends))).T
    inside = np.array(bench.draw(np.random.default_rng(7), SIZE - 16))
    corners[1] += 1
    return np.concatenate([corners, inside], axis=1)


def fine_slopes(conditions, method):
    """Derivatives of the fine rule by fourth-order differences (c in log(c − 1))."""
    step = 2e-3
    found = np.empty((4, conditions.shape[1]))
    for i, (T, c, n, q) in enumerate(conditions.T):
        for k in range(4):

            def value(shift, k=k, T=T, c=c, n=n, q=q):
                moved = [np.log(T), np.log(c - 1), np.log(n), q]
                moved[k] += shift
                arguments = (
                    float(np.exp(moved[0])),
                    float(1 + np.exp(moved[1])),
                    float(np.exp(moved[2])),
                    float(moved[3]),
                )
                return getattr(bench.FineRule(*arguments), method)()

            near, far = value(step) - value(-step), value(2 * step) - value(-2 * step)
            found[k, i] = (8 * near - far) / (12 * step)
    return found


# --- figures of the theory


def test_mean_passage_rates_are_those_of_the_theory_to_its_digits():
    T, c, n, expected = np.array(
        [
            (0.1, 1.4, 1, 0.0539),
            (0.1, 1.7, 1, 0.0085),
            (0.1, 1.4, 2, 0.1640),
            (0.05, 1.3, 2, 0.0393),
            (0.1, 1.7, 4, 0.1636),
            (0.05, 1.2, 8, 1.3612),
        ]
    ).T
    np.testing.assert_allclose(rates(log_mean_passage_rate, T, c, n, 1.0), expected, atol=0.5001e-4)


def test_mean_passage_rates_of_other_noise_exponents_are_those_of_the_theory():
    q, n, expected = np.array([(0, 1, 0.0151), (0, 6, 0.4630), (0.5, 1, 0.0211), (1.5, 1, 0.0358)]).T
    np.testing.assert_allclose(rates(log_mean_passage_rate, 0.1, 1.5, n, q), expected, atol=0.5001e-4)


def test_leading_rates_are_those_of_the_theory_to_its_digits():
    T, c, n, expected = np.array(
        [
            (0.1, 1.4, 1, 0.05588),
            (0.1, 1.4, 4, 0.69012),
            (0.1, 1.7, 4, 0.18667),
            (0.1, 1.7, 8, 1.09367),
            (0.05, 1.3, 8, 1.08771),
        ]
    ).T
    np.testing.assert_allclose(rates(log_leading_rate, T, c, n, 1.0), expected, atol=0.5001e-5)


def test_local_slopes_in_the_barrier_ratio_are_those_of_the_theory():
    n = np.array([1, 4, 8, 16])[:, None]
    c = np.array([1.2, 1.5, 2, 3, 6, 20])
    expected = [
        (10.69, 9.46, 9.87, 10.20, 10.39, 10.47),
        (7.93, 5.98, 6.58, 7.74, 8.53, 8.88),
        (6.80, 4.14, 3.80, 4.57, 5.98, 6.75),
        (6.14, 3.17, 2.23, 1.84, 1.84, 2.41),
    ]
    _, slopes = value_and_slopes(log_mean_passage_rate, 0.1, c, n, 1.0)
    np.testing.assert_allclose(-(slopes[1] * np.tile(c, 4)).reshape(4, 6), expected, rtol=5e-4, atol=0.5e-2)


# --- independent integrals and solvers


@pytest.mark.parametrize(("T", "c", "n"), [(0.1, 1.4, 1.0), (0.07, 2.3, 3.3), (0.3, 6.0, 2.5), (0.05, 1.2, 17.0)])
def test_noise_as_the_loss_gives_an_incomplete_beta_function(T, c, n):
    exponent = 1 / T + 1 - n / 2

    def density(s):
        x = 1 + s**2
        return 2 * s ** (1 - n) * x ** (1 / T) * betainc(n / 2, exponent, 1 - 1 / x) * beta(n / 2, exponent)

    time = quad(density, 0, np.sqrt(c - 1), epsrel=1e-11, epsabs=0, limit=200)[0] / (2 * T)
    assert float(log_mean_passage_rate(T, c, n, 1.0)) == pytest.approx(-np.log(time), abs=1e-8)


@pytest.mark.parametrize(("T", "c", "n"), [(0.1, 1.5, 1.0), (0.3, 2.3, 3.3), (0.8, 6.0, 2.5), (0.04, 1.3, 17.0)])
def test_frozen_noise_gives_an_incomplete_gamma_function(T, c, n):
    def density(s):
        inner = T ** (n / 2) * gammainc(n / 2, s**2 / T) * gamma_function(n / 2)
        return 2 * s ** (1 - n) * np.exp(s**2 / T) * inner

    time = quad(density, 0, np.sqrt(c - 1), epsrel=1e-11, epsabs=0, limit=200)[0] / (2 * T)
    assert float(log_mean_passage_rate(T, c, n, 0.0)) == pytest.approx(-np.log(time), abs=1e-8)


@pytest.mark.parametrize(
    ("T", "c", "n", "q"),
    [(0.1, 1.4, 1, 1.0), (0.05, 1.3, 8, 1.0), (0.23, 2.6, 2.7, 0.4), (0.07, 1.9, 6, 1.7), (0.15, 3.0, 1, -0.4)],
)
def test_both_rates_are_those_of_a_solver_that_knows_the_stochastic_equation_only(T, c, n, q):
    """The radius r = |θ − θ*|·sqrt(h*/2L*) of SGD's Itô equation: drift −r + (n − 1) D/r, D = T (1 + r²)^q / 2."""

    def diffusion(r):
        return T / 2 * (1 + r**2) ** q

    def drift(r):
        return -r + ((n - 1) * diffusion(r) / r if n != 1 else 0.0)

    begin = 0.0 if n == 1 else 1e-6
    solver = FirstPassage1D(
        drift=drift, D=diffusion, domain=(begin, np.sqrt(c - 1)), left="reflecting", right="absorbing"
    )
    mean, leading = solver.mean_time(begin), solver.decay_rate()
    assert max(mean.error / mean.value, leading.error / leading.value) < 1e-11
    assert float(log_mean_passage_rate(T, c, n, q)) == pytest.approx(-np.log(mean.value), abs=1e-8)
    assert float(log_leading_rate(T, c, n, q)) == pytest.approx(np.log(leading.value), abs=1e-8)


def test_mean_passage_rates_agree_with_a_fine_rule_over_the_whole_range():
    conditions = whole_range()
    expected = [bench.FineRule(*map(float, x)).log_mean_rate() for x in conditions.T]
    np.testing.assert_allclose(np.asarray(log_mean_passage_rate(*conditions)), expected, rtol=1e-13, atol=1e-6)


def settled(conditions):
    """All but the corner of the range in which Newton's method is known to stop early."""
    _, c, n, q = conditions
    return ~((n > 100) & (q > 1.5) & (c > 10))


def test_leading_rates_agree_with_a_fine_rule_over_the_whole_range():
    conditions = np.concatenate([whole_range(), bench.draw(np.random.default_rng(3), 60)], axis=1)
    conditions = conditions[:, settled(conditions)]
    expected = [bench.FineRule(*map(float, x)).log_leading_rate() for x in conditions.T]
    error = np.abs(np.asarray(log_leading_rate(*conditions)) - expected)
    assert (error < 1e-6 + 1e-13 * np.abs(expected)).all()
    assert max(expected) > 13 and min(expected) < -4e4


@pytest.mark.parametrize(
    ("T", "c", "n"), [(0.1, 1.5, 1.0), (0.3, 2.3, 3.3), (0.8, 6.0, 2.5), (0.04, 1.3, 17.0), (0.4, 1.9, 54.0)]
)
def test_with_frozen_noise_the_leading_rate_is_a_root_of_kummers_function(T, c, n):
    """The backward equation is Kummer's: ``1F1(−λ/2; n/2; (c − 1)/T) = 0``, positive for every smaller λ."""
    rate = rates(log_leading_rate, T, c, n, 0.0)
    below, above = (hyp1f1(-rate * (1 + shift) / 2, n / 2, (c - 1) / T) for shift in (-1e-8, 1e-8))
    assert below > 0 > above
    assert (hyp1f1(-rate * np.linspace(0, 0.999, 50) / 2, n / 2, (c - 1) / T) > 0).all()


@pytest.mark.parametrize("q", [-0.5, 0.4, 1.0, 2.0])
def test_behind_a_high_barrier_the_leading_rate_is_the_mean_passage_rate(q):
    T, c, n = np.array([0.01, 0.02]), 2.5, np.array([1.3, 9.0])
    leading, mean = (np.asarray(law(T, c, n, q)) for law in LAWS)
    assert (mean < -12).all()
    np.testing.assert_allclose(leading, mean, atol=2e-6)


def test_the_leading_rate_is_never_below_the_mean_passage_rate():
    """A run that starts at the minimum has to fill its well first."""
    conditions = np.concatenate([whole_range(), bench.draw(np.random.default_rng(4), 400)], axis=1)
    gap = np.asarray(log_leading_rate(*conditions)) - np.asarray(log_mean_passage_rate(*conditions))
    assert gap.min() > -1e-6
    assert gap.max() > 1.0


# --- limits


def test_rates_are_continuous_through_the_power_law_and_through_frozen_noise():
    offsets = np.array([-1e-5, -1e-9, 0.0, 1e-9, 1e-5])
    for law, q in itertools.product(LAWS, (0.0, 1.0)):
        around = np.asarray(law(0.08, 2.2, 3.4, q + offsets))
        slope = value_and_slopes(law, 0.08, 2.2, 3.4, q)[1][3, 0]
        assert abs(slope) > 1
        np.testing.assert_allclose(around - around[2], slope * offsets, atol=1e-8)


@pytest.mark.parametrize("q", [-0.3, 0.0, 1.0, 1.4])
@pytest.mark.parametrize(("c", "n"), [(1.6, 1.0), (2.1, 2.6), (1.9, 5.0)])
def test_at_small_temperature_both_rates_tend_to_the_laplace_form(c, n, q):
    """κ ≈ (2/Γ(n/2)) ((c − 1)/T)^(n/2) c^(−q) exp(−ΔU_q/T), with an error of the order of T."""
    T = np.array([0.005, 0.01])
    height = float(log_potential(c, q))
    laplace = np.log(2) - gammaln(n / 2) + n / 2 * np.log((c - 1) / T) - q * np.log(c) - height / T
    for law in LAWS:
        error = np.asarray(law(T, c, n, q)) - laplace
        assert abs(error[0]) < 15 * T[0]
        # linear in T: extrapolated to T = 0 it vanishes to second order
        assert abs(2 * error[0] - error[1]) < 0.2 * np.abs(error).max() + 1e-6


@pytest.mark.parametrize(("T", "n"), [(0.1, 1.0), (0.3, 2.5), (0.15, 9.0)])
def test_far_above_the_minimum_the_rate_is_a_power_of_the_barrier_ratio(T, n):
    """The exponent is 1/T + 1 − n/2 with a correction of the order of 1/c, removed by extrapolation."""
    c = np.array([25.0, 50.0])
    for law in LAWS:
        slope = -value_and_slopes(law, T, c, n, 1.0)[1][1] * c
        exponent = 1 / T + 1 - n / 2
        assert 1e-3 < abs(slope[0] - exponent) < 1
        assert abs(slope[0] - exponent) > 1.8 * abs(slope[1] - exponent)
        assert 2 * slope[1] - slope[0] == pytest.approx(exponent, abs=0.2 * abs(slope[1] - exponent))


@pytest.mark.parametrize("q", [-0.5, 0.0, 0.3, 0.95, 1 - 1e-9, 1.0, 1 + 1e-6, 1.4, 2.5])
@pytest.mark.parametrize("c", [1.001, 1.7, 6.0, 50.0])
def test_the_potential_is_exact_to_rounding_at_every_noise_exponent(c, q):
    with localcontext() as context:
        context.prec = 60
        gap, log_c = 1 - Decimal(q), Decimal(c).ln()
        exact = float(((gap * log_c).exp() - 1) / gap) if q != 1 else float(log_c)
    assert float(log_potential(c, q)) == pytest.approx(exact, rel=5e-15)
    assert float(potential(jnp.log(c), jnp.asarray(q))) == pytest.approx(
        exact, rel=2e-12 if abs(q - 1) < 1e-3 else 5e-14
    )


def test_the_potential_has_exact_derivatives_through_the_power_law():
    log_c = np.log(3.7)
    first, second = jax.grad(log_potential, 1), jax.grad(jax.grad(log_potential, 1), 1)
    assert float(first(3.7, 1.0)) == pytest.approx(-(log_c**2) / 2, rel=1e-13)
    assert float(second(3.7, 1.0)) == pytest.approx(log_c**3 / 3, rel=1e-12)
    assert float(jax.grad(log_potential)(3.7, 1.0)) == pytest.approx(1 / 3.7, rel=1e-13)
    for q in (-0.4, 0.9, 1.0, 1.3, 2.2):
        slope = float(potential_slope(jnp.asarray(log_c), log_potential(3.7, q), jnp.asarray(q)))
        assert slope == pytest.approx(float(first(3.7, q)), rel=1e-11)
        assert float(jax.grad(potential, 1)(log_c, jnp.asarray(q))) == pytest.approx(slope, rel=1e-11)


# --- looks at discrete iterations


@pytest.mark.parametrize("q", [0.0, 0.7, 1.0, 1.6])
@pytest.mark.parametrize("interval", [1, 5])
def test_the_threshold_radius_is_shifted_by_a_share_of_the_step_between_two_looks(q, interval):
    loss_minimum, hessian, learning_rate, batch, c = 0.03, 7.0, 0.02, 6, 1.8
    radius = np.sqrt(2 * loss_minimum * (c - 1) / hessian)
    # the noise of one iteration along a direction of curvature h*, at the threshold
    deviation = learning_rate * np.sqrt(2 * loss_minimum * c**q * hessian / batch)
    shifted = radius + 0.5826 * np.sqrt(interval) * deviation
    expected = 1 + hessian * shifted**2 / (2 * loss_minimum)
    step = learning_rate * hessian
    assert float(overshoot_ratio(c, step / batch, q, step, interval)) == pytest.approx(expected, rel=1e-13)


def test_a_walk_looked_at_without_pause_needs_no_shift_and_rarer_looks_a_larger_one():
    ratios = np.asarray(overshoot_ratio(1.6, 0.05, 1.0, 0.2, np.array([0, 1, 4])))
    assert ratios[0] == pytest.approx(1.6, rel=1e-14)
    radii = np.sqrt(ratios - 1)
    assert radii[2] - radii[0] == pytest.approx(2 * (radii[1] - radii[0]), rel=1e-12)


# --- gradients


def test_gradients_are_finite_at_every_corner_of_the_range_and_inside():
    conditions = whole_range()
    for law in LAWS:
        value, slopes = value_and_slopes(law, *conditions)
        assert np.isfinite(value).all() and np.isfinite(slopes).all()
        known = settled(conditions)
        np.testing.assert_allclose(value[known], np.asarray(law(*conditions))[known], rtol=1e-12, atol=1e-6)


def test_gradients_of_the_mean_passage_rate_are_differences_of_the_fine_rule_over_the_whole_range():
    conditions = whole_range()[:, 10:36]
    T, c, n, _ = conditions
    _, slopes = value_and_slopes(log_mean_passage_rate, *conditions)
    expected = fine_slopes(conditions, "log_mean_rate")
    scale = 1 + np.abs(expected).max(axis=0)
    assert (np.abs(slopes * (T, c - 1, n, 1.0 + 0 * T) - expected) < 3e-6 * scale).all()


def test_gradients_of_the_leading_rate_are_differences_of_the_fine_rule_over_the_whole_range():
    conditions = whole_range()[:, 16:30]
    T, c, n, _ = conditions
    _, slopes = value_and_slopes(log_leading_rate, *conditions)
    expected = fine_slopes(conditions, "log_leading_rate")
    scale = 1 + np.abs(expected).max(axis=0)
    assert (np.abs(slopes * (T, c - 1, n, 1.0 + 0 * T) - expected) < 3e-6 * scale).all()


# --- shapes, precision, compilation


@pytest.mark.parametrize("law", LAWS)
def test_arguments_are_broadcast_against_each_other(law):
    T, c = np.array([0.05, 0.11, 0.3])[:, None], np.array([1.3, 2.4])
    table = np.asarray(law(T, c, 3.0, 0.7))
    assert table.shape == (3, 2)
    alone = law(0.11, 2.4, 3.0, 0.7)
    assert alone.shape == ()
    assert float(alone) == pytest.approx(table[1, 1], abs=1e-9)
    assert law(np.zeros((0,)), 1.5, 2.0, 1.0).shape == (0,)


@pytest.mark.parametrize("law", LAWS)
def test_single_precision_is_refused(law):
    with jax.enable_x64(False), pytest.raises(TypeError, match="double precision"):
        law(0.1, 1.5, 2.0, 1.0)


@pytest.mark.parametrize("law", LAWS)
def test_a_second_call_with_other_numbers_compiles_nothing(law, caplog):
    rng = np.random.default_rng(0)
    first, second = (np.array(bench.draw(rng, SIZE)) for _ in range(2))
    law(*first), value_and_slopes(law, *first)
    with caplog.at_level(logging.WARNING), jax.log_compiles(True):
        law(*second), value_and_slopes(law, *second)
        assert not [r for r in caplog.records if "ompil" in r.getMessage()]
        jax.jit(lambda x: x * 1.2345)(jnp.ones(7))
    assert [r for r in caplog.records if "ompil" in r.getMessage()]


# --- panels and operator


def test_panel_edges_never_decrease_and_end_at_the_threshold():
    T, c, n, q = (jnp.asarray(x) for x in whole_range())
    edges = np.asarray(jax.jit(panel_edges, static_argnums=4, compiler_options=QUICK)(T, c - 1, n, q, PANELS))
    assert edges.shape == (PANELS + 1, SIZE)
    assert (np.diff(edges, axis=0) >= 0).all()
    np.testing.assert_array_equal(edges[-1], np.log(np.asarray(c - 1)))
    assert (edges[0] >= np.log(np.asarray(start_length(T, c - 1, n, q)))).all()


def test_the_panel_rules_are_exact_for_polynomials_and_linear_equations():
    count = len(RULE.nodes)
    for degree in range(2 * count - 1):
        assert RULE.weights @ RULE.nodes**degree == pytest.approx(1 / (degree + 1), rel=1e-12)
    # u' + a u = 1, u(0) = 0, by the stacked modes
    for a in (0.3, 1.7):
        modes = RULE.poles / (1 + a * RULE.poles) * RULE.of_one
        u = RULE.from_modes @ np.concatenate([modes.real, modes.imag])
        np.testing.assert_allclose(u, (1 - np.exp(-a * RULE.nodes)) / a, rtol=1e-7)
    # 2 y u' + n u = y³ on the starting panel
    power = START.to_powers @ START.nodes**3
    n = 2.6
    u = START.from_powers @ (power / (n + 2 * np.arange(len(power))))
    np.testing.assert_allclose(u, START.nodes**3 / (n + 6), atol=1e-10)


def test_the_transpose_of_the_operator_is_exact():
    T, c, n, q = (jnp.asarray(x) for x in ((0.1, 0.2, 0.06), (1.7, 2.5, 1.5), (4.0, 2.3, 1.0), (1.0, 0.3, 1.6)))

    @partial(jax.jit, compiler_options=QUICK)
    def products(T, c, n, q):
        generator = generator_of(build_grid(T, c - 1, n, q))
        grid = generator.grid
        f = Function(jnp.cos(grid.log_x), jnp.cos(grid.start_log_x))
        g = Function(1 / (1 + grid.log_x), 1 / (1 + grid.start_log_x))
        density = drive(generator, f).density
        mean = to_threshold(drive(generator, constant(generator)).density).start[0]
        return (
            g.dot(density),
            trace(generator, g).weights.dot(f),
            mean,
            drive(generator, constant(generator)).density.sum(),
        )

    driven, traced, highest, total = products(T, c, n, q)
    np.testing.assert_allclose(driven, traced, rtol=1e-8)
    assert (highest < total).all() and (highest > 0.9 * total).all()
