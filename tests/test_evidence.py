"""Evidence by bridge sampling and by sequential Monte Carlo, against closed forms and quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import gammaincc, gammaln
from scipy.stats import gamma, multivariate_normal, norm

from escape_inference import tempering
from escape_inference.bend import straight
from escape_inference.evidence import Evidence, agree, bridge_log_evidence, smc_log_evidence

# Conjugate case: Gamma(2, rate 1) prior on the rate kappa, `escapes` exponential times and censored runs in `exposure`;
# unconstrained coordinate z = log kappa, Jacobian kappa.


def rate_log_prior(z, data):
    return 2 * z[0] - jnp.exp(z[0])


def rate_log_likelihood(z, data):
    undefined_below_floor = 0.0 * jnp.sqrt(jnp.exp(z[0]) - data["floor"])
    return data["escapes"] * z[0] - data["exposure"] * jnp.exp(z[0]) + undefined_below_floor


def rate_log_posterior(z, data):
    return rate_log_prior(z, data) + rate_log_likelihood(z, data)


def sample_rate_prior(key, data):
    return jnp.log(jax.random.exponential(key, (2, 1), jnp.float64).sum(axis=0))


def rate_data(escapes, exposure, floor=0.0):
    return {"escapes": float(escapes), "exposure": float(exposure), "floor": floor}


def rate_log_evidence(escapes, exposure, floor=0.0):
    complete = gammaln(escapes + 2) - (escapes + 2) * np.log1p(exposure)
    return complete + np.log(gammaincc(escapes + 2, floor * (1 + exposure)))


def rate_draws(escapes, exposure, seed, chains=4, draws=1000):
    return np.log(np.random.default_rng(seed).gamma(escapes + 2, 1 / (1 + exposure), size=(chains, draws, 1)))


# Correlated Gaussian in five dimensions with a Gaussian prior of standard deviation 2 around 0.3.

DIM = 5
ROOT = np.random.default_rng(3).normal(size=(DIM, DIM))
COVARIANCE = 0.02 * ROOT @ ROOT.T + 0.01 * np.eye(DIM)
CENTRE = np.array([0.7, -1.1, 0.2, 2.0, -0.5])
PRECISION = np.linalg.inv(COVARIANCE)
GAUSS_LOG_EVIDENCE = multivariate_normal.logpdf(CENTRE, np.full(DIM, 0.3), COVARIANCE + 4 * np.eye(DIM))


def gauss_log_prior(z):
    return jnp.sum(-0.5 * ((z - 0.3) / 2) ** 2 - jnp.log(2.0) - 0.5 * jnp.log(2 * jnp.pi))


def gauss_log_likelihood(z):
    constant = -0.5 * np.linalg.slogdet(COVARIANCE)[1] - 0.5 * DIM * np.log(2 * np.pi)
    return -0.5 * (z - CENTRE) @ PRECISION @ (z - CENTRE) + constant


def gauss_log_posterior(z):
    return gauss_log_prior(z) + gauss_log_likelihood(z)


def sample_gauss_prior(key):
    return 0.3 + 2 * jax.random.normal(key, (DIM,), jnp.float64)


def gauss_draws(seed, chains=4, draws=1000):
    covariance = np.linalg.inv(PRECISION + np.eye(DIM) / 4)
    mean = covariance @ (PRECISION @ CENTRE + 0.3 / 4)
    return np.random.default_rng(seed).multivariate_normal(mean, covariance, size=(chains, draws))


# Funnel: log variance v ~ Normal(0, 2), x | v ~ Normal(0, exp(v / 2)), one datum y ~ Normal(x, 0.5).

DATUM = 1.3


def funnel_log_prior(z):
    v, x = z
    return -0.5 * (v / 2) ** 2 - jnp.log(2.0) - 0.5 * x**2 * jnp.exp(-v) - 0.5 * v - jnp.log(2 * jnp.pi)


def funnel_log_likelihood(z):
    return -0.5 * ((DATUM - z[1]) / 0.5) ** 2 - jnp.log(0.5) - 0.5 * jnp.log(2 * jnp.pi)


def funnel_log_posterior(z):
    return funnel_log_prior(z) + funnel_log_likelihood(z)


def sample_funnel_prior(key):
    v, x = jax.random.normal(key, (2,), jnp.float64)
    return jnp.stack([2 * v, x * jnp.exp(v)])


def funnel_marginal(v):
    return norm.pdf(v, 0, 2) * norm.pdf(DATUM, 0, np.sqrt(np.exp(v) + 0.25))


FUNNEL_LOG_EVIDENCE = np.log(quad(funnel_marginal, -20, 20, epsabs=1e-12)[0])


def funnel_draws(seed, chains=4, draws=1000):
    """Exact: v by inversion of its marginal, x from its Gaussian conditional."""
    rng = np.random.default_rng(seed)
    grid = np.linspace(-20, 20, 40001)
    cumulative = np.cumsum(funnel_marginal(grid))
    v = np.interp(rng.random((chains, draws)) * cumulative[-1], cumulative, grid)
    precision = np.exp(-v) + 4
    x = 4 * DATUM / precision + rng.normal(size=v.shape) / np.sqrt(precision)
    return np.stack([v, x], axis=-1)


def test_bridge_finds_the_closed_form_evidence_of_exponential_times_within_a_hundredth():
    for escapes, exposure in ((3, 5.0), (40, 900.0), (0, 12.0)):
        data = rate_data(escapes, exposure)
        result = bridge_log_evidence(rate_log_posterior, rate_draws(escapes, exposure, 1), data=data, seed=2)
        assert abs(result.log_evidence - rate_log_evidence(escapes, exposure)) < 0.01
        assert result.standard_error < 0.01


def test_tempering_finds_the_closed_form_evidence_of_exponential_times_within_a_hundredth():
    data = rate_data(3, 5)
    result = smc_log_evidence(
        rate_log_prior, rate_log_likelihood, sample_rate_prior, data=data, seed=1, particles=65536, replicates=4
    )
    assert abs(result.log_evidence - rate_log_evidence(3, 5.0)) < 0.01
    assert result.standard_error < 0.01


def test_both_methods_agree_with_a_correlated_gaussian_in_five_dimensions():
    bridge = bridge_log_evidence(gauss_log_posterior, gauss_draws(0), seed=5)
    smc = smc_log_evidence(gauss_log_prior, gauss_log_likelihood, sample_gauss_prior, seed=5)
    assert abs(bridge.log_evidence - GAUSS_LOG_EVIDENCE) < min(3 * bridge.standard_error, 0.03)
    assert abs(smc.log_evidence - GAUSS_LOG_EVIDENCE) < min(3 * smc.standard_error, 0.4)
    assert agree(bridge, smc)


def test_both_methods_agree_with_quadrature_for_a_funnel():
    bridge = bridge_log_evidence(funnel_log_posterior, funnel_draws(0), seed=6)
    smc = smc_log_evidence(funnel_log_prior, funnel_log_likelihood, sample_funnel_prior, seed=6)
    assert abs(bridge.log_evidence - FUNNEL_LOG_EVIDENCE) < min(3 * bridge.standard_error, 0.05)
    assert abs(smc.log_evidence - FUNNEL_LOG_EVIDENCE) < min(3 * smc.standard_error, 0.2)
    assert agree(bridge, smc)


def test_bridge_error_is_honest_for_autocorrelated_draws():
    """Errors over seeds, in standard errors, have a spread near one though the draws' correlation time is about 19."""
    correlation = 0.9
    scores = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        noise = rng.normal(size=(4, 1000))
        path = np.empty_like(noise)
        path[:, 0] = noise[:, 0]
        for t in range(1, noise.shape[1]):
            path[:, t] = correlation * path[:, t - 1] + np.sqrt(1 - correlation**2) * noise[:, t]
        rates = gamma.ppf(norm.cdf(path), 5, scale=1 / 6)
        result = bridge_log_evidence(rate_log_posterior, np.log(rates)[..., None], data=rate_data(3, 5), seed=seed)
        scores.append((result.log_evidence - rate_log_evidence(3, 5.0)) / result.standard_error)
    assert 0.6 < np.sqrt(np.mean(np.square(scores))) < 1.3
    assert abs(np.mean(scores)) < 0.5


