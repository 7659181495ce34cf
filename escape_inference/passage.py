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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from escape_inference.passage_panels import PANELS, RULE, START, Grid, Nodes, StartNodes, Vector
from escape_inference.passage_panels import along, amplify, at_end, back_amplify, build_grid

LOOK_SHIFT = 0.5826
KRYLOV = 4
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


class Weights(NamedTuple):
    """Where the logarithm of a passage time comes from: normalised weights of the outer and the inner integral at the nodes."""

    outer: Nodes
    inner: Nodes
    start_outer: StartNodes
    start_inner: StartNodes
    start_power: Vector


def _slopes(
    grid: Grid, weights: Weights, at_threshold: Vector, temperature: Vector, noise_exponent: Vector
) -> Slopes:
    """Derivatives of a log time in T, c, n, q: the outer integral carries ``e^Φ``, the inner one ``r e^{−Φ}``."""
    T, q = temperature, noise_exponent
    change, start_change = weights.outer - weights.inner, weights.start_outer - weights.start_inner

    def mean(nodes: Nodes, start: StartNodes) -> Vector:
        return jnp.sum(change * nodes, (0, 1)) + jnp.sum(start_change * start, 0)

    height = mean(grid.potential, grid.start_potential)
    twist = mean(
        potential_slope(grid.log_x, grid.potential, q), potential_slope(grid.start_log_x, grid.start_potential, q)
    )
    thinning = jnp.sum(weights.inner * grid.log_x, (0, 1)) + jnp.sum(weights.start_inner * grid.start_log_x, 0)
    spread = jnp.sum(change * (grid.log_y - grid.first_edge), (0, 1))
    return -1 / T - height / T**2, at_threshold, weights.start_power - spread / 2, twist / T - thinning


def potential_slope(log_x: Array, potential: Array, noise_exponent: Array) -> Array:
    """``∂ΔU_q/∂q`` at a loss ratio whose logarithm and ΔU_q are given."""
    stretch = 1 - noise_exponent
    z = stretch * log_x
    series = 1 / 45360
    for k in (5760, 840, 144, 30, 8, 3, 2):
        series = 1 / k + z * series
    gap = jnp.where(stretch == 0, 1.0, stretch)
    return jnp.where(jnp.abs(z) < 0.15, -(log_x**2) * series, (potential - log_x * (1 + stretch * potential)) / gap)


def _mean_time(
    temperature: Vector, excess: Vector, dimension: Vector, noise_exponent: Vector
) -> tuple[Vector, Slopes]:
    """``log(τ h*)`` and its derivatives in T, c, n, q."""
    T = temperature
    grid = build_grid(temperature, excess, dimension, noise_exponent)
    fall, log_in = grid.fall, grid.log_entering
    weighted = along(RULE.from_modes.T, grid.volume * grid.kernel)
    inside = jnp.sum(grid.response * weighted, axis=0)
    through = jnp.sum(grid.homogeneous * weighted, axis=0)
    start_weighted = along(START.from_powers.T, grid.start_kernel)
    log_start = jnp.log(jnp.sum(grid.start_response * start_weighted, axis=0)) + grid.start_height
    log_panels = log_in[:-1] - fall + jnp.log(jnp.maximum(through + inside * jnp.exp(-log_in[:-1]), 1e-300))
    log_total = jax.nn.logsumexp(jnp.concatenate([log_start[None], log_panels]), axis=0)

    # the adjoint: what a unit of B leaving panel k adds to the total
    log_worth = [jnp.full_like(T, -600.0)]
    for k in range(PANELS - 1, -1, -1):
        gain = jnp.maximum(grid.passed[k] + through[k] * jnp.exp(-log_worth[-1]), 1e-300)
        log_worth.append(jnp.maximum(log_worth[-1] - fall[k] + jnp.log(gain), -600.0))
    into, worth = log_in[:-1], jnp.stack(log_worth[-2::-1])
    scale = jnp.exp(-fall - log_total)
    modes = grid.response * scale + grid.homogeneous * jnp.exp(into - fall - log_total)
    outer = grid.volume * grid.kernel * along(RULE.from_modes, modes)
    adjoint = weighted * scale + RULE.from_modes[-1][:, None, None] * jnp.exp(worth - fall - log_total)
    inner = grid.source * along(RULE.to_modes.T, back_amplify(grid, adjoint))
    start_scale = jnp.exp(grid.start_height - log_total)
    start_outer = grid.start_kernel * along(START.from_powers, grid.start_response * start_scale)
    start_adjoint = start_weighted * start_scale + jnp.exp(log_worth[-1] + grid.start_height - log_total)
    start_inner = grid.start_source * along(START.to_powers.T, grid.start_gain * start_adjoint)
    start_power = -jnp.sum(grid.start_gain * grid.start_response * start_adjoint, axis=0)
    weights = Weights(outer, inner, start_outer, start_inner, start_power)
    slopes = _slopes(grid, weights, jnp.exp(log_in[-1] - log_total), T, noise_exponent)
    return log_total - jnp.log(T), slopes


