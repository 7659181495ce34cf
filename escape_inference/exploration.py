"""First sight of a posterior: tempered Monte Carlo from the prior, and from it starts, scales and a fast form of the law."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float
from scipy.special import logsumexp

from escape_inference.evidence import Evidence, smc
from escape_inference.law import BUILT_IN_ORDER, Law, Parameter, built_in_laws
from escape_inference.likelihood import Observations, marginal_log_likelihood
from escape_inference.model import (
    DEFAULT_WIDTHS,
    LEVEL_QUANTITIES,
    MINIMUM_QUANTITIES,
    Inputs,
    Measured,
    PriorWidths,
    discrepancy_of,
    evaluate,
    known_settings,
    named_values,
    not_evaluated,
    sample_prior,
)
from escape_inference.passage_table import RICHARDSON, tables_for
from escape_inference.programs import Ahead
from escape_inference.sampler import Shapes
from escape_inference.student import at_points, normal_log_density
from escape_inference.surrogate import LOADINGS, SLOTS, Surrogate, chebyshev_points, importance_of_nodes, tabulate
from escape_inference.tempering import Outcome, Revise, Sampler

FEW_DIMENSIONS = 7
SMALLEST_ROOM = 40  #: conditions in the smallest program; compiling another takes longer than computing with as many
PARTICLES = 2000
BLOCK = 512
AT_ONCE = 32  #: points in one go of a program: what it computes of more would not stay near the processor
ERROR_WANTED = 0.15  #: of the log evidence; tempered Monte Carlo is repeated until it is reached
MOST_RUNS = 12
MOVES = 64
TABLE_TOLERANCE = 0.01  #: share of the posterior that tabulated rates may misplace, far below the noise of the draws
CHECKED = 500  #: points at which a table is compared with the law
NEAR_MARGIN = 0.8  #: half the width of the near table, in units of the range of the points
CLOSE_MARGIN = 0.65  #: the same of a fine one that is made anew, unless points came to its edge
LEAST_REACH = 1e-6  #: of the near table where all points are one
EDGE = 0.9  #: of the near table, from which points are said to come to it
WIDE_SDS = 4.5  #: half the width of the wide table, in standard deviations of the prior
WIDE_TOLERANCE = 0.1  #: share of the posterior that it may misplace; the evidence is corrected for it
SEEN = 0.01  #: share of a pilot near its edge with which it grows
GROWTH, MOST_SDS = 3.0, 10.0  #: by how much and to what, in standard deviations of the prior
LOG_DIMENSIONS = (float(np.log(0.002)), float(np.log(200.0)))
SLOT_NAMES = tuple(f"slot_{k}" for k in range(SLOTS))


@dataclass(frozen=True)
class Target:
    """A posterior as samplers see it; ``offset + scale · z[used]`` is the same point in the unconstrained space of the law."""

    law: Law
    inputs: Inputs
    shapes: Shapes
    used: np.ndarray
    offset: np.ndarray
    scale: np.ndarray

    def to_model(self, z: Float[np.ndarray, "... slot"]) -> Float[np.ndarray, "... dim"]:
        """Points in the unconstrained space of the law."""
        return self.offset + self.scale * np.asarray(z)[..., self.used]


@dataclass(frozen=True)
class Problem:
    """One law on prepared data: everything that sampling, evidence and cross-validation need.

    Attributes:
        law, inputs, observed: as in :func:`~escape_inference.model.escape_model`.
        shapes: shape of every sampled site and whether it is positive.
        prior_inputs, near_inputs: ``inputs`` with the law's rates as polynomials over the prior and near the posterior.
        target: what samplers see: the law's rates near the posterior as polynomials of standard normal slots, or the law itself
            where the settings are latent or the law has more than three parameters (with splines of its threshold rates).
        evidence: log evidence by tempered Monte Carlo.
        particles: points of ``target`` close to the posterior, ``[particle, slot]``, of equal weight.
        prior_sites: named values at draws from the prior, ``[1, draw, ...]``.
        extent: of the table near the posterior, ``near`` or ``fine``.
    """

    law: Law
    inputs: Inputs
    observed: Observations
    shapes: Shapes
    prior_inputs: Inputs
    near_inputs: Inputs
    target: Target
    evidence: Evidence
    particles: Float[np.ndarray, "particle slot"]
    prior_sites: dict[str, np.ndarray] = field(default_factory=dict)
    extent: str = "near"

    def weighted(self, weight: Float[np.ndarray, " condition"]) -> Observations:
        """What was seen as the target takes it, with other weights of the conditions."""
        return seen_by(self.target, replace(self.observed, weight=np.asarray(weight, float)))

    def without_law(self) -> "Problem":
        """The numbers alone, as NumPy arrays, without functions that another process would not find."""
        nothing: Any = None
        inputs: dict[str, Any] = {name: getattr(self, name) for name in ("inputs", "prior_inputs", "near_inputs")}
        host = jax.tree.map(np.asarray, inputs | {"observed": self.observed, "target": self.target.inputs})
        target = replace(self.target, law=nothing, inputs=host.pop("target"))
        return replace(self, law=nothing, target=target, prior_sites={}, **host)

    def with_law(self, law: Law) -> "Problem":
        """The same with its law again."""
        inputs, observed = jax.device_put((self.inputs, self.observed))
        sampled = law if self.target.inputs.surrogate is None else SLOT_LAW
        return replace(self, law=law, inputs=inputs, observed=observed, target=replace(self.target, law=sampled))


def seen_by(target: Target, observed: Observations) -> Observations:
    """What was seen, with empty conditions of weight 0 at the end for as many as the target has."""
    return _grown(observed, target.inputs.learning_rate.shape[0])


def _grown(observed: Observations, size: int) -> Observations:
    extra = size - np.shape(observed.escapes)[0]
    if not extra:
        return observed
    empty = {"escapes": 0.0, "looks": 1.0, "look_width": 1e-100, "weight": 0.0}
    grown = {name: np.pad(getattr(observed, name), (0, extra), constant_values=x) for name, x in empty.items()}
    return replace(observed, **grown)


def room_for(conditions: int) -> int:
    """The number of conditions for which programs are compiled: few different ones, so that tables share their programs.

    >>> [room_for(n) for n in (3, 36, 50, 100, 400)]
    [40, 40, 56, 112, 448]
    """
    size = max(conditions, SMALLEST_ROOM)
    step = 2 ** (int(size - 1).bit_length() - 3)
    return -(-size // step) * step


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
    tabulated = _can_be_tabulated(law, inputs, shapes)
    if tabulated:
        inputs = with_passage_tables(law, inputs, only_shipped=True)
    itself = _itself(law, inputs, shapes)
    dim = len(itself.used)
    size = 1024 if dim <= FEW_DIMENSIONS else 2048
    problem = Problem(law, inputs, observed, shapes, inputs, inputs, itself, nothing, np.zeros((0, dim)))
    box = None
    if tabulated:  # what is needed first is compiled first
        offset, scale = _prior_scales(law, inputs)
        wide, near = (_blank(problem, extent) for extent in ("wide", "near"))
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
        scout, seen = replace(problem, prior_inputs=table, target=_slots(table, law, offset, scale)), box

        def revise(z: np.ndarray, weight: np.ndarray) -> Any:
            nonlocal scout, seen
            if (found := _around_pilot(scout, seen, _resampled(z, weight, seed))) is None:
                return None
            scout, seen = found
            return _data(scout.target, observed)

    else:
        splines = with_passage_tables(law, inputs)
        scout = replace(problem, prior_inputs=splines, near_inputs=splines, target=_itself(law, splines, shapes))
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
    scout: Problem, box: "Box", particles: Float[np.ndarray, "particle slot"]
) -> tuple[Problem, "Box"] | None:
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
    return replace(scout, target=_slots(inputs, scout.law, target.offset, target.scale)), box


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
    _table_rates.prepare(target.inputs.surrogate, slots)


def _prepare_rates(problem: Problem) -> None:
    """Start compiling what finds the law's own rates and named values at many points, if that is a program."""
    inputs, dim = problem.inputs, len(problem.target.used)
    if without_integrals(inputs):
        fixed, sites = (inputs, problem.observed, DEFAULT_WIDTHS.as_arrays()), _sites_of(problem.law, problem.shapes)
        _sites_block.prepare(jax.ShapeDtypeStruct((BLOCK, dim), np.float64), *fixed, sites=sites)


