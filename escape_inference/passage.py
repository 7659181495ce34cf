"""Exact first-passage laws of a loss threshold in an isotropic quadratic well, in log space and with exact gradients.

The loss of a quadratic well of dimension n, driven by noise that grows as the loss to the power q, is a one-dimensional
diffusion of ``x = L/L*``. In units of 1/h*, with ``ΔU_q(x) = (x^(1−q) − 1)/(1−q)`` and T = η h*/B, it has the scale density
``s = e^{ΔU_q/T} (x−1)^(−n/2)`` and the speed density ``m = x^(−q) (x−1)^(n/2−1) e^{−ΔU_q/T}/(2T)``. With ``(Gf)(x) = ∫ₓᶜ s ∫₁ʸ f m``:

- from the minimum the mean time to ``x = c`` is ``(G1)(1)``, and κ is its inverse;
- from the quasi-stationary state the time is exponential with the leading eigenvalue λ₁ of ``G⁻¹`` (Le Bris, Lelièvre, Luskin
  and Perez 2012).

The integrals are those of any one-dimensional diffusion (Karlin and Taylor 1981, section 15.3; Pollak, Talkner 1990). The
exponent of Mori et al. (ICML 2022) is the limit of large c at q = 1.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from escape_inference.passage_panels import (
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
    build_grid,
)

LOOK_SHIFT = 0.5826
POWERS = 3
STEPS = 3
AGREEMENT = 0.05
Slopes = tuple[Vector, Vector, Vector, Vector]


def log_potential(barrier_ratio: ArrayLike, noise_exponent: ArrayLike) -> Float[Array, "..."]:
    """``ΔU_q(c) = (c^(1−q) − 1)/(1−q)``, the barrier in units of T; ``log c`` at q = 1, with exact derivatives through it.

    >>> float(log_potential(3.0, 0.0)), float(log_potential(3.0, 1.0)), float(log_potential(4.0, 1.5))
    (2.0, 1.0986..., 1.0)
    """
    log_ratio, q = jnp.log(jnp.asarray(barrier_ratio, float)), jnp.asarray(noise_exponent, float)
    z = (1 - q) * log_ratio
    small = jnp.abs(z) < 0.5
    near, far = jnp.where(small, z, 0.0), jnp.where(small, 1.0, z)
    series = jnp.ones_like(near)
    for k in range(14, 1, -1):
        series = 1 + near / k * series
    return log_ratio * jnp.where(small, series, jnp.expm1(far) / far)


def overshoot_ratio(
    barrier_ratio: ArrayLike,
    temperature: ArrayLike,
    noise_exponent: ArrayLike,
    step: ArrayLike,
    check_interval: ArrayLike = 1,
) -> Float[Array, "..."]:
    """The barrier ratio that a continuous path has to reach where a walk is looked at once in a while.

    The threshold radius ``√(c − 1)`` is moved out by 0.5826 standard deviations of the walk between two looks,
    ``√(m η h* T c^q)`` (Broadie, Glasserman and Kou 1997), for looks every m iterations.

    Args:
        barrier_ratio: c = L^s/L*, above 1.
        temperature: T at the minimum, any scale factor included.
        noise_exponent: q.
        step: η h*.
        check_interval: m, iterations between looks.

    >>> round(float(overshoot_ratio(1.5, 0.1, 1.0, 0.1, 1)), 4)
    1.6059
    """
    c = jnp.asarray(barrier_ratio, float)
    variance = check_interval * step * temperature * c ** jnp.asarray(noise_exponent, float)
    return 1 + (jnp.sqrt(c - 1) + LOOK_SHIFT * jnp.sqrt(variance)) ** 2


def log_mean_passage_rate(
    temperature: ArrayLike, barrier_ratio: ArrayLike, dimension: ArrayLike, noise_exponent: ArrayLike
) -> Float[Array, "..."]:
    """``log(κ/h*)``, κ the inverse of the mean time in which the loss, started at the minimum, first exceeds c L*.

    Args:
        temperature: T = η h*/B, positive.
        barrier_ratio: c = L^s/L*, above 1.
        dimension: n, positive, not necessarily an integer.
        noise_exponent: q; 1 is the power law, 0 noise frozen at its value at the minimum.

    Returns:
        The arguments broadcast against each other. In double precision the relative error of κ is below 1e-6 for
        0.005 ≤ T ≤ 1, c ≤ 50, 0.5 ≤ n ≤ 200, −0.5 ≤ q ≤ 2.5.

    >>> from escape_inference.precision import float64
    >>> round(float(jnp.exp(float64(log_mean_passage_rate)(0.1, 1.7, 4, 1.0))), 6)
    0.163556
    """
    return _broadcast(_mean_rate, temperature, barrier_ratio, dimension, noise_exponent)


def log_leading_rate(
    temperature: ArrayLike, barrier_ratio: ArrayLike, dimension: ArrayLike, noise_exponent: ArrayLike
) -> Float[Array, "..."]:
    """``log(λ₁/h*)``, λ₁ the escape rate over the threshold from the quasi-stationary state.

    Args:
        temperature: T = η h*/B, positive.
        barrier_ratio: c = L^s/L*, above 1.
        dimension: n, positive, not necessarily an integer.
        noise_exponent: q.

    Returns:
        The arguments broadcast against each other.

    >>> from escape_inference.precision import float64
    >>> round(float(jnp.exp(float64(log_leading_rate)(0.1, 1.7, 4, 1.0))), 5)
    0.18667
    """
    return _broadcast(_leading_rate, temperature, barrier_ratio, dimension, noise_exponent)


def _broadcast(law: Callable[[Vector, Vector, Vector, Vector], Vector], *arguments: ArrayLike) -> Float[Array, "..."]:
    T, c, n, q = jnp.broadcast_arrays(*(jnp.asarray(x, float) for x in arguments))
    return law(T.ravel(), c.ravel() - 1, n.ravel(), q.ravel()).reshape(T.shape)


class Function(NamedTuple):
    """Values, densities or weights at the nodes of the panels and of the starting panel."""

    nodes: Nodes
    start: StartNodes

    def times(self, factor: Array | float) -> "Function":
        return Function(self.nodes * factor, self.start * factor)

    def minus(self, other: "Function") -> "Function":
        return Function(self.nodes - other.nodes, self.start - other.start)

    def sum(self) -> Vector:
        return jnp.sum(self.nodes, (0, 1)) + jnp.sum(self.start, 0)

    def dot(self, other: "Function") -> Vector:
        return Function(self.nodes * other.nodes, self.start * other.start).sum()


class Generator(NamedTuple):
    """``T G``, scaled by ``exp(log_scale)``, on a grid: ``G f = ∫ˢ d`` of the density d that f drives."""

    grid: Grid
    entry: Vector
    inverse: Array
    flow: Array
    size: Array
    log_scale: Vector


def _generator(grid: Grid) -> Generator:
    log_in, log_end = grid.log_entering[:-1], grid.log_entering[-1:]
    log_scale = jnp.max(jnp.concatenate([log_in - grid.fall, log_end]), axis=0)
    inverse = jnp.exp(-log_in)
    size = jnp.exp(log_in - grid.fall - log_scale)
    return Generator(
        grid, 1 / jnp.sum(grid.start_response, axis=0), inverse, grid.passed + grid.emitted * inverse, size, log_scale
    )


def _one(grid: Grid) -> Function:
    return Function(jnp.ones_like(grid.source), jnp.ones_like(grid.start_source))


class Driven(NamedTuple):
    """What a source drives: the outer density (times quadrature weights), its start modes, and B at the threshold."""

    density: Function
    start_modes: StartNodes
    at_threshold: Vector


def _drive(generator: Generator, source: Function) -> Driven:
    grid, inverse, flow, size = generator.grid, generator.inverse, generator.flow, generator.size
    response = amplify(grid.gain_real, grid.gain_imag, along(RULE.to_modes, grid.source * source.nodes))
    emitted = at_end(response)
    start_modes = grid.start_gain * along(START.to_powers, grid.start_source * source.start)
    ratio = generator.entry * jnp.sum(start_modes, axis=0)
    ratios = []
    for k in range(PANELS):
        ratios.append(ratio)
        ratio = (grid.passed[k] * ratio + emitted[k] * inverse[k]) / flow[k]
    modes = grid.homogeneous * (size * jnp.stack(ratios)) + response * (size * inverse)
    nodes = grid.volume * grid.kernel * along(RULE.from_modes, modes)
    start_size = jnp.exp(grid.start_height - generator.log_scale)
    start = grid.start_kernel * start_size * along(START.from_powers, start_modes)
    return Driven(Function(nodes, start), start_modes, ratio * jnp.exp(grid.log_entering[-1] - generator.log_scale))


class Traced(NamedTuple):
    """Where weighted outer density comes from: weights of the source at the nodes, and of its start modes."""

    weights: Function
    start_modes: StartNodes


def _trace(generator: Generator, weights: Function) -> Traced:
    """The transpose of :func:`_drive`: what a unit of source at each node adds to the weighted density."""
    grid, inverse, flow, size = generator.grid, generator.inverse, generator.flow, generator.size
    modes = along(RULE.from_modes.T, grid.volume * grid.kernel * weights.nodes)
    through = size * jnp.sum(grid.homogeneous * modes, axis=0)
    worth = [jnp.zeros_like(generator.entry)]
    for k in range(PANELS - 1, -1, -1):
        worth.append(through[k] + worth[-1] * grid.passed[k] / flow[k])
    ends = RULE.from_modes[-1][:, None, None] * (jnp.stack(worth[-2::-1]) * inverse / flow)
    nodes = grid.source * along(RULE.to_modes.T, back_amplify(grid, modes * (size * inverse) + ends))
    start_size = jnp.exp(grid.start_height - generator.log_scale)
    start_modes = along(START.from_powers.T, grid.start_kernel * start_size * weights.start)
    start_modes = start_modes + generator.entry * worth[-1]
    start = grid.start_source * along(START.to_powers.T, grid.start_gain * start_modes)
    return Traced(Function(nodes, start), start_modes)


def _to_threshold(density: Function) -> Function:
    """The integral of a density from each node to the threshold."""
    later = jnp.cumsum(jnp.sum(density.nodes, axis=0)[::-1], axis=0)[::-1]
    everything = later[0] + jnp.sum(density.start, axis=0)
    return Function(
        later - along(RULE.integrate / RULE.weights, density.nodes),
        everything - along(START.integrate / START.weights, density.start),
    )


def _below(weights: Function) -> Function:
    """The transpose of :func:`_to_threshold`: how much weight lies below each node."""
    start = jnp.sum(weights.start, axis=0)
    earlier = start + jnp.cumsum(jnp.sum(weights.nodes, axis=0), axis=0)
    return Function(
        earlier - along((RULE.integrate / RULE.weights).T, weights.nodes),
        start - along((START.integrate / START.weights).T, weights.start),
    )


def _slopes(generator: Generator, source: Function, driven: Driven, weights: Function, T: Vector, q: Vector) -> Slopes:
    """Derivatives in T, c, n, q of the logarithm of ``∫ w d``, with d the density driven by f, and f and w held fixed.

    The outer integral carries ``e^Φ``, the inner one ``r e^{−Φ}``: each derivative is a difference of two means.
    """
    grid = generator.grid
    traced = _trace(generator, weights)
    total = driven.density.dot(weights)
    outer = Function(driven.density.nodes * weights.nodes, driven.density.start * weights.start).times(1 / total)
    inner = Function(traced.weights.nodes * source.nodes, traced.weights.start * source.start).times(1 / total)
    change = outer.minus(inner)
    height = change.dot(Function(grid.potential, grid.start_potential))
    twist = change.dot(
        Function(
            _potential_slope(grid.log_x, grid.potential, q), _potential_slope(grid.start_log_x, grid.start_potential, q)
        )
    )
    thinning = inner.dot(Function(grid.log_x, grid.start_log_x))
    power = jnp.sum(change.nodes * (grid.log_y - grid.first_edge), (0, 1)) / 2
    power = power + jnp.sum(grid.start_gain * driven.start_modes * traced.start_modes, axis=0) / total
    return -1 / T - height / T**2, driven.at_threshold * weights.nodes[-1, -1] / total, -power, twist / T - thinning


def _potential_slope(log_x: Array, potential: Array, noise_exponent: Array) -> Array:
    """``∂ΔU_q/∂q`` at a loss ratio whose logarithm and ΔU_q are given."""
    stretch = 1 - noise_exponent
    z = stretch * log_x
    series = 1 / 45360
    for k in (5760, 840, 144, 30, 8, 3, 2):
        series = 1 / k + z * series
    gap = jnp.where(stretch == 0, 1.0, stretch)
    return jnp.where(jnp.abs(z) < 0.15, -(log_x**2) * series, (potential - log_x * (1 + stretch * potential)) / gap)


def _mean_time(temperature: Vector, excess: Vector, dimension: Vector, noise_exponent: Vector) -> tuple[Vector, Slopes]:
    """``log(τ h*)``, τ = (G1)(1), and its derivatives in T, c, n, q."""
    T = temperature
    generator = _generator(build_grid(temperature, excess, dimension, noise_exponent))
    one = _one(generator.grid)
    driven = _drive(generator, one)
    log_time = jnp.log(driven.density.sum()) + generator.log_scale - jnp.log(T)
    return log_time, _slopes(generator, one, driven, one, T, noise_exponent)


def _leading_time(
    temperature: Vector, excess: Vector, dimension: Vector, noise_exponent: Vector
) -> tuple[Vector, Slopes]:
    """``log(h*/λ₁)`` and its derivatives.

    G is symmetric in ``∫ f g m``, and ``m G1`` is the time spent at each place by a path from the minimum, which gives the weights
    m. A few powers of G applied to 1 and a few Lanczos steps give the leading eigenfunction f; the derivative of its eigenvalue
    is that of the Rayleigh quotient with f held fixed.
    """
    T = temperature
    generator = _generator(build_grid(temperature, excess, dimension, noise_exponent))
    mass = _speed_weights(generator)
    power = one = _one(generator.grid)
    for _ in range(POWERS):
        driven = _drive(generator, power)
        power = _to_threshold(driven.density).times(1 / driven.density.sum())
    vectors, drives, diagonal, coupling = [], [], [], []
    vector = power.times(1 / _norm(mass, power, 1e-3))
    for step in range(STEPS):
        driven = _drive(generator, vector)
        image = _to_threshold(driven.density)
        vectors.append(vector)
        drives.append(driven)
        diagonal.append(_product(mass, vector, image))
        if step + 1 < STEPS:
            for known in vectors:
                image = image.minus(known.times(_product(mass, known, image)))
            coupling.append(_norm(mass, image, 1e-12 * diagonal[0]))
            vector = image.times(1 / coupling[-1])
    f, driven, weight = vectors[0], drives[0], jnp.ones_like(T)
    for k, ratio in enumerate(_leading_ratios(diagonal, coupling), start=1):
        weight = weight * ratio
        f = f.minus(vectors[k].times(-weight))
        driven = Driven(
            driven.density.minus(drives[k].density.times(-weight)),
            driven.start_modes + weight * drives[k].start_modes,
            driven.at_threshold + weight * drives[k].at_threshold,
        )
    # far from any metastable well the weights m can lose all accuracy: the time spent at each place by a path from the
    # minimum then takes the place of m f, and the last power the place of f
    left = Function(mass.nodes * f.nodes, mass.start * f.start)
    spent = _trace(generator, one).weights
    quotient = driven.density.dot(_below(left)) / f.dot(left)
    control = driven.density.dot(_below(spent)) / f.dot(spent)
    sound = (quotient > 0) & (jnp.abs(quotient - control) < AGREEMENT * quotient)
    left = _either(sound, left, spent)
    f, driven = _either(sound, (f, driven), (vectors[0], drives[0]))
    below = _below(left)
    log_time = jnp.log(driven.density.dot(below) / f.dot(left)) + generator.log_scale - jnp.log(T)
    return log_time, _slopes(generator, f, driven, below, T, noise_exponent)


Tree = TypeVar("Tree")


def _either(condition: Array, first: Tree, second: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), first, second)


def _speed_weights(generator: Generator) -> Function:
    """Weights of ``∫ f m``, normalised: what a source adds to B at the threshold."""
    grid, inverse, flow = generator.grid, generator.inverse, generator.flow
    ends = jnp.broadcast_to(RULE.from_modes[-1][:, None, None], grid.response.shape)
    emission = grid.source * along(RULE.to_modes.T, back_amplify(grid, ends))
    carried = [jnp.ones_like(generator.entry)]
    for k in range(PANELS - 1, -1, -1):
        carried.append(carried[-1] * grid.passed[k] / flow[k])
    nodes = emission * (inverse / flow * jnp.stack(carried[-2::-1]))
    gains = jnp.broadcast_to(grid.start_gain, grid.start_source.shape)
    return Function(nodes, carried[-1] * generator.entry * grid.start_source * along(START.to_powers.T, gains))


def _product(mass: Function, first: Function, second: Function) -> Vector:
    return Function(mass.nodes * first.nodes, mass.start * first.start).dot(second)


def _norm(mass: Function, function: Function, least: Array | float) -> Vector:
    return jnp.sqrt(jnp.maximum(_product(mass, function, function), 0.0) + least**2)


def _leading_ratios(diagonal: list[Vector], coupling: list[Vector]) -> list[Vector]:
    """Ratios of successive components of the leading eigenvector of a symmetric tridiagonal matrix.

    Newton's method on the continued fraction for the eigenvalue, from below.
    """
    value = diagonal[0]
    ratios: list[Vector] = []
    for _ in range(6):
        ratios = [jnp.zeros_like(value)]
        for k in range(len(coupling) - 1, -1, -1):
            below = coupling[k + 1] * ratios[-1] if k + 1 < len(coupling) else 0.0
            ratios.append(coupling[k] / jnp.maximum(value - diagonal[k + 1] - below, 1e-3 * diagonal[0]))
        ratios = ratios[:0:-1]
        norm = weight = jnp.ones_like(value)
        for ratio in ratios:
            weight = weight * ratio**2
            norm = norm + weight
        value = value - (value - diagonal[0] - coupling[0] * ratios[0]) / norm
    return ratios


def _rate(evaluate: Callable[..., tuple[Vector, Slopes]]) -> Callable[[Vector, Vector, Vector, Vector], Vector]:
    """The log rate of a log time, differentiated by the slopes that come with it."""

    @jax.custom_jvp
    def rate(T: Vector, excess: Vector, n: Vector, q: Vector) -> Vector:
        return -evaluate(T, excess, n, q)[0]

    @rate.defjvp
    def rate_jvp(arguments: tuple[Vector, ...], tangents: tuple[Vector, ...]) -> tuple[Vector, Vector]:
        log_time, slopes = evaluate(*arguments)
        return -log_time, -sum(slope * tangent for slope, tangent in zip(slopes, tangents, strict=True))

    return rate


_mean_rate = _rate(_mean_time)
_leading_rate = _rate(_leading_time)
