"""The likelihood of a condition's escapes: tails, the discrepancy integrated out, records, delayed waiting times."""

import itertools
from dataclasses import replace
from decimal import Decimal, localcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy.integrate import cumulative_trapezoid, quad, trapezoid
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq
from scipy.special import comb, gammaln, logsumexp
from scipy.stats import binom

from escape_inference.conditions import aggregate
from escape_inference.gamma_intervals import interval_counts
from escape_inference.likelihood import (
    EscapeCounts,
    Observations,
    conditional_discrepancy,
    log_escape_probability,
    log_likelihood_given_rate,
    marginal_log_likelihood,
    replicate_escapes,
)
from escape_inference.model import build_observations
from escape_inference.waiting import gamma_likelihood

QUICK = {"xla_backend_optimization_level": 0}  # programs that run once are compiled without optimisation
marginal = jax.jit(marginal_log_likelihood, compiler_options=QUICK)
conditional = jax.jit(jax.vmap(conditional_discrepancy, in_axes=(0, None, None, None)), compiler_options=QUICK)


def marginal_and_slopes(log_rate, discrepancy, observed):
    value, pull = jax.vjp(lambda z, s: marginal_log_likelihood(z, s, observed), log_rate, discrepancy)
    return value, *pull(jnp.ones_like(log_rate))


def one_by_one(function):
    """``function`` of each condition alone, so that none takes the way of the coarsest; two dimensions for one condition."""
    alone = lambda z, s, o: function(z[None], s, o)
    axes = dict.fromkeys(("escapes", "looks", "look_width", "weight"), 0)
    axes |= dict.fromkeys(("delayed", *(f"table_{k}" for k in ("start", "step", "values", "escapes", "exposure"))))
    mapped = jax.jit(jax.vmap(alone, in_axes=(0, 0, Observations(**axes))), compiler_options=QUICK)
    column = lambda o: replace(o, **{k: getattr(o, k)[:, None] for k, axis in axes.items() if axis == 0})
    return lambda z, s, o: jax.tree.map(np.ravel, mapped(z, s, column(o)))


together = jax.jit(marginal_and_slopes, compiler_options=QUICK)
each = one_by_one(marginal_and_slopes)


@partial(jax.jit, compiler_options=QUICK)
def score(log_rate, discrepancy, observed, escapes):
    return EscapeCounts(log_rate, discrepancy, observed).log_prob(escapes)


@partial(jax.jit, compiler_options=QUICK)
def sample_counts(key, log_rate, discrepancy, observed):
    return EscapeCounts(log_rate, discrepancy, observed).sample(key, (20_000,))


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def seen(escapes, looks, look_width, weight=1.0):
    """Memoryless conditions."""
    arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, float)) for x in (escapes, looks, look_width, weight)))
    nothing = np.zeros(0)
    observed = Observations(*arrays, np.zeros(0, int), nothing, nothing, np.zeros((0, 4)), nothing, nothing)
    return jax.tree.map(jnp.asarray, observed)


def log_likelihood(log_rate, escapes, looks, look_width):
    hazard = np.exp(log_rate) * look_width
    return (escapes * np.log(-np.expm1(-hazard)) if escapes else 0.0) - (looks - escapes) * hazard


def exact_marginal(log_rate, discrepancy, escapes, looks, look_width):
    """By adaptive quadrature in a window around the mode that ends where the integrand has fallen by e⁴⁰."""

    def log_integrand(delta):
        return log_likelihood(log_rate + delta, escapes, looks, look_width) - 0.5 * (delta / discrepancy) ** 2

    def slope(delta):
        hazard = np.exp(log_rate + delta) * look_width
        return escapes * hazard / np.expm1(min(hazard, 700.0)) - (looks - escapes) * hazard - delta / discrepancy**2

    low, high = -1.0, 1.0
    while slope(low) < 0:
        low *= 2
    while slope(high) > 0:
        high *= 2
    mode = brentq(slope, low, high, xtol=1e-14)
    top, total = log_integrand(mode), 0.0
    for sign in (-1, 1):
        fall = lambda reach, sign=sign: log_integrand(mode + sign * reach) - top + 40
        reach = 1e-3 * discrepancy
        while fall(reach) > 0:
            reach *= 2
        end = mode + sign * brentq(fall, 0, reach, xtol=1e-3 * discrepancy)
        density = lambda delta: np.exp(log_integrand(delta) - top)
        total += quad(density, *sorted((mode, end)), epsabs=0, epsrel=1e-11, limit=200)[0]
    return top + np.log(total / discrepancy) - 0.5 * np.log(2 * np.pi)