def _blank(problem: Problem, extent: str) -> Target:
    """A target of the shapes that tabulated rates will have, with zeros for rates."""
    inputs, law = problem.inputs, problem.law
    parameters, offset, scale = _tabulated(law, inputs), *_prior_scales(law, inputs)
    count = len(parameters)
    rates = np.zeros((len(chebyshev_points(count, extent)), inputs.learning_rate.shape[0]))
    names, positive = tuple(p.name for p in parameters), tuple(p.positive for p in parameters)
    table = tabulate(rates, offset[:count], scale[:count], names, positive, extent)
    return _slots(replace(inputs, surrogate=table, passage=None), law, offset, scale)


def focus(problem: Problem, points: Float[np.ndarray, "point slot"] | None = None) -> Problem:
    """The same problem with the law's rates tabulated around some points of the target (the particles), if they are tabulated at all."""
    target, points = problem.target, problem.particles if points is None else points
    if target.inputs.surrogate is None:
        return problem
    z = target.to_model(points)
    low, high = z.min(axis=0), z.max(axis=0)
    again = target.inputs.surrogate.core.shape[0] == LOADINGS["fine"] and not at_edge(problem, points)
    margin = CLOSE_MARGIN if again else NEAR_MARGIN
    middle, reach = (low + high) / 2, margin * (high - low) + LEAST_REACH
    box = rates_in_box(problem, middle - reach, middle + reach, problem.extent)
    if box is None:
        return problem
    table = tabulated_in(problem, box, z)
    return replace(problem, near_inputs=table, target=_slots(table, problem.law, target.offset, target.scale))