def test_tempering_error_is_honest_and_unbiased():
    data = rate_data(40, 900)
    results = [
        smc_log_evidence(rate_log_prior, rate_log_likelihood, sample_rate_prior, data=data, seed=seed)
        for seed in range(30)
    ]
    scores = np.array([(r.log_evidence - rate_log_evidence(40, 900.0)) / r.standard_error for r in results])
    assert 0.5 < np.sqrt(np.mean(scores**2)) < 1.4
    assert abs(scores.mean()) < 3 / np.sqrt(30)
    assert max(r.standard_error for r in results) < 0.3


def test_other_data_of_equal_shape_do_not_compile_again():
    traces = []

    def log_density(z, data):
        traces.append(1)
        return rate_log_posterior(z, data)

    draws = rate_draws(3, 5.0, 0, draws=100)
    first = bridge_log_evidence(log_density, draws, data=rate_data(3, 5))
    after_first = len(traces)
    second = bridge_log_evidence(log_density, draws, data=rate_data(3, 5.5), seed=4)
    assert len(traces) == after_first
    assert first.log_evidence != second.log_evidence


def test_same_seed_gives_the_same_evidence_and_another_seed_another():
    draws = rate_draws(3, 5.0, 0)
    data = rate_data(3, 5)
    first, again, other = (bridge_log_evidence(rate_log_posterior, draws, data=data, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_constrained_draws_are_exposed_by_the_second_method():
    """Draws of kappa in place of log kappa: the bridge is wrong with a small error, and the methods do not agree."""
    data = rate_data(40, 900)
    draws = rate_draws(40, 900.0, 1)
    mistaken = bridge_log_evidence(rate_log_posterior, np.exp(draws), data=data)
    smc = smc_log_evidence(rate_log_prior, rate_log_likelihood, sample_rate_prior, data=data, seed=1)
    assert not agree(mistaken, smc)
    assert agree(bridge_log_evidence(rate_log_posterior, draws, data=data), smc)


@pytest.mark.parametrize("spoil", ["stuck", "nan"])
def test_a_bridge_that_cannot_work_says_so_and_agrees_with_nothing(spoil):
    draws = rate_draws(3, 5.0, 0)
    draws = np.full_like(draws, -0.2) if spoil == "stuck" else np.where(draws == draws.max(), np.nan, draws)
    result = bridge_log_evidence(rate_log_posterior, draws, data=rate_data(3, 5))
    assert np.isnan(result.log_evidence)
    assert not agree(result, Evidence(rate_log_evidence(3, 5.0), 0.1, "smc"))


def test_a_likelihood_that_is_nan_counts_as_zero():
    """The likelihood is undefined below a rate of 0.05; the evidence is that of a truncated Gamma density."""
    data = rate_data(40, 900, floor=0.05)
    result = smc_log_evidence(rate_log_prior, rate_log_likelihood, sample_rate_prior, data=data)
    assert abs(result.log_evidence - rate_log_evidence(40, 900, 0.05)) < 3 * result.standard_error < 0.5


def test_wrong_shapes_and_sizes_are_refused():
    with pytest.raises(ValueError, match=r"chain, draw >= 4, dim"):
        bridge_log_evidence(gauss_log_posterior, np.zeros((100, DIM)))
    with pytest.raises(ValueError, match="multiple of moves"):
        smc_log_evidence(gauss_log_prior, gauss_log_likelihood, sample_gauss_prior, particles=100)


@pytest.mark.parametrize(
    ("difference", "error", "expected"),
    [(0.1, 0.05, True), (0.2, 0.05, False), (0.45, 0.2, True), (0.55, 0.2, False), (float("nan"), 0.2, False)],
)
def test_agreement_needs_three_errors_and_half_a_nat(difference, error, expected):
    assert agree(Evidence(-3.0 + difference, error * 0.6, "bridge"), Evidence(-3.0, error * 0.8, "smc")) is expected


def test_moves_do_not_use_the_random_numbers_of_the_prior_draws(monkeypatch):
    """Chains whose proposals are made of the numbers that made the prior draws would not be independent of them."""
    seen = {}

    def recorded(data, particles, weights, before, after, parents, noise, *rest, **static):
        seen.update(draws=particles.z, noise=noise)
        return particles, weights, 0.0

    def sample(key):
        raise AssertionError("its attribute is used")

    sample.draws = lambda count, rng, data: rng.standard_normal((count, 2))
    monkeypatch.setattr(tempering, "move", recorded)
    sampler = tempering.Sampler(gauss_log_prior, gauss_log_likelihood, sample, 64, 8)
    monkeypatch.setattr(tempering, "at_points", lambda density, z, data: np.zeros(len(z)))
    step = tempering.Step(1.0, straight(2), np.zeros(2), np.eye(2))
    tempering._run(sampler, None, 5, 1, lambda state, done: step)
    assert seen["noise"].size > seen["draws"].size
    assert not np.intersect1d(seen["draws"], seen["noise"]).size


def bent_log_likelihood(z):
    """A narrow ridge along a parabola."""
    return -0.5 * ((z[1] - z[0] ** 2) / 0.01) ** 2 - 0.5 * ((z[2] - z[0]) / 0.01) ** 2


def bent_marginal(x):
    """Of the first coordinate, whose prior is a standard normal as those of the others."""
    share = 0.01**2 / (1 + 0.01**2)
    return norm.pdf(x) * share * np.exp(-0.5 * (x**4 + x**2) / (1 + 0.01**2))


def test_tempering_moves_along_a_bent_ridge():
    def log_prior(z):
        return -0.5 * z @ z - 0.5 * z.size * jnp.log(2 * jnp.pi)

    def sample(key):
        return jax.random.normal(key, (4,), jnp.float64)

    exact = np.log(quad(bent_marginal, -8, 8)[0])
    found = [smc_log_evidence(log_prior, bent_log_likelihood, sample, seed=seed) for seed in range(8)]
    errors = np.array([one.log_evidence - exact for one in found])
    assert np.sqrt(np.mean(errors**2)) < 0.12  # 0.2 by chains whose steps do not follow the bend
    assert np.sqrt(np.mean((errors / [one.standard_error for one in found]) ** 2)) < 1.5