# --- given the rate


def test_an_interval_has_exactly_the_difference_of_two_survivals():
    """exp(−κ a) − exp(−κ b) for one escape in (a, b], to the last digits of sixty-digit arithmetic."""
    with localcontext() as context:
        context.prec = 1000
        for hazard, width in itertools.product((1e-8, 1e-3, 0.7, 30.0, 1e3), (1e-9, 1e-3, 0.4)):
            rate, end = 0.37, hazard / 0.37
            begin = end * (1 - width)
            kappa, a, w = Decimal(rate), Decimal(begin), Decimal(end * width)
            expected = float(((-kappa * a).exp() - (-kappa * (a + w)).exp()).ln())
            found = float(log_likelihood_given_rate(np.log(rate), 1.0, begin, end * width))
            assert found == pytest.approx(expected, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("hazard", [1e-8, 1e-4, 0.3, 17.0, 36.0, 300.0, 1e3])
def test_survival_and_its_gradient_are_exact_over_eleven_decades(hazard):
    rate = 0.013
    survival = lambda log_rate: log_likelihood_given_rate(log_rate, 0.0, hazard / rate, 2.0)
    value, slope = jax.value_and_grad(survival)(np.log(rate))
    assert float(value) == pytest.approx(-hazard, rel=1e-13)
    assert float(slope) == pytest.approx(-hazard, rel=1e-13)


@pytest.mark.parametrize("begin", [0.0, 1e-8, 1.0, 40.0, 1e3])
@pytest.mark.parametrize("hazard", [1e-12, 1e-8, 1e-3, 0.8, 40.0, 650.0, 1e3])
def test_interval_probabilities_have_exact_finite_gradients(begin, hazard):
    """d/d log κ of log(exp(−κ a) − exp(−κ b)) is κ w/(exp(κ w) − 1) − κ a."""
    rate = 0.013
    interval = lambda log_rate: log_likelihood_given_rate(log_rate, 1.0, begin / rate, hazard / rate)
    value, slope = jax.value_and_grad(interval)(np.log(rate))
    inside = hazard / np.expm1(hazard) if hazard < 700 else 0.0
    assert float(value) == pytest.approx(np.log(-np.expm1(-hazard)) - begin, rel=1e-12, abs=1e-12)
    assert float(slope) == pytest.approx(inside - begin, rel=1e-12, abs=1e-12)


def test_the_probability_of_an_escape_stays_finite_at_absurd_hazards():
    log_hazard = jnp.array([-5000.0, -90.0, -80.0, 80.0, 5000.0])
    value, pull = jax.vjp(log_escape_probability, log_hazard)
    np.testing.assert_allclose(value, [-5000, -90, -80, 0, 0], atol=1e-12)
    assert np.isfinite(np.asarray(pull(jnp.ones(5))[0])).all()


def test_only_the_number_of_escapes_and_the_exposure_before_them_matter():
    """Runs one by one, each known to an interval, against the two sums."""
    rng = np.random.default_rng(2)
    width, rate = 0.35, 0.21
    looks = rng.geometric(-np.expm1(-rate * width), 30)
    ended = looks > 12
    looks = np.minimum(looks, 12)
    one_by_one = np.where(
        ended, -rate * width * looks, np.log(np.exp(-rate * width * (looks - 1)) - np.exp(-rate * width * looks))
    )
    observed = seen((~ended).sum(), looks.sum(), width)
    found = log_likelihood_given_rate(np.log(rate), observed.escapes, observed.exposure_before, observed.look_width)
    assert 5 < (~ended).sum() < 30
    assert float(found[0]) == pytest.approx(one_by_one.sum(), rel=1e-12)


# --- the discrepancy integrated out

COUNTS = ((0, 100), (1, 500), (30, 40), (40, 2000), (5000, 100_000))
GRID = np.array(
    [
        (*count, width, np.log(max(count[0], 0.5) / ((count[1] - count[0]) * width)) + miss, discrepancy)
        for count, width, miss, discrepancy in itertools.product(
            COUNTS, (0.003, 0.4, 20.0), (-4, -1, 0, 1.5, 4), (1e-5, 0.03, 0.3, 1.0, 3.0)
        )
    ]
).T
# the error of thirteen nodes: none at a small discrepancy, some thousandths where a few escapes meet a wide one
GRID_TOLERANCE = np.select([GRID[4] <= 0.3, GRID[4] <= 1.0], [1e-9, 5e-6], 4e-3)
GRID_EXACT = np.array([exact_marginal(z, s, d, looks, width) for d, looks, width, z, s in GRID.T])


@pytest.mark.parametrize("of_all", [together, each], ids=["together", "each"])
def test_the_marginal_likelihood_is_that_of_adaptive_quadrature(of_all):
    escapes, looks, width, log_rate, discrepancy = GRID
    found = np.asarray(of_all(log_rate, discrepancy, seen(escapes, looks, width))[0])
    assert (np.abs(found - GRID_EXACT) < GRID_TOLERANCE + 1e-12 * np.abs(GRID_EXACT)).all()
    many = escapes >= 30
    assert (np.abs(found - GRID_EXACT)[many] < 1e-8 + 1e-12 * np.abs(GRID_EXACT[many])).all()


@pytest.mark.parametrize("of_all", [together, each], ids=["together", "each"])
def test_gradients_of_the_marginal_likelihood_are_differences_of_adaptive_quadrature(of_all):
    chosen = GRID[:, (GRID[4] > 0.01) & (GRID[1] > 40)][:, ::3]
    escapes, looks, width, log_rate, discrepancy = chosen
    observed = seen(escapes, looks, width)
    slopes = np.array(of_all(log_rate, discrepancy, observed)[1:])
    step = 1e-3
    for k in range(2):
        shift = np.array([0.0, 0.0])
        shift[k] = 1.0
        moved = lambda h, shift=shift: np.array(
            [exact_marginal(z + h * shift[0], s + h * s * shift[1], d, n, w) for d, n, w, z, s in chosen.T]
        )
        expected = (8 * (moved(step) - moved(-step)) - (moved(2 * step) - moved(-2 * step))) / (12 * step)
        expected /= 1.0 if k == 0 else discrepancy
        tolerance = np.select([discrepancy <= 0.3, discrepancy <= 1.0], [1e-7, 2e-4], 2e-2)
        assert (np.abs(slopes[k] - expected) < tolerance * (1 + np.abs(expected))).all()


@pytest.mark.parametrize("escapes", [0, 1, 7, 300])
@pytest.mark.parametrize("largest", [0.499, 1e-3, 1e-9])
def test_small_hazards_are_integrated_as_others_are(escapes, largest):
    """The mean, the moments and the value by the short way, up to hazards where it ends; next to a coarse condition by the long one."""
    discrepancy, width = np.array([0.01, 0.1, 0.5, 1.0, 2.0]), 0.2
    looks = (escapes + 1) * np.array([40.0, 300.0, 1e4, 1e6])
    looks, discrepancy = (x.ravel() for x in np.meshgrid(looks, discrepancy))
    log_rate = np.log((escapes + 0.5) / (looks * width)) + 0.3
    observed = seen(escapes, looks, width)
    reach = log_rate + np.log(width) + np.log(np.maximum(1.0, np.exp(6 * discrepancy)))
    log_rate = log_rate - np.maximum(reach - np.log(largest), 0.0)
    coarse = seen(np.append(observed.escapes, 5.0), np.append(looks, 5.0), np.append(observed.look_width, 40.0))
    short = each(log_rate, discrepancy, observed)
    long = together(np.append(log_rate, 0.0), np.append(discrepancy, 0.3), coarse)
    np.testing.assert_allclose(short[0], long[0][:-1], rtol=1e-12, atol=1e-9)  # the mode may be found a little better
    np.testing.assert_allclose(short[1:], np.array(long[1:])[:, :-1], rtol=1e-7, atol=1e-7)


def test_points_side_by_side_have_the_likelihoods_and_gradients_that_they_have_alone():
    """Points of small hazards alone, and beside one at which a look finds an escape almost surely."""
    observed = seen([40.0, 0.0, 3.0], [4000.0, 60.0, 9.0], 0.5)
    log_rate = np.array([[-4.0, -6.0, -5.0], [-3.0, -5.0, -4.5], [4.0, -2.0, 5.0]])
    sigma = np.array([[0.1], [0.7], [0.3]]) * np.ones(3)
    alone = [together(*point, observed) for point in zip(log_rate, sigma, strict=True)]
    batch = jax.jit(jax.vmap(marginal_and_slopes, in_axes=(0, 0, None)), compiler_options=QUICK)
    for points in ([0, 1], [0, 1, 2]):
        found = batch(log_rate[points], sigma[points], observed)
        expected = [np.stack(x) for x in zip(*(alone[i] for i in points), strict=True)]
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), list(found), expected)