def at_edge(problem: Problem, points: Float[np.ndarray, "point slot"]) -> bool:
    """Whether some points of the target come to the edge of the region where the law's rates are tabulated."""
    return bool(np.any(np.abs(place_in_table(problem, points)) > EDGE))


def place_in_table(problem: Problem, points: Float[np.ndarray, "point slot"]) -> Float[np.ndarray, "point parameter"]:
    """Places of points of the target in the region where the law's rates are tabulated, between −1 and 1; none without a table."""
    table, count = problem.target.inputs.surrogate, len(problem.target.used) - 2
    if table is None:
        return np.zeros((len(points), 0))
    return (points[:, :count] - np.asarray(table.center)[:count]) / np.asarray(table.half_width)[:count]


def with_passage_tables(law: Law, inputs: Inputs, only_shipped: bool = False) -> Inputs:
    """The threshold laws as splines, so that neither tables nor samplers need integrate; perhaps only if all that are needed ship."""
    if "threshold" not in inputs.barriers:
        return inputs
    plain = jax.tree.map(np.asarray, replace(inputs, surrogate=None, passage=None))
    spread = float(np.hypot(*(plain.measured[name].spread.max() for name in ("loss_minimum", "loss_barrier"))))
    settings = [(setting, spread) for _, setting, _ in known_settings(plain)]
    tables = tables_for(law, settings, only_shipped)
    return replace(inputs, passage=tables) if tables else inputs