class Function(NamedTuple):
    """A function of the loss, at the nodes of the panels and of the starting panel."""

    nodes: Nodes
    start: StartNodes

    def times(self, factor: Array | float) -> "Function":
        return Function(self.nodes * factor, self.start * factor)

    def plus(self, other: "Function") -> "Function":
        return Function(self.nodes + other.nodes, self.start + other.start)


def _total(weights: Function, *factors: Function) -> Vector:
    """Sum over all nodes of the product."""
    nodes, start = weights
    for factor in factors:
        nodes, start = nodes * factor.nodes, start * factor.start
    return jnp.sum(nodes, (0, 1)) + jnp.sum(start, 0)


class Killed(NamedTuple):
    """The operator G on a grid, and the inner product ``∫ f g m`` (normalised to ∫ m = 1) in which it is symmetric."""

    grid: Grid
    mass: Function
    start_share: Vector
    inverse: Array
    flow: Array
    log_scale: Vector


def _killed(grid: Grid, temperature: Vector) -> Killed:
    log_in = grid.log_entering[:-1]
    inverse = jnp.exp(-log_in)
    flow = grid.passed + grid.emitted * inverse
    ends = jnp.broadcast_to(RULE.from_modes[-1][:, None, None], grid.response.shape)
    emission = grid.source * along(RULE.to_modes.T, back_amplify(grid, ends))
    carried = [jnp.ones_like(temperature)]
    for k in range(PANELS - 1, -1, -1):
        carried.append(carried[-1] * grid.passed[k] / flow[k])
    mass = emission * (inverse / flow * jnp.stack(carried[-2::-1]))
    share = carried[-1] / jnp.sum(grid.start_response, axis=0)
    start_mass = share * grid.start_source * along(START.to_powers.T, jnp.broadcast_to(grid.start_gain, grid.start_source.shape))
    log_scale = jnp.max(jnp.concatenate([log_in - grid.fall, grid.log_entering[-1:]]), axis=0)
    return Killed(grid, Function(mass, start_mass), share, inverse, flow, log_scale)


def _start_modes(grid: Grid, function: StartNodes) -> StartNodes:
    return grid.start_gain * along(START.to_powers, grid.start_source * function)


def _apply(killed: Killed, function: Function) -> tuple[Function, Function]:
    """``T G f``, scaled, and the outer density that it is the integral of, times the quadrature weights."""
    grid = killed.grid
    response = amplify(grid.gain_real, grid.gain_imag, along(RULE.to_modes, grid.source * function.nodes))
    start_modes = _start_modes(grid, function.start)
    ratio = jnp.sum(start_modes, axis=0) / jnp.sum(grid.start_response, axis=0)
    emitted = at_end(response)
    ratios = []
    for k in range(PANELS):
        ratios.append(ratio)
        ratio = (grid.passed[k] * ratio + emitted[k] * killed.inverse[k]) / killed.flow[k]
    size = jnp.exp(grid.log_entering[:-1] - grid.fall - killed.log_scale)
    modes = grid.homogeneous * (size * jnp.stack(ratios)) + response * (size * killed.inverse)
    density = Function(
        grid.volume * grid.kernel * along(RULE.from_modes, modes),
        grid.start_kernel * along(START.from_powers, start_modes) * jnp.exp(grid.start_height - killed.log_scale),
    )
    return _to_threshold(density), density


