"""Leave-one-condition-out against the exact scores of a conjugate model, ArviZ, and a general optimiser."""

import arviz_stats
import numpy as np
import pytest
from arviz_base import from_dict
from scipy.optimize import minimize
from scipy.stats import norm

from escape_inference.cross_validation import (
    LeaveOneOut,
    difference,
    leave_one_out,
    needs_refit,
    pareto_limit,
    stacking_weights,
    with_refits,
)

# y ~ Normal(μ, 0.8), μ ~ Normal(0.3, 2): posterior and every leave-one-out score in closed form

NOISE, PRIOR_MEAN, PRIOR_SD = 0.8, 0.3, 2.0
OUTLIER = 6.5
DATA = np.array([1.1, 0.4, 1.9, -0.6, 0.8, 2.3, 1.0, 0.1, 1.4, 0.7])


def posterior(data, prior_sd=PRIOR_SD):
    precision = len(data) / NOISE**2 + prior_sd**-2
    return (data.sum() / NOISE**2 + PRIOR_MEAN / prior_sd**2) / precision, precision**-0.5


def exact_scores(data, prior_sd=PRIOR_SD):
    scores = []
    for i in range(len(data)):
        mean, sd = posterior(np.delete(data, i), prior_sd)
        scores.append(norm.logpdf(data[i], mean, np.hypot(sd, NOISE)))
    return np.array(scores)


def draws(data, seed=0, prior_sd=PRIOR_SD, chains=4, count=2000):
    return np.random.default_rng(seed).normal(*posterior(data, prior_sd), size=(chains, count))


def log_likelihood(mean, data=DATA):
    return norm.logpdf(data, mean[..., None], NOISE)


def test_scores_are_those_of_the_conjugate_model_within_their_monte_carlo_error():
    runs = np.array([leave_one_out(log_likelihood(draws(DATA, seed))).pointwise for seed in range(20)])
    error = runs.std(axis=0, ddof=1)
    assert error.max() < 0.01
    assert (np.abs(runs[0] - exact_scores(DATA)) < 5 * error).all()
    # and without a bias that the spread would hide
    assert (np.abs(runs.mean(axis=0) - exact_scores(DATA)) < 4 * error / np.sqrt(20) + 2e-4).all()


def test_the_order_of_chains_and_draws_does_not_matter():
    values = log_likelihood(draws(DATA))
    shuffled = np.random.default_rng(1).permutation(values.reshape(-1, 10)).reshape(values.shape)
    np.testing.assert_allclose(leave_one_out(shuffled).pointwise, leave_one_out(values).pointwise, rtol=1e-10)


def test_scores_and_pareto_shapes_are_those_of_arviz():
    data = np.append(DATA, 4.4)
    values = log_likelihood(draws(data), data)
    ours = leave_one_out(values)
    tree = from_dict({"posterior": {"mean": draws(data)}, "log_likelihood": {"y": values}})
    theirs = arviz_stats.loo(tree, pointwise=True, reff=1.0)
    np.testing.assert_allclose(ours.pointwise, theirs.elpd_i.values, atol=1e-8)
    np.testing.assert_allclose(ours.pareto_k, theirs.pareto_k.values, atol=1e-8)
    assert ours.elpd == pytest.approx(float(theirs.elpd), abs=1e-8)
    # of the two conventions for a variance the larger one
    n = len(data)
    assert min(abs(ours.standard_error / theirs.se - factor) for factor in (1.0, np.sqrt(n / (n - 1)))) < 1e-8


def test_the_standard_error_is_that_of_a_sum_over_conditions():
    loo = LeaveOneOut(np.array([-1.0, -2.5, -0.5, -4.0]), np.zeros(4), np.zeros(4, bool))
    assert loo.elpd == -8.0
    mean = -2.0
    expected = np.sqrt(4 * sum((x - mean) ** 2 for x in loo.pointwise) / 3)
    assert loo.standard_error == pytest.approx(expected)
    assert np.isnan(LeaveOneOut(np.array([-1.0]), np.zeros(1), np.zeros(1, bool)).standard_error)


def test_weighted_draws_score_another_prior():
    """Draws under prior sd 2, weights for prior sd 0.5."""
    scores = []
    for seed in range(10):
        mean = draws(DATA, seed)
        log_weight = (norm.logpdf(mean, PRIOR_MEAN, 0.5) - norm.logpdf(mean, PRIOR_MEAN, PRIOR_SD)).ravel()
        scores.append(leave_one_out(log_likelihood(mean), log_weight).pointwise)
    error = np.std(scores, axis=0, ddof=1)
    exact = exact_scores(DATA, 0.5)
    assert (np.abs(np.mean(scores, axis=0) - exact) < 4 * error / np.sqrt(10) + 3e-4).all()
    assert np.abs(exact - exact_scores(DATA)).max() > 0.05


def test_a_constant_in_the_weights_changes_nothing():
    values, log_weight = log_likelihood(draws(DATA)), np.random.default_rng(2).normal(size=8000)
    one, two = leave_one_out(values, log_weight), leave_one_out(values, log_weight + 700.0)
    np.testing.assert_allclose(one.pointwise, two.pointwise, rtol=1e-9)
    np.testing.assert_allclose(one.pareto_k, two.pareto_k, atol=1e-6)