def without_integrals(inputs: Inputs) -> bool:
    """Whether the law's rates at these inputs are closed forms and splines."""
    return all(barrier == "saddle" or start in (inputs.passage or {}) for barrier, start, *_ in inputs.groups)


def with_integrals(problem: Problem) -> Problem:
    """The same problem with the integrals themselves in place of the splines that ship."""
    return replace(problem, inputs=replace(problem.inputs, passage=None))


def without_table(problem: Problem, points: Float[np.ndarray, "point slot"]) -> Problem:
    """The same problem with the law itself in place of its table, for rates that polynomials do not follow; points of the target move along."""
    target = _itself(problem.law, problem.inputs, problem.shapes)
    return replace(problem, near_inputs=problem.inputs, target=target, particles=problem.target.to_model(points))


def _itself(law: Law, inputs: Inputs, shapes: Shapes) -> Target:
    dim = int(sum(np.prod(shape) for _, (shape, _) in shapes))
    return Target(law, inputs, shapes, np.arange(dim), np.zeros(dim), np.ones(dim))


@lru_cache(maxsize=64)
def densities(law: Law, shapes: Shapes) -> tuple[Callable[..., Array], ...]:
    """Log joint, prior and likelihood as functions of (z, data), and a draw from the prior.

    Their identity is stable, so that nothing compiles twice; ``data`` is ``(inputs, observed, widths)``.
    """

    @jax.jit  # traced once, however often a sampler refers to it
    def value(z: Array, data: Any) -> tuple[Array, Array]:
        inputs, observed, widths = data
        one = evaluate(z, law, dict(shapes), inputs, observed, widths)
        return one.log_prior, jnp.sum(jnp.where(observed.weight > 0, one.log_likelihood, 0.0))

    def log_prior(z: Array, data: Any) -> Array:
        return value(z, data)[0]

    def log_likelihood(z: Array, data: Any) -> Array:
        return value(z, data)[1]

    def log_joint(z: Array, data: Any) -> Array:
        return sum(value(z, data), jnp.zeros(()))

    def from_prior(key: Array, data: Any) -> Array:
        inputs, observed, widths = data
        return sample_prior(key, law, inputs, observed, 1, widths)[0]

    functions: tuple[Any, ...] = log_joint, log_prior, log_likelihood, from_prior
    if law is SLOT_LAW:  # from programs that there are in any case
        functions[1].at_points, functions[2].at_points = _slot_log_priors, _slot_log_likelihoods
        functions[3].draws = lambda count, rng, data: _slot_scale(data) * rng.standard_normal((count, SLOTS + 2))
    functions[0].at_points = lambda z, data: at_points(log_prior, z, data) + at_points(log_likelihood, z, data)
    for function in functions:
        _described(function, law, shapes)
    return functions


def _slot_scale(data: Any) -> np.ndarray:
    """Standard deviations of the prior of the slots, the log prefactor and the discrepancy's normal variable."""
    return np.append(np.full(SLOTS + 1, float(data[2].parameters)), 1.0)


def _slot_log_priors(z: Float[np.ndarray, "point slot"], data: Any) -> Float[np.ndarray, " point"]:
    return normal_log_density(z, 0.0, _slot_scale(data)).sum(axis=1)


def _slot_log_likelihoods(z: Float[np.ndarray, "point slot"], data: Any) -> Float[np.ndarray, " point"]:
    inputs, observed, widths = data
    return _of_table(inputs.surrogate, z, widths, observed)[:, np.asarray(observed.weight) > 0].sum(axis=1)


def _of_table(
    table: Surrogate, z: Float[np.ndarray, "point slot"], widths: PriorWidths, observed: Observations
) -> Float[np.ndarray, "point condition"]:
    """Log-likelihoods by tabulated rates."""
    rates = _in_blocks(lambda *x: _table_rates(table, dict(zip(SLOT_NAMES, x, strict=True))), *z.T[:SLOTS])
    sigma = discrepancy_of(np.ascontiguousarray(z[:, SLOTS + 1]), widths.discrepancy)
    return _log_likelihoods(rates + z[:, SLOTS, None], sigma, observed)


