"""The operator G of a killed one-dimensional diffusion on panels, its transpose, and the derivatives of quotients made of it.

``(Gf)(x) = ∫ₓᶜ s ∫₁ʸ f m`` is the mean over paths from x of the integral of f until the threshold is reached. Here it is
two steps: a source f drives an outer density d (the flow B of :mod:`escape_inference.passage_panels` with f in its source),
and ``T G f = ∫ d`` from each node to the threshold. Every number is scaled by ``exp(log_scale)`` of the grid.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from escape_inference.passage_panels import (
    LEAST_FLOW,
    PANELS,
    RULE,
    START,
    Grid,
    Nodes,
    StartNodes,
    Vector,
    along,
    amplify,
    at_end,
    back_amplify,
)
from escape_inference.passage_potential import potential_slope

Slopes = tuple[Vector, Vector, Vector, Vector]


class Function(NamedTuple):
    """Values, densities or weights at the nodes of the panels and of the starting panel."""

    nodes: Nodes
    start: StartNodes

    def scaled(self, factor: Array | float) -> "Function":
        return Function(self.nodes * factor, self.start * factor)

    def plus(self, other: "Function") -> "Function":
        return Function(self.nodes + other.nodes, self.start + other.start)

    def times(self, other: "Function") -> "Function":
        return Function(self.nodes * other.nodes, self.start * other.start)

    def sum(self) -> Vector:
        return jnp.sum(self.nodes, (0, 1)) + jnp.sum(self.start, 0)

    def dot(self, other: "Function") -> Vector:
        return self.times(other).sum()


class Generator(NamedTuple):
    """A grid with its flows in units of those of the source 1: ``entry`` into the first panel, ``flow`` out of each panel."""

    grid: Grid
    entry: Vector
    inverse: Array
    flow: Array
    size: Array
    log_scale: Vector


class Driven(NamedTuple):
    """What a source drives: the outer density (times quadrature weights), its start modes, and B at the threshold."""

    density: Function
    start_modes: StartNodes
    at_threshold: Vector


class Traced(NamedTuple):
    """Where a weighted outer density comes from: weights of the source at the nodes, and of its start modes."""

    weights: Function
    start_modes: StartNodes


def generator_of(grid: Grid) -> Generator:
    """The generator on a grid."""
    log_in, log_end = grid.log_entering[:-1], grid.log_entering[-1:]
    log_scale = jnp.max(jnp.concatenate([log_in - grid.fall, log_end]), axis=0)
    inverse = jnp.exp(-log_in)
    flow = jnp.maximum(grid.passed + grid.emitted * inverse, LEAST_FLOW)
    size = jnp.exp(log_in - grid.fall - log_scale)
    return Generator(grid, 1 / jnp.sum(grid.start_response, axis=0), inverse, flow, size, log_scale)


def constant(generator: Generator) -> Function:
    """The function 1."""
    return Function(jnp.ones_like(generator.grid.source), jnp.ones_like(generator.grid.start_source))


def drive(generator: Generator, source: Function) -> Driven:
    """The outer density that a source drives."""
    grid, inverse = generator.grid, generator.inverse
    response = amplify(grid.gain_real, grid.gain_imag, along(RULE.to_modes, grid.source * source.nodes))
    emitted = at_end(response)
    start_modes = grid.start_gain * along(START.to_powers, grid.start_source * source.start)
    ratio = generator.entry * jnp.sum(start_modes, axis=0)
    ratios = []
    for k in range(PANELS):
        ratios.append(ratio)
        ratio = (grid.passed[k] * ratio + emitted[k] * inverse[k]) / generator.flow[k]
    modes = grid.homogeneous * (generator.size * jnp.stack(ratios)) + response * (generator.size * inverse)
    nodes = grid.volume * grid.kernel * along(RULE.from_modes, modes)
    start_size = jnp.exp(grid.start_scale - generator.log_scale)
    start = grid.start_kernel * start_size * along(START.from_powers, start_modes)
    return Driven(Function(nodes, start), start_modes, ratio * jnp.exp(grid.log_entering[-1] - generator.log_scale))


def trace(generator: Generator, weights: Function) -> Traced:
    """The transpose of :func:`drive`: what a unit of source at each node adds to the weighted density."""
    grid, inverse, flow = generator.grid, generator.inverse, generator.flow
    modes = along(RULE.from_modes.T, grid.volume * grid.kernel * weights.nodes)
    through = generator.size * jnp.sum(grid.homogeneous * modes, axis=0)
    worth = [jnp.zeros_like(generator.entry)]
    for k in range(PANELS - 1, -1, -1):
        worth.append(through[k] + worth[-1] * grid.passed[k] / flow[k])
    ends = RULE.from_modes[-1][:, None, None] * (jnp.stack(worth[-2::-1]) * inverse / flow)
    nodes = grid.source * along(RULE.to_modes.T, back_amplify(grid, modes * (generator.size * inverse) + ends))
    start_size = jnp.exp(grid.start_scale - generator.log_scale)
    start_modes = along(START.from_powers.T, grid.start_kernel * start_size * weights.start)
    start_modes = start_modes + generator.entry * worth[-1]
    start = grid.start_source * along(START.to_powers.T, grid.start_gain * start_modes)
    return Traced(Function(nodes, start), start_modes)


def to_threshold(density: Function) -> Function:
    """The integral of a density from each node to the threshold."""
    later = jnp.cumsum(jnp.sum(density.nodes, axis=0)[::-1], axis=0)[::-1]
    everything = later[0] + jnp.sum(density.start, axis=0)
    return Function(
        later - along(RULE.integrate / RULE.weights, density.nodes),
        everything - along(START.integrate / START.weights, density.start),
    )


def log_slopes(
    generator: Generator,
    source: Function,
    driven: Driven,
    weights: Function,
    temperature: Vector,
    noise_exponent: Vector,
) -> Slopes:
    """Derivatives in T, c, n, q of the logarithm of ``(1/T) ∫ w d``, d driven by f, with f and w held fixed.

    The outer integral carries ``e^Φ`` and the inner one ``r e^{−Φ}``, so that each derivative is a difference of two means over
    where the integral comes from. In the starting panel the power of y is differentiated mode by mode.

    Args:
        generator: the generator.
        source: f.
        driven: what f drives.
        weights: w, equal to its last value at the threshold.
        temperature: T.
        noise_exponent: q.
    """
    grid, T, q = generator.grid, temperature, noise_exponent
    traced = trace(generator, weights)
    outer, inner = driven.density.times(weights), traced.weights.times(source)
    total = outer.sum()
    outer, inner = outer.scaled(1 / total), inner.scaled(1 / total)
    change = outer.plus(inner.scaled(-1.0))
    height = change.dot(Function(grid.height, grid.start_height))
    twist = change.dot(
        Function(potential_slope(grid.log_x, grid.height, q), potential_slope(grid.start_log_x, grid.start_height, q))
    )
    thinning = inner.dot(Function(grid.log_x, grid.start_log_x))
    power = jnp.sum(change.nodes * (grid.log_y - grid.first_edge), (0, 1)) / 2
    power = power + jnp.sum(grid.start_gain * driven.start_modes * traced.start_modes, axis=0) / total
    at_threshold = driven.at_threshold * weights.nodes[-1, -1] / total
    return -1 / T - height / T**2, at_threshold, -power, twist / T - thinning
