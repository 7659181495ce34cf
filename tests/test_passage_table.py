"""The splines of the threshold laws against the laws themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import CubicSpline
from scipy.special import logsumexp

from escape_inference import inference, rate_tables, redraw
from escape_inference.law import Law, Parameter, Setting, load_law
from escape_inference.model import PriorWidths
from escape_inference.passage_table import (
    LOG_DIMENSIONS,
    LOG_EXCESSES,
    LOG_EXCESSES_WITH_EXPONENT,
    LOG_TEMPERATURES,
    PAD,
    RANGES_WITH_EXPONENT,
    RICHARDSON,
    STARTS,
    build_passage_table,
    tables_for,
)
from escape_inference.precision import float64
from escape_inference.rate_tables import exact_minus_table, focus, misplaced, spline_error, table_error
from escape_inference.sde import simulate_sde
from escape_inference.surrogate import LOADINGS
from escape_inference.worlds import World, make_design


def _points(count, most_dimensions, seed=2):
    rng = np.random.default_rng(seed)
    T, c_minus_1 = (np.exp(rng.uniform(*bounds, count)) for bounds in (LOG_TEMPERATURES, LOG_EXCESSES))
    return T, 1 + c_minus_1, np.exp(rng.uniform(LOG_DIMENSIONS[0], np.log(most_dimensions), count))


def _error(table, start, T, c, n, q):
    exact = np.asarray(STARTS[start](T, c, n, q))
    rate = np.asarray(table(*(jnp.asarray(x) for x in (T, c, n)), q))
    seen = (exact > -20) & (exact < 3)
    return np.abs(rate - exact)[seen]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("q", "most", "typical"), [(0.0, 1e-5, 1e-6), (1.0, 0.05, 1e-5)])
@float64
def test_the_splines_that_ship_are_the_laws(start, q, most, typical):
    error = _error(build_passage_table(start, LOG_EXCESSES, q), start, *_points(3000, 20.0), q)
    assert error.max() < most
    assert np.quantile(error, 0.9) < typical


@pytest.mark.parametrize("start", STARTS)
@float64
def test_the_spline_that_ships_for_any_noise_exponent_is_the_law(start):
    T, c, n = _points(2000, 12.0, seed=4)
    q = np.random.default_rng(5).uniform(-0.5, 2.5, len(T))
    inside = np.log(c - 1) < LOG_EXCESSES_WITH_EXPONENT[1]
    inside &= (np.log(T) < RANGES_WITH_EXPONENT[0][1]) & (np.log(n) > RANGES_WITH_EXPONENT[1][0])
    error = _error(
        build_passage_table(start, LOG_EXCESSES_WITH_EXPONENT, None), start, *(x[inside] for x in (T, c, n, q))
    )
    assert len(error) > 500
    assert error.max() < 0.3
    assert np.quantile(error, 0.9) < 1e-3


@pytest.mark.parametrize("start", STARTS)
@float64
def test_slopes_of_the_splines_are_those_of_the_laws(start):
    T, c, n = _points(500, 12.0, seed=3)
    exact = np.asarray(STARTS[start](T, c, n, 1.0))
    x = np.stack([T, c, n])[:, (exact > -15) & (exact < 3)]

    def slopes(law):
        return jax.jit(jax.grad(lambda x: jnp.sum(law(x[0], x[1], x[2], jnp.ones_like(x[0])))))(jnp.asarray(x)) * x

    table = build_passage_table(start, LOG_EXCESSES, 1.0)
    np.testing.assert_allclose(
        slopes(lambda T, c, n, q: table(T, c, n, 1.0)), slopes(STARTS[start]), atol=0.01, rtol=1e-3
    )


@float64
def test_a_difference_from_the_coarser_spline_warns_where_the_spline_is_not_accurate():
    table = build_passage_table("minimum", LOG_EXCESSES, 1.0)
    T, c, n = _points(4000, 150.0)
    exact, rate, coarse = (np.asarray(law(T, c, n, 1.0)) for law in (STARTS["minimum"], table, table.coarser))
    wrong = (np.abs(rate - exact) > 1e-3) & (exact > -20) & (exact < 3)
    assert wrong.sum() > 20
    assert np.mean(np.abs(rate - coarse)[wrong] / RICHARDSON[0] > 5e-4) > 0.95


@pytest.mark.parametrize(("name", "every"), [("coarser", 2), ("coarsest", 4)])
@float64
def test_a_coarser_spline_goes_through_some_of_the_nodes(name, every):
    """Along one line of nodes; far from its ends it does not matter how a spline ends."""
    table = build_passage_table("minimum", LOG_EXCESSES, 0.0)
    rows, (nodes, _) = np.arange(PAD, table.coefficients.shape[0] - PAD), table.coefficients.shape
    line = lambda spline, t: np.asarray(spline._spline([table.low[0] + table.step[0] * t, np.full(len(t), node)]))
    node = float(table.low[1] + table.step[1] * (PAD + 40))
    through = CubicSpline(rows[::every], line(table, rows.astype(float))[::every])
    between = np.linspace(PAD + 60.0, nodes - PAD - 60.0, 501)
    found = line(getattr(table, name), between)
    np.testing.assert_allclose(found, through(between), atol=1e-9)
    assert np.abs(found - line(table, between)).max() > 1e-7


@float64
def test_beyond_the_grid_the_splines_go_on_linearly_as_the_laws_do():
    for q, n, atol in ((0.0, 0.002, 0.01), (1.0, 0.002, 0.001)):
        table = build_passage_table("minimum", LOG_EXCESSES, q)
        T, c = np.array([0.05, 0.1, 0.3]), np.array([1.3, 2.0, 3.0])
        np.testing.assert_allclose(table(T, c, n, q), STARTS["minimum"](T, c, n, q), atol=atol)


@float64
def test_a_table_made_for_the_measurements_is_the_one_that_ships():
    made = build_passage_table("minimum", (-1.0, 0.5), 1.0, shipped=False)
    T, c, n = np.array([0.02, 0.1, 0.5]), np.array([1.5, 2.0, 2.5]), np.array([0.5, 3.0, 12.0])
    np.testing.assert_allclose(
        made(T, c, n, 1.0), build_passage_table("minimum", (-1.0, 0.5), 1.0)(T, c, n, 1.0), atol=1e-4
    )


@float64
def test_a_law_is_asked_which_noise_exponent_it_uses():
    one = jnp.ones(2)
    setting = Setting(0.1 * one, 8 * one, one, one, 0.5 * one, one, one, barrier="threshold", start="minimum")
    assert tables_for(load_law("power_law"), [(setting, 0.0)])["minimum"].coefficients.ndim == 3
    assert tables_for(load_law("arrhenius"), [(setting, 0.0)])["minimum"].coefficients.ndim == 2
    assert tables_for(load_law("noise_exponent"), [(setting, 0.0)], only_shipped=True)["minimum"].coefficients.ndim == 4
    high = dataclasses.replace(setting, log_barrier=np.log(200.0) * one)
    assert tables_for(load_law("noise_exponent"), [(high, 0.0)], only_shipped=True) == {}
    saddle = dataclasses.replace(setting, barrier="saddle")
    assert tables_for(load_law("power_law"), [(saddle, 0.0)]) == {}
    assert tables_for(load_law("constant_rate"), [(setting, 0.0)]) == {}


def measured(minima, runs):
    """Escapes over thresholds at three learning rates, ready for a fit."""
    world = World(noise="loss", dimension=2, barrier="threshold")
    return inference.prepare(
        simulate_sde(world, make_design(world, minima=minima, learning_rates=3, runs=runs, seed=1), seed=1)
    )


def usual_log_rate(prepared):
    frame = prepared.conditions.frame
    return float(np.log(frame["escapes"].sum() / frame["exposure"].sum()))


@float64
def test_where_a_spline_is_not_accurate_enough_the_integrals_take_its_place(monkeypatch):
    prepared = measured(minima=4, runs=20)
    problem = inference.build_problem(load_law("power_law"), prepared, draws=500, warmup=300)
    safe = spline_error(problem, problem.particles)
    assert 0 < safe < inference.TABLE_TOLERANCE
    with monkeypatch.context() as patch:  # how fast the error falls tells more, and the integrals all
        patch.setattr(rate_tables, "TABLE_TOLERANCE", 0.9 * safe)
        close = spline_error(problem, problem.particles)
        patch.setattr(rate_tables, "TABLE_TOLERANCE", 0.0)
        assert spline_error(problem, problem.particles) / 2 < close < 0.9 * safe
    rough = np.random.default_rng(0).normal(scale=0.3, size=problem.inputs.passage["minimum"].coefficients.shape)
    blurred = {
        start: dataclasses.replace(spline, coefficients=spline.coefficients + rough)
        for start, spline in problem.inputs.passage.items()
    }
    blurred = focus(dataclasses.replace(problem, inputs=dataclasses.replace(problem.inputs, passage=blurred)))
    assert spline_error(blurred, problem.particles) > inference.TABLE_TOLERANCE
    fits = [inference.fit_law(one, seed=0, draws=500, warmup=300, chains=4) for one in (problem, blurred)]
    assert fits[0].problem.inputs.passage is not None
    assert fits[1].problem.inputs.passage is None
    assert all(fit.convergence.trustworthy for fit in fits)
    means = [np.log(fit.sites["temperature_scale"]).mean() for fit in fits]
    assert abs(means[0] - means[1]) < 4 * np.log(fits[0].sites["temperature_scale"]).std() / np.sqrt(500)


@float64
def test_a_law_with_a_kink_is_sampled_itself_because_no_table_follows_it():
    prepared = measured(minima=2, runs=20)
    usual = usual_log_rate(prepared)
    law = Law(
        name="kinked",
        title="a rate with a corner",
        source="made for this test",
        parameters=(Parameter("bend", 0.0, 1.0, "of order one", positive=False),),
        temperature=lambda values, setting: setting.diffusion_scale,
        log_rate=lambda values, setting: usual - 5 * jnp.abs(values["bend"]) + 0 * setting.diffusion_scale,
    )
    problem = inference.build_problem(law, prepared, draws=500, warmup=300)
    fit = inference.fit_law(problem, seed=0, draws=500, warmup=300, chains=4)
    assert fit.problem.target.inputs.surrogate is None
    assert fit.convergence.trustworthy
    bend = fit.sites["bend"]
    assert bend.min() < 0 < bend.max()
    assert np.allclose(fit.sites["log_rate"][..., 0], usual - 5 * np.abs(bend) + fit.sites["log_prefactor"], atol=1e-9)


@float64
def test_where_a_table_of_few_polynomials_does_not_follow_a_law_a_finer_one_does():
    prepared = measured(minima=4, runs=60)
    usual = usual_log_rate(prepared)

    def log_rate(values, setting):
        steepness = jnp.log(setting.diffusion_scale / 0.02) + setting.log_barrier
        return usual - jnp.logaddexp(0.0, 2 * (values["one"] + steepness * values["other"]))

    law = Law(
        name="bent",
        title="rates that turn a corner, each in another direction",
        source="made for this test",
        parameters=tuple(Parameter(name, 0.0, 1.0, "of order one", positive=False) for name in ("one", "other")),
        temperature=lambda values, setting: setting.diffusion_scale,
        log_rate=log_rate,
    )
    problem = inference.build_problem(law, prepared, draws=500, warmup=300)
    near = table_error(problem, problem.particles)
    fit = inference.fit_law(problem, seed=0, draws=500, warmup=300, chains=4)
    fine = table_error(fit.problem, fit.draws.z.reshape(-1, fit.draws.z.shape[-1]))
    assert problem.extent == "near"
    assert fit.problem.extent == "fine"
    assert fit.problem.target.inputs.surrogate.core.shape[0] == LOADINGS["fine"]
    assert fine < inference.TABLE_TOLERANCE < near
    assert fit.convergence.trustworthy

    # the same for another prior, far from which the table of the posterior is of no use
    first, widths = redraw.first_sample(fit, seed=0), PriorWidths(4.0, 1.0)
    first = first._replace(problem=dataclasses.replace(first.problem, extent="near"))
    wide = redraw.with_prior(first, widths, seed=0, warmup=300, chains=4)
    chosen = np.random.default_rng(0).choice(len(wide.z), 500, p=np.exp(wide.log_weight - logsumexp(wide.log_weight)))
    error = exact_minus_table(wide.problem, wide.z[chosen], widths)
    assert wide.problem.extent == "fine"
    assert misplaced(error) < 2 * redraw.MISPLACED
    assert abs(logsumexp(error) - np.log(500)) < redraw.SHIFT