def named_values_at(
    problem: Problem, inputs: Inputs, z: Float[np.ndarray, "draw dim"], widths: PriorWidths = DEFAULT_WIDTHS
) -> dict[str, np.ndarray]:
    """Named values at many points of the law's unconstrained space, ``[draw, ...]``, with the rates of these inputs."""
    if without_integrals(problem.inputs):  # the law is as fast as its tables, which vary in shape
        inputs = problem.inputs
    fixed, sites = (inputs, problem.observed, widths.as_arrays()), _sites_of(problem.law, problem.shapes)
    return _in_blocks(lambda part: _sites_block(part, *fixed, sites=sites), np.asarray(z))


def log_likelihood_at(
    problem: Problem,
    z: Float[np.ndarray, "point slot"],
    widths: PriorWidths = DEFAULT_WIDTHS,
    values: dict[str, np.ndarray] | None = None,
) -> Float[np.ndarray, "point condition"]:
    """Log-likelihoods of the conditions at points of the target, as the target itself has them; ``values`` are named values there, if known."""
    if (table := problem.target.inputs.surrogate) is not None:
        return _of_table(table, z, widths, problem.observed)
    values = values or named_values_at(problem, problem.near_inputs, problem.target.to_model(z), widths)
    return _log_likelihoods(values["log_rate"], values["discrepancy"], problem.observed)


@lru_cache(maxsize=64)
def _sites_of(law: Law, shapes: Shapes) -> Callable[..., dict[str, Array]]:
    """Named values at a point; its identity is stable."""

    def sites(z: Array, *fixed: Any) -> dict[str, Array]:
        return named_values(z, law, dict(shapes), *fixed)

    return _described(sites, law, shapes)


@partial(Ahead, static=("sites",))
def _sites_block(
    z: Array, inputs: Inputs, observed: Observations, widths: PriorWidths, *, sites: Callable[..., dict[str, Array]]
) -> dict[str, Array]:
    return jax.lax.map(lambda point: sites(point, inputs, observed, widths), z, batch_size=AT_ONCE)


def _log_likelihoods(
    log_rate: ArrayLike, discrepancy: ArrayLike, observed: Observations
) -> Float[np.ndarray, "point condition"]:
    """By one program for about as many conditions, whatever the law."""
    rates, count = np.asarray(log_rate), np.shape(observed.escapes)[0]
    seen = _grown(observed, room_for(count))
    rates = np.pad(rates[:, :count], ((0, 0), (0, seen.escapes.shape[0] - count)))
    return _in_blocks(lambda rate, sigma: _likelihood_block(rate, sigma, seen), rates, discrepancy)[:, :count]