def test_no_record_is_more_than_certain_even_at_rates_and_discrepancies_beyond_all_reason():
    rng = np.random.default_rng(3)
    observed = seen([40.0, 0.0, 3.0], [4000.0, 60.0, 9.0], 0.5)
    log_rate = rng.choice([-1, 1], (4000, 3)) * 10 ** rng.uniform(-2, 100, (4000, 3))
    sigma = 10 ** rng.uniform(-4, 100, (4000, 1)) * np.ones(3)
    for points in (slice(None), slice(0, 4), slice(4, 8)):
        value = jax.jit(jax.vmap(marginal_log_likelihood, (0, 0, None)))(log_rate[points], sigma[points], observed)
        assert not (np.asarray(value) > 0).any()


@pytest.mark.parametrize("of_all", [together, each], ids=["together", "each"])
def test_a_rate_of_zero_forbids_escapes_and_nothing_else(of_all):
    value, *_ = of_all(np.full(3, -np.inf), np.full(3, 0.3), seen([0.0, 1.0, 40.0], 100.0, 0.1))
    assert abs(value[0]) < 1e-9 and (np.asarray(value)[1:] == -np.inf).all()


def test_without_a_discrepancy_the_likelihood_is_that_of_the_rate():
    escapes, looks, width = np.array([0.0, 3.0, 250.0]), np.array([70.0, 90.0, 4000.0]), np.array([0.4, 6.0, 0.02])
    log_rate = np.log([0.01, 0.003, 2.0])
    observed = seen(escapes, looks, width)
    found = marginal(log_rate, 1e-6, observed)
    expected = log_likelihood_given_rate(log_rate, escapes, observed.exposure_before, width)
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize(
    ("escapes", "looks", "miss", "discrepancy"),
    [(40, 41, 6.0, 0.3), (1000, 1000, 1.5, 0.3), (40, 40, 3.0, 1.0), (1000, 1000, 1.5, 3.0)],
)
def test_conditions_where_nearly_every_look_finds_an_escape_are_integrated_too(escapes, looks, miss, discrepancy):
    log_rate = np.log(2 * escapes / 0.4) + miss
    found = float(marginal(np.array([log_rate]), discrepancy, seen(escapes, looks, 0.4))[0])
    assert found == pytest.approx(exact_marginal(log_rate, discrepancy, escapes, looks, 0.4), abs=0.08)


