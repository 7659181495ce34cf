"""First sight of a posterior: tempered Monte Carlo from the prior, and from it starts, scales and a fast form of the law."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

from escape_inference.evidence import Evidence, smc
from escape_inference.law import Law
from escape_inference.likelihood import Observations
from escape_inference.model import DEFAULT_WIDTHS, Inputs, PriorWidths
from escape_inference.problem import (
    BLOCK,
    SLOT_NAMES,
    Problem,
    Target,
    densities,
    prepare_likelihood,
    seen_by,
    sites_block,
    sites_of,
    table_rates,
    without_integrals,
)
from escape_inference.rate_tables import (
    CHECKED,
    EDGE,
    Box,
    blank,
    can_be_compared,
    can_be_tabulated,
    exact_minus_table,
    focus,
    in_slots,
    law_itself,
    misplaced,
    place_in_table,
    prior_scales,
    rates_in_box,
    tabulated_in,
    with_passage_tables,
)
from escape_inference.sampler import Shapes
from escape_inference.tempering import Outcome, Revise, Sampler

FEW_DIMENSIONS = 7
PARTICLES = 2000
ERROR_WANTED = 0.15  #: of the log evidence; tempered Monte Carlo is repeated until it is reached
MOST_RUNS = 12
MOVES = 64
WIDE_SDS = 4.5  #: half the width of the wide table, in standard deviations of the prior
WIDE_TOLERANCE = 0.1  #: share of the posterior that it may misplace; the evidence is corrected for it
SEEN = 0.01  #: share of a pilot near its edge with which it grows
GROWTH, MOST_SDS = 3.0, 10.0  #: by how much and to what, in standard deviations of the prior


def explore(
    law: Law,
    inputs: Inputs,
    observed: Observations,
    shapes: Shapes,
    seed: int,
    announce: Callable[[Target, Observations], None] | None = None,
    runs: int = MOST_RUNS,
) -> Problem:
    """Run tempered Monte Carlo from the prior, until the log evidence has the error that is wanted or ``runs`` are made, and prepare the sampler.

    ``announce`` is called at once with a target of the shapes that the sampler will get, so that it can be compiled meanwhile.
    """
    nothing = Evidence(float("nan"), float("nan"), "none")
    tabulated = can_be_tabulated(law, inputs, shapes)
    if tabulated:
        inputs = with_passage_tables(law, inputs, only_shipped=True)
    itself = law_itself(law, inputs, shapes)
    dim = len(itself.used)
    size = 1024 if dim <= FEW_DIMENSIONS else 2048
    problem = Problem(law, inputs, observed, shapes, inputs, inputs, itself, nothing, np.zeros((0, dim)))
    box = None
    if tabulated:  # what is needed first is compiled first
        offset, scale = prior_scales(law, inputs)
        wide, near = (blank(problem, extent) for extent in ("wide", "near"))
        _prepare_rates(problem)
        _prepare_tempered(wide, observed, size)
        prepare_likelihood(observed)
        _prepare_table(wide)
        if announce is not None:
            announce(near, seen_by(near, observed))
        box = rates_in_box(problem, offset - WIDE_SDS * scale, offset + WIDE_SDS * scale, "wide")
    revise = None
    if box is not None:
        table = tabulated_in(problem, box, np.stack([offset - scale, offset + scale]))
        scout, seen = replace(problem, prior_inputs=table, target=in_slots(table, law, offset, scale)), box

        def revise(z: np.ndarray, weight: np.ndarray) -> Any:
            nonlocal scout, seen
            if (found := _around_pilot(scout, seen, _resampled(z, weight, seed))) is None:
                return None
            scout, seen = found
            return _data(scout.target, observed)

    else:
        splines = with_passage_tables(law, inputs)
        scout = replace(problem, prior_inputs=splines, near_inputs=splines, target=law_itself(law, splines, shapes))
        _prepare_tempered(scout.target, observed, size)
        prepare_likelihood(observed)
        if announce is not None:
            announce(scout.target, observed)
    evidence, outcome = _tempered(scout.target, observed, seed, size, runs, revise)
    if box is not None:
        _prepare_table(near)
    z, weight = outcome.particles.reshape(-1, outcome.particles.shape[-1]), outcome.weights.ravel()
    scout = replace(scout, evidence=evidence, particles=_resampled(z, weight, seed))
    return focus(replace(scout, evidence=_of_the_law_itself(scout)))


def _resampled(
    z: Float[np.ndarray, "particle slot"], weight: Float[np.ndarray, " particle"], seed: int
) -> Float[np.ndarray, "particle slot"]:
    """Points of equal weight."""
    good = np.isfinite(z).all(axis=1) & np.isfinite(weight)
    chosen = np.random.default_rng(seed).choice(good.sum(), PARTICLES, p=weight[good] / weight[good].sum())
    return z[good][chosen]


def _around_pilot(
    scout: Problem, box: Box, particles: Float[np.ndarray, "particle slot"]
) -> tuple[Problem, Box] | None:
    """The table of tempered Monte Carlo made anew, best where a pilot saw the posterior and wider where it came to the edge; None if it was right."""
    if misplaced(exact_minus_table(scout, particles, DEFAULT_WIDTHS)) < WIDE_TOLERANCE:
        return None
    target, count = scout.target, len(box.low)
    offset, scale, place = target.offset[:count], target.scale[:count], place_in_table(scout, particles)
    low = np.maximum(box.low - GROWTH * scale * ((place < -EDGE).mean(axis=0) > SEEN), offset - MOST_SDS * scale)
    high = np.minimum(box.high + GROWTH * scale * ((place > EDGE).mean(axis=0) > SEEN), offset + MOST_SDS * scale)
    if (low < box.low).any() or (high > box.high).any():
        box = rates_in_box(scout, low, high, "wide") or box
    prior = np.stack([target.offset - target.scale, target.offset + target.scale])
    inputs = tabulated_in(scout, box, prior, target.to_model(particles))
    return replace(scout, target=in_slots(inputs, scout.law, target.offset, target.scale)), box


def _data(target: Target, observed: Observations) -> Any:
    """What the densities of a target take beside a point, with the prior as it is."""
    return target.inputs, seen_by(target, observed), DEFAULT_WIDTHS.as_arrays()


def _tempered(
    target: Target,
    observed: Observations,
    seed: int,
    size: int,
    runs: int,
    revise: Revise | None,
) -> tuple[Evidence, Outcome]:
    _, log_prior, log_likelihood, from_prior = densities(target.law, target.shapes)
    settings: dict[str, Any] = {"particles": size, "moves": MOVES, "replicates": runs, "wanted": ERROR_WANTED}
    return smc(log_prior, log_likelihood, from_prior, _data(target, observed), seed, revise=revise, **settings)


def _prepare_tempered(target: Target, observed: Observations, size: int) -> None:
    """Start compiling for a target of this shape."""
    _, log_prior, log_likelihood, from_prior = densities(target.law, target.shapes)
    data = _data(target, observed)
    dim = sum(int(np.prod(shape)) for _, (shape, _) in target.shapes)
    Sampler(log_prior, log_likelihood, from_prior, size, MOVES).prepare(data, dim)


def _prepare_table(target: Target) -> None:
    """Start compiling what finds the rates of a table of this shape at many points."""
    slots = dict.fromkeys(SLOT_NAMES, jax.ShapeDtypeStruct((BLOCK,), np.float64))
    table_rates.prepare(target.inputs.surrogate, slots)


def _prepare_rates(problem: Problem) -> None:
    """Start compiling what finds the law's own rates and named values at many points, if that is a program."""
    inputs, dim = problem.inputs, len(problem.target.used)
    if without_integrals(inputs):
        fixed, sites = (inputs, problem.observed, DEFAULT_WIDTHS.as_arrays()), sites_of(problem.law, problem.shapes)
        sites_block.prepare(jax.ShapeDtypeStruct((BLOCK, dim), np.float64), *fixed, sites=sites)


def _of_the_law_itself(problem: Problem) -> Evidence:
    """The evidence of the law from that of its table or spline: the mean likelihood ratio over particles of the posterior."""
    evidence = problem.evidence
    if not can_be_compared(problem):
        return evidence
    log_ratio = exact_minus_table(problem, problem.particles, PriorWidths())
    shift = logsumexp(log_ratio) - np.log(CHECKED)
    error = float(np.std(np.exp(log_ratio - shift)) / np.sqrt(CHECKED / 2))
    return replace(
        evidence,
        log_evidence=evidence.log_evidence + float(shift),
        standard_error=float(np.hypot(evidence.standard_error, error)),
    )