def test_a_condition_that_one_draw_decides_has_a_high_pareto_shape_and_is_refitted_exactly():
    data = np.append(DATA, OUTLIER)
    loo = leave_one_out(log_likelihood(draws(data), data))
    assert needs_refit(loo, 8000).tolist() == [10]
    assert loo.pareto_k[10] > 0.7
    without = log_likelihood(draws(DATA, 3, count=50_000), data)[..., 10].ravel()
    mended = with_refits(loo, {10: (without, np.zeros(without.size))})
    exact = exact_scores(data)
    spread = np.exp(without - without.max())
    error = spread.std() / spread.mean() / np.sqrt(without.size)
    assert abs(mended.pointwise[10] - exact[10]) < 4 * error < 0.1
    assert mended.refitted.tolist() == [False] * 10 + [True]
    assert not loo.refitted.any() and loo.pointwise[10] != mended.pointwise[10]
    np.testing.assert_array_equal(mended.pointwise[:10], loo.pointwise[:10])


def test_a_refit_can_carry_weights_for_another_prior():
    mean = draws(DATA[:-1], 5).ravel()
    log_weight = norm.logpdf(mean, PRIOR_MEAN, 0.5) - norm.logpdf(mean, PRIOR_MEAN, PRIOR_SD)
    loo = leave_one_out(log_likelihood(draws(DATA)))
    mended = with_refits(loo, {9: (norm.logpdf(DATA[9], mean, NOISE), log_weight)})
    assert mended.pointwise[9] == pytest.approx(exact_scores(DATA, 0.5)[9], abs=0.01)


def test_a_refit_is_asked_for_from_the_limit_on_and_where_the_shape_is_unknown():
    assert pareto_limit(4000) == 0.7
    assert pareto_limit(100) == pytest.approx(0.5)
    shapes = np.array([0.69, 0.7, 0.71, np.nan, np.inf, -np.inf])
    loo = LeaveOneOut(np.zeros(6), shapes, np.zeros(6, bool))
    assert needs_refit(loo, 4000).tolist() == [1, 2, 3, 4]
    assert needs_refit(loo, 100).tolist() == [0, 1, 2, 3, 4]


def test_a_condition_that_tells_nothing_needs_no_smoothing():
    values = np.full((4, 500, 2), -3.0)
    values[..., 1] += np.linspace(0, 0.02, 2000).reshape(4, 500)
    loo = leave_one_out(values)
    assert loo.pointwise[0] == pytest.approx(-3.0)
    assert loo.pointwise[1] == pytest.approx(-np.log(np.exp(-values[..., 1]).mean()), abs=1e-12)
    assert needs_refit(loo, 2000).size == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_draw_that_rules_a_condition_out_calls_for_a_refit():
    values = log_likelihood(draws(DATA))
    values[2, 17, 4] = -np.inf
    loo = leave_one_out(values)
    assert 4 in needs_refit(loo, 8000)


def test_a_difference_is_paired_over_conditions():
    first = LeaveOneOut(np.array([-1.0, -2.0, -4.0]), np.zeros(3), np.zeros(3, bool))
    second = LeaveOneOut(np.array([-1.5, -2.2, -5.7]), np.zeros(3), np.zeros(3, bool))
    gap, error = difference(first, second)
    gaps = np.array([0.5, 0.2, 1.7])
    assert gap == pytest.approx(2.4)
    assert error == pytest.approx(np.sqrt(3 * ((gaps - 0.8) ** 2).sum() / 2))
    assert difference(second, first) == pytest.approx((-gap, error))
    assert difference(first, first) == (0.0, 0.0)


def log_score(weights, pointwise):
    return np.log(weights @ np.exp(pointwise)).sum()


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("laws", [2, 4])
def test_stacking_weights_are_the_optimum_of_a_general_optimiser(seed, laws):
    pointwise = np.random.default_rng(seed).normal(-2, 0.7, (laws, 30))
    weights = stacking_weights(pointwise)
    assert weights.sum() == pytest.approx(1.0) and (weights >= 0).all()
    best = minimize(
        lambda w: -log_score(w, pointwise),
        np.full(laws, 1 / laws),
        bounds=[(0, 1)] * laws,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert log_score(weights, pointwise) == pytest.approx(-best.fun, abs=2e-4)
    np.testing.assert_allclose(weights, best.x, atol=0.01)


def test_stacking_does_not_mind_conditions_of_very_different_scores():
    """A term common to all laws, condition by condition, moves no weight, however small the densities."""
    pointwise = np.random.default_rng(5).normal(-2, 0.7, (3, 20))
    shift = np.linspace(-2000, 0, 20)
    np.testing.assert_allclose(stacking_weights(pointwise + shift), stacking_weights(pointwise), rtol=1e-9)


def test_laws_that_predict_the_same_share_the_weight():
    pointwise = np.tile(np.random.default_rng(6).normal(-2, 1, 12), (2, 1))
    np.testing.assert_allclose(stacking_weights(pointwise), [0.5, 0.5])