def test_another_unit_of_time_shifts_the_log_rate_and_nothing_else():
    factor = 37.3
    escapes, looks, width = np.array([0, 7, 90.0]), np.array([55, 4000, 150.0]), np.array([0.3, 0.01, 2.0])
    log_rate = np.log([0.02, 0.4, 0.6])
    for discrepancy in (0.02, 0.8):
        before = marginal(log_rate, discrepancy, seen(escapes, looks, width))
        after = marginal(log_rate - np.log(factor), discrepancy, seen(escapes, looks, width * factor))
        np.testing.assert_allclose(before, after, rtol=1e-12, atol=1e-11)


def test_weights_are_left_to_the_caller():
    arguments = np.array([3.0, 40.0]), np.array([100.0, 900.0]), 0.1
    full = marginal(np.zeros(2), 0.5, seen(*arguments))
    left_out = marginal(np.zeros(2), 0.5, seen(*arguments, weight=0.0))
    np.testing.assert_array_equal(full, left_out)


# --- the conjugate case: Gamma(2, rate 1) prior on κ


@pytest.mark.parametrize(("escapes", "exposure"), [(0, 12.0), (3, 5.0), (40, 900.0)])
def test_many_short_looks_give_the_conjugate_evidence(escapes, exposure):
    """Γ(d + 2) w^d / (1 + E)^(d + 2) for d escapes in looks of width w → 0."""
    width = 1e-6
    observed = seen(escapes, exposure / width + escapes, width)
    log_rate = np.linspace(-40, 8, 48_001)
    log_prior = 2 * log_rate - np.exp(log_rate)
    found = log_likelihood_given_rate(log_rate, observed.escapes, observed.exposure_before, observed.look_width)
    evidence = logsumexp(np.asarray(found) + log_prior) + np.log(log_rate[1] - log_rate[0])
    expected = gammaln(escapes + 2) - (escapes + 2) * np.log1p(exposure) + escapes * np.log(width)
    assert evidence == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(("escapes", "looks", "width"), [(1, 9, 0.7), (5, 12, 0.4), (6, 6, 1.3)])