def _to_threshold(density: Function) -> Function:
    """The integral of a density from each node to the threshold."""
    later = jnp.cumsum(jnp.sum(density.nodes, axis=0)[::-1], axis=0)[::-1]
    all_of_it = later[0] + jnp.sum(density.start, axis=0)
    return Function(
        later - along(RULE.integrate / RULE.weights, density.nodes),
        all_of_it - along(START.integrate / START.weights, density.start),
    )


def _from_minimum(mass: Function) -> Function:
    """The transpose of :func:`_to_threshold`: how much mass lies below each node."""
    start = jnp.sum(mass.start, axis=0)
    earlier = start + jnp.cumsum(jnp.sum(mass.nodes, axis=0), axis=0)
    return Function(
        earlier - along((RULE.integrate / RULE.weights).T, mass.nodes),
        start - along((START.integrate / START.weights).T, mass.start),
    )


def _leading_eigenvector(killed: Killed) -> tuple[Function, Function, Function]:
    """The leading eigenfunction f of G (a Ritz vector of a few Lanczos steps from G1), ``T G f``, and its outer density."""
    grid, mass = killed.grid, killed.mass
    vector = _apply(killed, Function(jnp.ones_like(grid.source), jnp.ones_like(grid.start_source)))[0]
    vector = vector.times(1 / jnp.sqrt(_total(mass, vector, vector)))
    vectors, images, densities, diagonal, coupling = [], [], [], [], []
    for k in range(KRYLOV):
        image, density = _apply(killed, vector)
        vectors.append(vector)
        images.append(image)
        densities.append(density)
        diagonal.append(_total(mass, vector, image))
        if k + 1 < KRYLOV:
            rest = image
            for known in vectors:
                rest = rest.plus(known.times(-_total(mass, known, rest)))
            coupling.append(jnp.sqrt(_total(mass, rest, rest) + 1e-24 * diagonal[0] ** 2))
            vector = rest.times(1 / coupling[-1])
    f, image, density = vectors[0], images[0], densities[0]
    weight = jnp.ones_like(diagonal[0])
    for k, ratio in enumerate(_leading_ratios(diagonal, coupling), start=1):
        weight = weight * ratio
        f, image = f.plus(vectors[k].times(weight)), image.plus(images[k].times(weight))
        density = density.plus(densities[k].times(weight))
    return f, image, density


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


def _leading_time(
    temperature: Vector, excess: Vector, dimension: Vector, noise_exponent: Vector
) -> tuple[Vector, Slopes]:
    """``log(h*/λ₁)`` and its derivatives: those of the Rayleigh quotient ``<f, Gf>/<f, f>`` with f held fixed."""
    T = temperature
    grid = build_grid(temperature, excess, dimension, noise_exponent)
    killed = _killed(grid, T)
    mass = killed.mass
    f, image, density = _leading_eigenvector(killed)
    square, quotient = _total(mass, f, f), _total(mass, f, image)
    driven = image.times(2 / quotient).plus(f.times(-1 / square))
    below = _from_minimum(Function(mass.nodes * f.nodes, mass.start * f.start))

    # the power of y in the starting panel acts on the inner integrals through the gains of the monomials
    def faded(function: StartNodes) -> Vector:
        return -killed.start_share * jnp.sum(grid.start_gain * _start_modes(grid, function), axis=0)

    modes = -grid.start_gain * _start_modes(grid, f.start)
    growth = grid.start_kernel * jnp.exp(grid.start_height - killed.log_scale)
    start_power = faded(f.start * (image.start / quotient - f.start / square))
    start_power += jnp.sum(growth * along(START.from_powers, modes) * below.start, axis=0) / quotient
    start_power += faded(f.start) * jnp.sum(density.nodes, (0, 1)) / quotient
    weights = Weights(
        density.nodes * below.nodes / quotient,
        mass.nodes * f.nodes * driven.nodes,
        density.start * below.start / quotient,
        mass.start * f.start * driven.start,
        start_power,
    )
    at_threshold = _total(mass, f) ** 2 * jnp.exp(grid.log_entering[-1] - killed.log_scale) / quotient
    log_time = jnp.log(quotient / square) + killed.log_scale - jnp.log(T)
    return log_time, _slopes(grid, weights, at_threshold, T, noise_exponent)


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
