"""What the samplers see of a table: the same numbers, in a program that tables of other sizes share."""

import dataclasses

import jax
import numpy as np
from scipy.stats import ks_2samp

import escape_inference as ei
from escape_inference.evidence import agree
from escape_inference.inference import build_problem, fit_law, prepare
from escape_inference.law import Parameter, load_law
from escape_inference.model import (
    DEFAULT_WIDTHS,
    PriorWidths,
    build_inputs,
    build_observations,
    sample_prior,
    site_shapes,
)
from escape_inference.precision import float64
from escape_inference.problem import densities, log_likelihood_at, room_for
from escape_inference.redraw import first_sample
from escape_inference.student import at_points, draws_of


def table_of(conditions: int):
    world = ei.World(dimension=3)
    design = ei.make_design(world, runs=20, seed=2)
    names = design.drop_duplicates(["minimum", "learning_rate", "batch_size", "loss_barrier"])
    assert len(names) >= conditions
    table = ei.simulate("power_law", design, {"temperature_scale": 1.0, "effective_dimension": 3.0}, seed=2)
    keys = ["minimum", "learning_rate", "batch_size", "loss_barrier"]
    return table.merge(names[keys].head(conditions), on=keys)


@float64
def test_empty_conditions_change_nothing_and_tables_of_several_sizes_share_a_program():
    seen = []
    for conditions in (9, 14):
        problem = build_problem(load_law("power_law"), prepare(table_of(conditions)), draws=100, warmup=100)
        assert problem.observed.escapes.shape == (conditions,)
        target, everything = problem.target, np.ones(conditions)
        assert target.inputs.learning_rate.shape == (room_for(conditions),) == (40,)
        data = (target.inputs, problem.weighted(everything), DEFAULT_WIDTHS.as_arrays())
        points = problem.particles[:50]
        log_likelihoods = jax.jit(jax.vmap(densities(target.law, target.shapes)[2], in_axes=(0, None)))
        found = log_likelihoods(points, data)
        own = log_likelihood_at(problem, points)
        np.testing.assert_allclose(found, own.sum(axis=1), rtol=1e-9, atol=1e-9)
        everything[3] = 0.0  # left out: the others and nothing else remain
        data = (target.inputs, problem.weighted(everything), DEFAULT_WIDTHS.as_arrays())
        found = log_likelihoods(points, data)
        np.testing.assert_allclose(found, np.delete(own, 3, axis=1).sum(axis=1), rtol=1e-9, atol=1e-9)
        seen.append((jax.tree.structure(data), [np.shape(x) for x in jax.tree.leaves(data)]))
    assert seen[0] == seen[1]


@float64
def test_densities_at_many_points_are_those_that_the_samplers_see():
    """Under another prior and without a condition, too; and draws from the prior have its density."""
    problem, left_out = build_problem(load_law("power_law"), prepare(table_of(9)), draws=100, warmup=100), np.ones(9)
    left_out[3] = 0.0
    data = (problem.target.inputs, problem.weighted(left_out), PriorWidths(2.0, 0.5).as_arrays())
    functions = densities(problem.target.law, problem.target.shapes)
    points = np.concatenate([problem.particles[:50], draws_of(functions[3], 50, [4, 2], data)])
    for function in functions[:3]:
        one_by_one = jax.jit(jax.vmap(function, in_axes=(0, None)))(points, data)
        np.testing.assert_allclose(at_points(function, points, data), one_by_one, rtol=1e-9, atol=1e-9)
    drawn, other = (draws_of(draw, 4000, [4, 2], data) for draw in (functions[3], lambda key, d: functions[3](key, d)))
    assert (ks_2samp(drawn, other).pvalue > 1e-3).all()


@float64
def test_gradients_are_finite_where_an_unknown_loss_of_the_minimum_comes_to_lie_above_the_threshold():
    world = ei.World(dimension=2, barrier="threshold")
    table = ei.simulate_sde(world, ei.make_design(world, minima=2, learning_rates=2, runs=10, seed=1), seed=1)
    prepared, law = prepare(table.drop(columns="loss_minimum")), load_law("arrhenius")
    inputs, observed = build_inputs(law, prepared.conditions), build_observations(prepared.conditions, {})
    shapes = tuple(site_shapes(law, inputs, observed).items())
    log_joint = densities(law, shapes)[0]
    data = (inputs, observed, DEFAULT_WIDTHS.as_arrays())
    z = sample_prior(jax.random.key(0), law, inputs, observed, 200)
    place = [name for name, (shape, _) in shapes for _ in range(int(np.prod(shape)))].index("loss_minimum_base")
    z = np.array(z)
    z[:, place] = np.linspace(0.0, 6.0, 200)
    slopes = jax.jit(jax.vmap(jax.grad(log_joint), in_axes=(0, None)))(z, data)
    assert np.isfinite(slopes).all()


@float64
def test_tempered_monte_carlo_follows_a_posterior_to_where_the_prior_hardly_reaches():
    """Six of its standard deviations away, beyond the table with which the search begins."""
    prepared = prepare(table_of(9))
    frame = prepared.conditions.frame
    usual = float(np.log(frame["escapes"].sum() / frame["exposure"].sum()))
    law = dataclasses.replace(
        load_law("constant_rate"),
        parameters=(Parameter("level", 0.0, 1.0, "of order one", positive=False),),
        log_rate=lambda values, setting: usual + 3 * (values["level"] - 6) + 0 * setting.learning_rate,
    )
    problem = build_problem(law, prepared, draws=500, warmup=300)
    fit = fit_law(problem, seed=0, draws=500, warmup=300, chains=4)
    seen, level = problem.target.to_model(problem.particles)[:, 0], fit.sites["level"]
    assert fit.convergence.trustworthy
    assert level.mean() > 5
    assert abs(seen.mean() - level.mean()) < 0.5 * level.std()
    assert problem.evidence.standard_error < 0.2
    assert agree(problem.evidence, first_sample(fit, 0).evidence)