def test_coarse_looks_give_their_exact_evidence(escapes, looks, width):
    """(1 − e^(−κ w))^d expanded by the binomial theorem, each term a Gamma integral."""
    observed = seen(escapes, looks, width)
    log_rate = np.linspace(-30, 8, 3801)
    found = marginal(log_rate, 1e-6, seen(*(np.full(3801, x) for x in (escapes, looks, width))))
    log_prior = 2 * log_rate - np.exp(log_rate)
    evidence = logsumexp(np.asarray(found) + log_prior) + np.log(log_rate[1] - log_rate[0])
    j = np.arange(escapes + 1)
    exact = np.sum((-1.0) ** j * comb(escapes, j) / (1 + observed.exposure_before + j * width) ** 2)
    assert evidence == pytest.approx(np.log(exact), abs=1e-8)


# --- records


def test_the_probabilities_of_all_possible_records_add_up_to_one():
    """Times the number of orders: log_prob scores one order of the escapes among the looks."""
    looks, log_rate, observed = 12, np.log([0.8, 0.2, 6.0]), seen(3.0, 12, np.array([0.3, 2.0, 0.05]))
    for discrepancy in (1e-4, 0.4, 1.0):
        log_prob = np.array([score(log_rate, discrepancy, observed, np.full(3, float(d))) for d in range(looks + 1)])
        orders = comb(looks, np.arange(looks + 1))[:, None]
        np.testing.assert_allclose(
            (orders * np.exp(log_prob)).sum(axis=0), 1.0, atol=1e-4 if discrepancy > 0.5 else 1e-8
        )


def test_sampled_records_have_the_frequencies_that_are_scored():
    looks, log_rate, observed = 12, np.log([0.8, 0.2, 6.0]), seen(3.0, 12, np.array([0.3, 2.0, 0.05]))
    sample = np.asarray(sample_counts(jax.random.key(4), log_rate, 0.6, observed))
    assert sample.shape == (20_000, 3)
    for d in range(looks + 1):
        probability = comb(looks, d) * np.exp(np.asarray(score(log_rate, 0.6, observed, np.full(3, float(d)))))
        error = np.sqrt(probability * (1 - probability) / len(sample))
        assert (np.abs((sample == d).mean(axis=0) - probability) < 4 * error + 1e-4).all()


LOOKS, WIDTH, RATE, DISCREPANCY = np.array([300, 5000, 40]), np.array([0.2, 0.01, 3.0]), np.array([0.1, 0.7, 0.3]), 0.5


def count_moments():
    """Mean and variance of the counts: binomial given the discrepancy."""
    delta = np.linspace(-9, 9, 20_001)[:, None]
    weight = np.exp(-0.5 * delta**2) / np.exp(-0.5 * delta**2).sum()
    p = -np.expm1(-RATE * np.exp(DISCREPANCY * delta) * WIDTH)
    mean = (weight * LOOKS * p).sum(axis=0)
    return mean, (weight * (binom.var(LOOKS, p) + (LOOKS * p) ** 2)).sum(axis=0) - mean**2


def assert_moments(counts, mean, variance):
    error = counts.std(axis=0) / np.sqrt(len(counts))
    assert (np.abs(counts.mean(axis=0) - mean) < 4 * error).all()
    squares = (counts - mean) ** 2
    assert (np.abs(squares.mean(axis=0) - variance) < 4 * squares.std(axis=0) / np.sqrt(len(counts))).all()


def test_sampled_counts_have_the_mean_and_variance_of_a_binomial_with_a_lognormal_rate():
    counts = sample_counts(jax.random.key(1), np.log(RATE), DISCREPANCY, seen(7.0, LOOKS, WIDTH))
    assert_moments(np.asarray(counts), *count_moments())


