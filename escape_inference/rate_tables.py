"""A law's rates as tables over boxes of its parameters: where they are made, and how far they are from the law."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

from escape_inference.law import Law, Parameter
from escape_inference.model import (
    DEFAULT_WIDTHS,
    LEVEL_QUANTITIES,
    MINIMUM_QUANTITIES,
    Inputs,
    Measured,
    PriorWidths,
    discrepancy_of,
    known_settings,
)
from escape_inference.passage_table import RICHARDSON, tables_for
from escape_inference.problem import (
    SLOT_LAW,
    SLOT_NAMES,
    Problem,
    Target,
    log_likelihood_at,
    log_likelihoods,
    named_values_at,
    room_for,
    without_integrals,
)
from escape_inference.sampler import Shapes
from escape_inference.surrogate import LOADINGS, SLOTS, chebyshev_points, importance_of_nodes, tabulate

TABLE_TOLERANCE = 0.01  #: share of the posterior that tabulated rates may misplace, far below the noise of the draws
CHECKED = 500  #: points at which a table is compared with the law
NEAR_MARGIN = 0.8  #: half the width of the near table, in units of the range of the points
CLOSE_MARGIN = 0.65  #: the same of a fine one that is made anew, unless points came to its edge
LEAST_REACH = 1e-6  #: of the near table where all points are one
EDGE = 0.9  #: of the near table, from which points are said to come to it
LOG_DIMENSIONS = (float(np.log(0.002)), float(np.log(200.0)))


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
    parameters = tabulated_parameters(problem.law, problem.inputs)
    count = len(parameters)
    low, high = low[:count].copy(), high[:count].copy()
    for i, p in enumerate(parameters):
        if p.name == "effective_dimension":
            low[i], high[i] = max(low[i], LOG_DIMENSIONS[0]), min(high[i], LOG_DIMENSIONS[1])
    place = chebyshev_points(count, extent)
    place[:, high - low <= 3 * LEAST_REACH] = 0.0  # a parameter that is held: one value of it
    place, rows = np.unique(place, axis=0, return_inverse=True)
    rates = _law_rates(problem, (low + high) / 2 + (high - low) / 2 * place)[rows.ravel()]
    return Box(low, high, extent, rates) if np.isfinite(rates).all() else None


def tabulated_in(problem: Problem, box: Box, *where: Float[np.ndarray, "point dim"]) -> Inputs:
    """Inputs with the law's rates as polynomials over a box, best where the points are."""
    parameters, extent = tabulated_parameters(problem.law, problem.inputs), box.extent
    names, positive = tuple(p.name for p in parameters), tuple(p.positive for p in parameters)
    middle, half_width = (box.low + box.high) / 2, (box.high - box.low) / 2
    places = [(points[:, : len(middle)] - middle) / half_width for points in where]
    importance = np.sum([importance_of_nodes(place, extent) for place in places], axis=0)
    table = tabulate(box.rates, middle, half_width, names, positive, extent, importance)
    return replace(problem.inputs, surrogate=table, passage=None)


def _law_rates(problem: Problem, z: Float[np.ndarray, "point parameter"]) -> Float[np.ndarray, "point condition"]:
    """The law's own log rates at points whose first coordinates are its parameters, all conditions and points at once."""
    law, inputs = problem.law, problem.inputs
    parameters = tabulated_parameters(law, inputs)
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


def tabulated_parameters(law: Law, inputs: Inputs) -> list[Parameter]:
    """The law's sampled parameters, in the order of the unconstrained vector."""
    carried = inputs.dimension_carried == "all"
    return [p for p in law.parameters_for(inputs.barriers) if not (carried and p.name == "effective_dimension")]


def can_be_tabulated(law: Law, inputs: Inputs, shapes: Shapes) -> bool:
    """One to three parameters, and every setting known without error."""
    names = [p.name for p in tabulated_parameters(law, inputs)]
    return 1 <= len(names) <= SLOTS and [name for name, _ in shapes] == [*names, "log_prefactor", "discrepancy_base"]