def _in_blocks(function: Callable[..., Any], *arrays: Any) -> Any:
    """A function of many points in blocks of one size, so that it compiles once."""
    count = len(arrays[0])
    blocks = -(-count // BLOCK)
    index = np.minimum(np.arange(blocks * BLOCK), count - 1).reshape(blocks, BLOCK)
    parts = [function(*(np.asarray(x)[own] for x in arrays)) for own in index]
    return jax.tree.map(lambda *x: np.concatenate([np.asarray(part) for part in x])[:count], *parts)


def prepare_likelihood(observed: Observations) -> None:
    """Start compiling what :func:`log_likelihood_at` needs for every law."""
    seen = _grown(observed, room_for(len(observed.escapes)))
    rates, sigma = (jax.ShapeDtypeStruct(shape, np.float64) for shape in ((BLOCK, len(seen.escapes)), (BLOCK,)))
    _likelihood_block.prepare(rates, sigma, seen)


@Ahead
def _likelihood_block(
    log_rate: Float[Array, "point condition"], discrepancy: Float[Array, " point"], observed: Observations
) -> Float[Array, "point condition"]:
    """The same program for all laws; all points in one go wait for the one that needs most."""
    return jax.lax.map(
        lambda x: marginal_log_likelihood(x[0], x[1], observed), (log_rate, discrepancy), batch_size=AT_ONCE
    )


def table_error(
    problem: Problem, points: Float[np.ndarray, "point slot"], widths: PriorWidths = DEFAULT_WIDTHS
) -> float:
    """Share of the posterior that tabulated rates put in the wrong place, from draws of the target.

    Where settings are latent it is not known and counts as 0.
    """
    return misplaced(exact_minus_table(problem, points, widths)) if _can_be_compared(problem) else 0.0


def spline_error(problem: Problem, points: Float[np.ndarray, "point slot"]) -> float:
    """The same for the splines that ship, estimated from coarser ones or, where that is not small, found by the integrals; 0 without them."""
    tables, model = problem.inputs.passage, problem.target.to_model(_spread_out(points))
    if not tables:
        return 0.0
    total = lambda passage: _total(
        replace(problem, inputs=replace(problem.inputs, passage=passage)), model, DEFAULT_WIDTHS
    )
    own = total(tables)
    step = own - (coarser := total({start: table.coarser for start, table in tables.items()}))
    error = misplaced(step / RICHARDSON[0])
    if error > TABLE_TOLERANCE:  # if it fell no faster than it must; how fast did it fall?
        before = coarser - total({start: table.coarsest for start, table in tables.items()})
        error = misplaced(step / np.clip(before.std() / step.std(), *RICHARDSON))
    return error if error <= TABLE_TOLERANCE else misplaced(own - total(None))


def misplaced(error: Float[np.ndarray, " draw"]) -> float:
    """Total variation between a density and the one that it should be, from the errors of its logarithm at draws of it.

    No expectation of a function between 0 and 1 differs by more. A constant error does not count; one that is not a number counts as 1.

    >>> round(misplaced(np.log([1.0, 3.0]) + 5.0), 3), misplaced(np.array([0.0, np.nan]))
    (0.25, 1.0)
    """
    if np.isnan(error).any() or not np.isfinite(shift := logsumexp(error)):
        return 1.0
    return float(0.5 * np.mean(np.abs(len(error) * np.exp(error - shift) - 1)))


def _can_be_compared(problem: Problem) -> bool:
    """Whether samplers see a table or spline of rates, at settings that are known without error."""
    inputs = problem.target.inputs
    names = [*(p.name for p in _tabulated(problem.law, problem.inputs)), "log_prefactor", "discrepancy_base"]
    known = [name for name, _ in problem.shapes] == names
    return known and (inputs.surrogate is not None or inputs.passage is not None)


def _of_the_law_itself(problem: Problem) -> Evidence:
    """The evidence of the law from that of its table or spline: the mean likelihood ratio over particles of the posterior."""
    evidence = problem.evidence
    if not _can_be_compared(problem):
        return evidence
    log_ratio = exact_minus_table(problem, problem.particles, PriorWidths())
    shift = logsumexp(log_ratio) - np.log(CHECKED)
    error = float(np.std(np.exp(log_ratio - shift)) / np.sqrt(CHECKED / 2))
    return replace(
        evidence,
        log_evidence=evidence.log_evidence + float(shift),
        standard_error=float(np.hypot(evidence.standard_error, error)),
    )


def exact_minus_table(
    problem: Problem, points: Float[np.ndarray, "point slot"], widths: PriorWidths
) -> Float[np.ndarray, " checked"]:
    """Log-likelihood by the law minus that by its table or spline, at as many of the points as are checked."""
    z = _spread_out(points)
    return _total(problem, problem.target.to_model(z), widths) - log_likelihood_at(problem, z, widths).sum(axis=1)


def _spread_out(points: np.ndarray) -> np.ndarray:
    """As many of the points as are checked, evenly chosen."""
    return points[np.linspace(0, len(points) - 1, CHECKED).astype(int)]


def _total(problem: Problem, model: np.ndarray, widths: PriorWidths) -> Float[np.ndarray, " point"]:
    """Log-likelihood of all conditions at points of the law's unconstrained space, by the law's own rates."""
    count = len(problem.target.used) - 2
    sigma = discrepancy_of(model[:, count + 1], widths.discrepancy)
    return _log_likelihoods(_law_rates(problem, model) + model[:, [count]], sigma, problem.observed).sum(axis=1)


@Ahead
def _table_rates(table: Surrogate, slots: dict[str, Array]) -> Float[Array, "point condition"]:
    return jax.lax.map(table, slots, batch_size=AT_ONCE)


@dataclass(frozen=True)
class Box:
    """The law's log rates at the nodes of a table of some extent, which reaches from ``low`` to ``high`` in unconstrained space."""

    low: Float[np.ndarray, " parameter"]
    high: Float[np.ndarray, " parameter"]
    extent: str
    rates: Float[np.ndarray, "node condition"]


def rates_in_box(
    problem: Problem, low: Float[np.ndarray, " dim"], high: Float[np.ndarray, " dim"], extent: str
) -> Box | None:
    """Rates between two corners, or None where they are not finite there."""
    parameters = _tabulated(problem.law, problem.inputs)
    count = len(parameters)
    low, high = low[:count].copy(), high[:count].copy()
    for i, p in enumerate(parameters):
        if p.name == "effective_dimension":
            low[i], high[i] = max(low[i], LOG_DIMENSIONS[0]), min(high[i], LOG_DIMENSIONS[1])
    place = chebyshev_points(count, extent)
    place[:, high - low <= 2 * LEAST_REACH] = 0.0  # a parameter that is held: one value of it
    place, rows = np.unique(place, axis=0, return_inverse=True)
    rates = _law_rates(problem, (low + high) / 2 + (high - low) / 2 * place)[rows.ravel()]
    return Box(low, high, extent, rates) if np.isfinite(rates).all() else None


def tabulated_in(problem: Problem, box: Box, *where: Float[np.ndarray, "point dim"]) -> Inputs:
    """Inputs with the law's rates as polynomials over a box, best where the points are."""
    parameters, extent = _tabulated(problem.law, problem.inputs), box.extent
    names, positive = tuple(p.name for p in parameters), tuple(p.positive for p in parameters)
    middle, half_width = (box.low + box.high) / 2, (box.high - box.low) / 2
    places = [(points[:, : len(middle)] - middle) / half_width for points in where]
    importance = np.sum([importance_of_nodes(place, extent) for place in places], axis=0)
    table = tabulate(box.rates, middle, half_width, names, positive, extent, importance)
    return replace(problem.inputs, surrogate=table, passage=None)


def _law_rates(problem: Problem, z: Float[np.ndarray, "point parameter"]) -> Float[np.ndarray, "point condition"]:
    """The law's own log rates at points whose first coordinates are its parameters, all conditions and points at once."""
    law, inputs = problem.law, problem.inputs
    parameters = _tabulated(law, inputs)
    if without_integrals(inputs):
        model = np.pad(z[:, : len(parameters)], ((0, 0), (0, 2)))  # no prefactor
        return named_values_at(problem, inputs, model)["log_rate"]
    values = {p.name: np.exp(column) if p.positive else column for p, column in zip(parameters, z.T, strict=False)}
    parts = []  # integrals: those of all points and conditions in blocks of their own
    columns = {name: jax.device_put(value[:, None]) for name, value in values.items()}
    for part, setting, carried in known_settings(jax.tree.map(np.asarray, inputs)):
        shape = (len(z), part.stop - part.start)
        try:
            rates = jnp.broadcast_to(law.log_rate(columns | carried, setting), shape)
        except (TypeError, ValueError):  # a law that cannot take a column of values for each parameter
            rates = jax.jit(jax.vmap(lambda one: law.log_rate(one | carried, setting)))(values)  # noqa: B023
        parts.append(np.asarray(rates))
    return np.concatenate(parts, axis=1)


def _described(function: Any, law: Law, shapes: Shapes) -> Any:
    """A function of a law with a text that says all about it, if the law ships; others may depend on any file."""
    if law is SLOT_LAW or (law.name in BUILT_IN_ORDER and built_in_laws().get(law.name) is law):
        function.stored_as = f"{function.__name__} of {law.name} {shapes}"
    return function


def _tabulated(law: Law, inputs: Inputs) -> list[Parameter]:
    """The law's sampled parameters, in the order of the unconstrained vector."""
    carried = inputs.dimension_carried == "all"
    return [p for p in law.parameters_for(inputs.barriers) if not (carried and p.name == "effective_dimension")]


def _can_be_tabulated(law: Law, inputs: Inputs, shapes: Shapes) -> bool:
    """One to three parameters, and every setting known without error."""
    names = [p.name for p in _tabulated(law, inputs)]
    return 1 <= len(names) <= SLOTS and [name for name, _ in shapes] == [*names, "log_prefactor", "discrepancy_base"]


def _prior_scales(law: Law, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Centres and standard deviations of the prior in unconstrained space."""
    parameters = _tabulated(law, inputs)
    medians = [float(inputs.medians[p.name]) for p in parameters]
    centers = [np.log(m) if p.positive else m for p, m in zip(parameters, medians, strict=True)]
    return np.array([*centers, 0.0, 0.0]), np.array([*(p.width for p in parameters), 1.0, 1.0])


def _slots(table: Inputs, law: Law, offset: np.ndarray, scale: np.ndarray) -> Target:
    """The target of standard normal slots: equal for all laws, and tables of about as many conditions, but for the numbers in it."""
    surrogate = table.surrogate
    assert surrogate is not None
    count = len(surrogate.names)
    move = np.concatenate([offset[:count], np.zeros(SLOTS - count)])
    stretch = np.concatenate([scale[:count], np.ones(SLOTS - count)])
    conditions, room = table.learning_rate.shape[0], room_for(table.learning_rate.shape[0])
    in_slots = replace(
        surrogate,
        center=(np.asarray(surrogate.center) - move) / stretch,
        half_width=np.asarray(surrogate.half_width) / stretch,
        loadings=np.pad(surrogate.loadings, ((0, room - conditions), (0, 0))),
        names=SLOT_NAMES,
        positive=(False,) * SLOTS,
    )
    nothing, each, which = Measured(np.zeros(1), np.zeros(1), np.zeros(0, int)), np.zeros(room), np.zeros(room, int)
    inputs = Inputs(
        learning_rate=each,
        batch_size=each,
        check_interval=each,
        minimum=which,
        level=which,
        level_minimum=which[:1],
        measured=dict.fromkeys((*MINIMUM_QUANTITIES, *LEVEL_QUANTITIES), nothing),
        dimension_measured=np.zeros(1, bool),
        medians={name: np.zeros(()) for name in SLOT_NAMES},
        groups=(("saddle", "minimum", 0, room),),
        dimension_carried="none",
        surrogate=in_slots,
    )
    shapes = tuple((name, ((), False)) for name in (*SLOT_NAMES, "log_prefactor", "discrepancy_base"))
    used = np.array([*range(count), SLOTS, SLOTS + 1])
    return Target(SLOT_LAW, inputs, shapes, used, offset, scale)


SLOT_LAW = Law(
    name="tabulated",
    title="a law as a table",
    source="the law that was tabulated",
    parameters=tuple(Parameter(name, 0.0, 1.0, "in units of the prior", positive=False) for name in SLOT_NAMES),
    log_rate=not_evaluated,
    temperature=not_evaluated,
)
