"""One law on prepared data as samplers see it, and its densities and values at many points."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from escape_inference.evidence import Evidence
from escape_inference.law import BUILT_IN_ORDER, Law, Parameter, built_in_laws
from escape_inference.likelihood import Observations, marginal_log_likelihood
from escape_inference.model import (
    DEFAULT_WIDTHS,
    Inputs,
    PriorWidths,
    discrepancy_of,
    evaluate,
    named_values,
    not_evaluated,
    sample_prior,
)
from escape_inference.programs import Ahead
from escape_inference.sampler import Shapes
from escape_inference.student import at_points, normal_log_density
from escape_inference.surrogate import SLOTS, Surrogate

SMALLEST_ROOM = 40  #: conditions in the smallest program; compiling another takes longer than computing with as many
BLOCK = 512
AT_ONCE = 32  #: points in one go of a program: what it computes of more would not stay near the processor
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


def without_integrals(inputs: Inputs) -> bool:
    """Whether the law's rates at these inputs are closed forms and splines."""
    return all(barrier == "saddle" or start in (inputs.passage or {}) for barrier, start, *_ in inputs.groups)


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
    rates = _in_blocks(lambda *x: table_rates(table, dict(zip(SLOT_NAMES, x, strict=True))), *z.T[:SLOTS])
    sigma = discrepancy_of(np.ascontiguousarray(z[:, SLOTS + 1]), widths.discrepancy)
    return log_likelihoods(rates + z[:, SLOTS, None], sigma, observed)


def named_values_at(
    problem: Problem, inputs: Inputs, z: Float[np.ndarray, "draw dim"], widths: PriorWidths = DEFAULT_WIDTHS
) -> dict[str, np.ndarray]:
    """Named values at many points of the law's unconstrained space, ``[draw, ...]``, with the rates of these inputs."""
    if without_integrals(problem.inputs):  # the law is as fast as its tables, which vary in shape
        inputs = problem.inputs
    fixed, sites = (inputs, problem.observed, widths.as_arrays()), sites_of(problem.law, problem.shapes)
    return _in_blocks(lambda part: sites_block(part, *fixed, sites=sites), np.asarray(z))


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
    return log_likelihoods(values["log_rate"], values["discrepancy"], problem.observed)


@lru_cache(maxsize=64)
def sites_of(law: Law, shapes: Shapes) -> Callable[..., dict[str, Array]]:
    """Named values at a point; its identity is stable."""

    def sites(z: Array, *fixed: Any) -> dict[str, Array]:
        return named_values(z, law, dict(shapes), *fixed)

    return _described(sites, law, shapes)


@partial(Ahead, static=("sites",))
def sites_block(
    z: Array, inputs: Inputs, observed: Observations, widths: PriorWidths, *, sites: Callable[..., dict[str, Array]]
) -> dict[str, Array]:
    return jax.lax.map(lambda point: sites(point, inputs, observed, widths), z, batch_size=AT_ONCE)


def log_likelihoods(
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


@Ahead
def table_rates(table: Surrogate, slots: dict[str, Array]) -> Float[Array, "point condition"]:
    return jax.lax.map(table, slots, batch_size=AT_ONCE)


def _described(function: Any, law: Law, shapes: Shapes) -> Any:
    """A function of a law with a text that says all about it, if the law ships; others may depend on any file."""
    if law is SLOT_LAW or (law.name in BUILT_IN_ORDER and built_in_laws().get(law.name) is law):
        function.stored_as = f"{function.__name__} of {law.name} {shapes}"
    return function


SLOT_LAW = Law(
    name="tabulated",
    title="a law as a table",
    source="the law that was tabulated",
    parameters=tuple(Parameter(name, 0.0, 1.0, "in units of the prior", positive=False) for name in SLOT_NAMES),
    log_rate=not_evaluated,
    temperature=not_evaluated,
)