def test_replicated_counts_have_the_same_mean_and_variance():
    log_rate = np.tile(np.log(RATE), (20_000, 1))
    spread = np.full((20_000, 1), DISCREPANCY)
    counts = replicate_escapes(np.random.default_rng(3), log_rate, spread, seen(7.0, LOOKS, WIDTH))
    assert_moments(counts, *count_moments())


def test_replicates_are_reproducible_and_never_exceed_the_looks():
    log_rate, observed = np.full((50, 3), 30.0), seen(7.0, LOOKS, WIDTH)
    draws = [replicate_escapes(np.random.default_rng(3), log_rate, np.full((50, 1), 2.0), observed) for _ in range(2)]
    np.testing.assert_array_equal(*draws)
    np.testing.assert_array_equal(draws[0], np.tile(LOOKS, (50, 1)))


# --- the discrepancy of a condition given everything else


def conditional_draws(log_rate, discrepancy, observed):
    """Shares from a uniform distribution, and the discrepancies below which they lie."""
    share = np.random.default_rng(8).random((4000, len(observed.escapes)))
    return share, np.asarray(conditional(share, log_rate, discrepancy, observed))


def test_drawn_discrepancies_follow_their_posterior_by_quadrature():
    escapes, looks, width = np.array([0, 2, 40, 30]), np.array([100, 400, 2000, 40]), np.array([0.4, 0.2, 0.01, 5.0])
    log_rate = np.log([0.05, 0.2, 1.0, 0.7])
    share, drawn = conditional_draws(log_rate, 0.9, seen(escapes, looks, width))
    delta = np.linspace(-8, 8, 40_001)
    for i in range(4):
        log_density = log_likelihood(log_rate[i] + delta, escapes[i], looks[i], width[i]) - 0.5 * (delta / 0.9) ** 2
        below = cumulative_trapezoid(np.exp(log_density - log_density.max()), initial=0.0)
        np.testing.assert_allclose(np.interp(drawn[:, i], delta, below / below[-1]), share[:, i], atol=2e-3)


def test_many_escapes_pin_the_discrepancy_to_the_miss_of_the_law():
    """With 10⁵ escapes δ is the log of observed over predicted, to a standard error of 0.003."""
    rate, looks, width, miss = 0.3, 4_000_000, 0.1, np.array([0.62, -0.4, 0.0, 0.1])
    escapes = looks * -np.expm1(-rate * np.exp(miss) * width)
    _, drawn = conditional_draws(np.full(4, np.log(rate)), 1.0, seen(escapes, looks, width))
    np.testing.assert_allclose(drawn.mean(axis=0), miss, atol=4 * drawn.std(axis=0).max() / np.sqrt(4000) + 1e-5)
    np.testing.assert_allclose(drawn.std(axis=0), 1 / np.sqrt(escapes), rtol=0.06)


# --- delayed conditions


def delayed_condition(runs=60, shape=4.0):
    """A memoryless condition beside a delayed one with Gamma waiting times of mean 2,000 iterations at η = 0.05."""
    rng = np.random.default_rng(runs)
    times = {0.05: rng.gamma(shape, 2000 / shape, runs), 0.02: rng.exponential(900, 45)}
    parts = [
        pd.DataFrame(
            {
                "minimum": "m1",
                "run": [f"{rate}-{k}" for k in range(len(waits))],
                "learning_rate": rate,
                "batch_size": 8,
                "steps": (np.minimum(np.ceil(waits / 40), 80) * 40).astype(int),
                "escaped": waits <= 80 * 40,
                "check_interval": 40,
            }
        )
        for rate, waits in times.items()
    ]
    conditions = aggregate(pd.concat(parts, ignore_index=True))
    times = conditions.times[conditions.times["condition"] == 0]
    table = gamma_likelihood(times, 0.05)
    return conditions, times, table, jax.tree.map(jnp.asarray, build_observations(conditions, {0: table}))