def prior_scales(law: Law, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Centres and standard deviations of the prior in unconstrained space."""
    parameters = tabulated_parameters(law, inputs)
    medians = [float(inputs.medians[p.name]) for p in parameters]
    centers = [np.log(m) if p.positive else m for p, m in zip(parameters, medians, strict=True)]
    return np.array([*centers, 0.0, 0.0]), np.array([*(p.width for p in parameters), 1.0, 1.0])


def in_slots(table: Inputs, law: Law, offset: np.ndarray, scale: np.ndarray) -> Target:
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


def blank(problem: Problem, extent: str) -> Target:
    """A target of the shapes that tabulated rates will have, with zeros for rates."""
    inputs, law = problem.inputs, problem.law
    parameters, offset, scale = tabulated_parameters(law, inputs), *prior_scales(law, inputs)
    count = len(parameters)
    rates = np.zeros((len(chebyshev_points(count, extent)), inputs.learning_rate.shape[0]))
    names, positive = tuple(p.name for p in parameters), tuple(p.positive for p in parameters)
    table = tabulate(rates, offset[:count], scale[:count], names, positive, extent)
    return in_slots(replace(inputs, surrogate=table, passage=None), law, offset, scale)


def law_itself(law: Law, inputs: Inputs, shapes: Shapes) -> Target:
    dim = int(sum(np.prod(shape) for _, (shape, _) in shapes))
    return Target(law, inputs, shapes, np.arange(dim), np.zeros(dim), np.ones(dim))


def without_table(problem: Problem, points: Float[np.ndarray, "point slot"]) -> Problem:
    """The same problem with the law itself in place of its table, for rates that polynomials do not follow; points of the target move along."""
    target = law_itself(problem.law, problem.inputs, problem.shapes)
    return replace(problem, near_inputs=problem.inputs, target=target, particles=problem.target.to_model(points))


def with_passage_tables(law: Law, inputs: Inputs, only_shipped: bool = False) -> Inputs:
    """The threshold laws as splines, so that neither tables nor samplers need integrate; perhaps only if all that are needed ship."""
    if "threshold" not in inputs.barriers:
        return inputs
    plain = jax.tree.map(np.asarray, replace(inputs, surrogate=None, passage=None))
    spread = float(np.hypot(*(plain.measured[name].spread.max() for name in ("loss_minimum", "loss_barrier"))))
    settings = [(setting, spread) for _, setting, _ in known_settings(plain)]
    tables = tables_for(law, settings, only_shipped)
    return replace(inputs, passage=tables) if tables else inputs


def with_integrals(problem: Problem) -> Problem:
    """The same problem with the integrals themselves in place of the splines that ship."""
    return replace(problem, inputs=replace(problem.inputs, passage=None))


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
    return replace(problem, near_inputs=table, target=in_slots(table, problem.law, target.offset, target.scale))


def at_edge(problem: Problem, points: Float[np.ndarray, "point slot"]) -> bool:
    """Whether some points of the target come to the edge of the region where the law's rates are tabulated."""
    return bool(np.any(np.abs(place_in_table(problem, points)) > EDGE))


def place_in_table(problem: Problem, points: Float[np.ndarray, "point slot"]) -> Float[np.ndarray, "point parameter"]:
    """Places of points of the target in the region where the law's rates are tabulated, between −1 and 1; none without a table."""
    table, count = problem.target.inputs.surrogate, len(problem.target.used) - 2
    if table is None:
        return np.zeros((len(points), 0))
    return (points[:, :count] - np.asarray(table.center)[:count]) / np.asarray(table.half_width)[:count]


def table_error(
    problem: Problem, points: Float[np.ndarray, "point slot"], widths: PriorWidths = DEFAULT_WIDTHS
) -> float:
    """Share of the posterior that tabulated rates put in the wrong place, from draws of the target.

    Where settings are latent it is not known and counts as 0.
    """
    return misplaced(exact_minus_table(problem, points, widths)) if can_be_compared(problem) else 0.0


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


def can_be_compared(problem: Problem) -> bool:
    """Whether samplers see a table or spline of rates, at settings that are known without error."""
    inputs = problem.target.inputs
    names = [*(p.name for p in tabulated_parameters(problem.law, problem.inputs)), "log_prefactor", "discrepancy_base"]
    known = [name for name, _ in problem.shapes] == names
    return known and (inputs.surrogate is not None or inputs.passage is not None)


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
    return log_likelihoods(_law_rates(problem, model) + model[:, [count]], sigma, problem.observed).sum(axis=1)