def direct_gamma_log_likelihood(times, log_rate):
    """The shape integrated out by a plain sum, its logarithm standard normal; many rates by a spline through 81."""
    points = log_rate if len(log_rate) < 81 else np.linspace(log_rate.min(), log_rate.max(), 81)
    log_shape = np.linspace(-4, 4, 201)
    log_joint = interval_counts(times, 0.05).log_likelihood(points[:, None], log_shape) - 0.5 * log_shape**2
    value = logsumexp(log_joint, axis=1) + np.log(log_shape[1] - log_shape[0]) - 0.5 * np.log(2 * np.pi)
    return value if points is log_rate else CubicSpline(points, value)(log_rate)


def test_the_table_of_a_delayed_condition_is_its_gamma_likelihood():
    _, times, table, observed = delayed_condition()
    miss = np.array([-1.0, -0.3, 0.0, 0.2, 0.7])
    log_rate = np.log(0.01) + miss
    found = np.array([marginal(jnp.array([z, -4.0]), 1e-6, observed)[0] for z in log_rate])
    np.testing.assert_allclose(found, direct_gamma_log_likelihood(times, log_rate), atol=2e-3)
    np.testing.assert_allclose(found, table.at(log_rate), atol=2e-3)


@pytest.mark.parametrize("discrepancy", [0.05, 0.3, 1.0])
def test_the_discrepancy_of_a_delayed_condition_is_integrated_out_as_by_quadrature(discrepancy):
    conditions, times, _, observed = delayed_condition()
    log_rate = np.log([0.013, 0.04])
    found = np.asarray(marginal(log_rate, discrepancy, observed))
    delta = np.linspace(-6, 6, 1201) * discrepancy
    log_density = direct_gamma_log_likelihood(times, log_rate[0] + delta) - 0.5 * (delta / discrepancy) ** 2
    top = log_density.max()
    expected = top + np.log(trapezoid(np.exp(log_density - top), delta / discrepancy)) - 0.5 * np.log(2 * np.pi)
    assert found[0] == pytest.approx(expected, abs=3e-3)
    # the memoryless condition beside it is scored by its counts
    row = conditions.frame.iloc[1]
    looks = row["exposure_before"] / row["look_width"] + row["escapes"]
    assert found[1] == pytest.approx(
        exact_marginal(log_rate[1], discrepancy, row["escapes"], looks, row["look_width"]), abs=1e-5
    )


def test_gradients_through_the_table_are_those_of_the_gamma_likelihood():
    _, times, _, observed = delayed_condition()
    log_rate, step = np.log([0.013, 0.04]), 1e-3
    slope = together(log_rate, np.full(2, 1e-4), observed)[1][0]
    low, high = direct_gamma_log_likelihood(times, log_rate[0] + step * np.array([-1, 1]))
    assert float(slope) == pytest.approx((high - low) / (2 * step), rel=5e-3)


def test_drawn_discrepancies_of_a_delayed_condition_follow_its_gamma_likelihood():
    _, times, _, observed = delayed_condition()
    log_rate = np.log([0.013, 0.04])
    share, drawn = (x[:, 0] for x in conditional_draws(log_rate, 0.5, observed))
    delta = np.linspace(-3.5, 3.5, 1401)
    log_density = direct_gamma_log_likelihood(times, log_rate[0] + delta) - 0.5 * (delta / 0.5) ** 2
    below = cumulative_trapezoid(np.exp(log_density - log_density.max()), initial=0.0)
    np.testing.assert_allclose(np.interp(drawn, delta, below / below[-1]), share, atol=2e-3)


def test_replicates_of_a_delayed_condition_vary_less_than_a_poisson_count():
    """A renewal count of Gamma times of shape a has the variance of a Poisson count divided by a."""
    conditions, _, table, observed = delayed_condition()
    escapes = int(conditions.frame["escapes"].iloc[0])
    best = table.log_rate[np.argmax(table.log_likelihood)]
    log_rate = np.tile([best, np.log(0.04)], (20_000, 1))
    counts = replicate_escapes(np.random.default_rng(5), log_rate, np.full((20_000, 1), 1e-9), observed)[:, 0]
    shape = float(observed.table_escapes[0]) / escapes
    assert 2.5 < shape < 6
    # counting whole cycles of an ordinary renewal process loses (a − 1)/(2a) of one
    lost = 0.5 * (1 - 1 / shape)
    assert counts.mean() == pytest.approx(escapes - lost, abs=4 * counts.std() / np.sqrt(20_000) + 0.15)
    assert counts.var() == pytest.approx(escapes / shape, rel=0.06)
