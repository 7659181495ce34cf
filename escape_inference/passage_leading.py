"""The leading eigenvalue of a killed one-dimensional diffusion by Newton's method on its eigenfunction, at any barrier.

In ``v = log(x − 1)`` the quasi-stationary state is governed by two densities, with ``Φ = ΔU_q/T − n v/2`` and
``C(v) = ∫ ½ x^(−q) e^(−Φ) f`` up to v: the mass ``½ x^(−q) e^(−Φ) f²`` and the dissipation ``y e^Φ C²``, whose ratio is the Rayleigh
quotient T/λ. Panels are placed where either counts, so that a barrier of hundreds of T costs one panel. Each step replaces f by
``χ = G f`` and then by ``χ e^h``, where h solves the equation linearised about χ with λ the Rayleigh quotient of χ (Newton's
method on the Riccati equation of ``f'/f``, that is policy iteration for the principal eigenvalue); f stays positive and
convergence is quadratic. The starting guess is the mean time to the threshold, made to fall as the slow solution of the Riccati
equation does where there is no well.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from escape_inference.passage_edges import Vector, start_length
from escape_inference.passage_operator import Generator, Slopes, constant, drive, to_threshold
from escape_inference.passage_panels import START, START_NODES, along, integration_matrix
from escape_inference.passage_potential import potential, potential_slope

PANELS = 18
NODES = 8
LEVEL = 20.0  # log of the density, below its top, at which the panels end
FOLDS = 9.0
FLOOR = 0.35
STEPS = 6
SETTLED = 1e-9  # change of log λ below which nothing moves any more, since convergence is quadratic
_x, _w = np.polynomial.legendre.leggauss(NODES)
POINTS, WEIGHTS, LEFT = (_x + 1) / 2, _w / 2, integration_matrix(_x)
RIGHT = WEIGHTS - LEFT


class Mesh(NamedTuple):
    """Panels, the starting panel, and on both: mass and dissipation without f and C, scaled by ``exp(low)`` and ``exp(−top)``.

    ``joined`` tells whether the panels begin at the starting panel; otherwise they begin where the density is negligible and
    the first one is slaved, with ``bend`` the logarithmic slope of the mass and ``source`` κ/λ of the Riccati equation there.
    """

    edges: Array
    length: Array
    v: Array
    log_x: Array
    height: Array
    mass: Array
    stiff: Array
    start_v: Array
    start_log_x: Array
    start_height: Array
    start_mass: Array
    start_stiff: Array
    gain: Array
    joined: Array
    bend: Array
    source: Array
    log_scale: Vector
    at_end: Vector


class Step(NamedTuple):
    """A function f, its image G f, its flow C, each at the nodes and in the starting panel; log T/λ; and the next f."""

    log_time: Vector
    image: tuple[Array, Array]
    flow: tuple[Array, Array, Array]
    following: tuple[Array, Array]


def _flat(start: Array, nodes: Array) -> Array:
    """Values in the order of v."""
    return jnp.concatenate([start, jnp.moveaxis(nodes, 1, 0).reshape(-1, nodes.shape[-1])])


def _log(values: Array, least: float = -1e9) -> Array:
    return jnp.where(values > 1e-300, jnp.log(jnp.maximum(values, 1e-300)), least)


def _interpolate(at: Array, v: Array, values: Array) -> Array:
    return jax.vmap(jnp.interp, in_axes=1, out_axes=1)(at, v, values)


def _drops(v: Array, T: Vector, n: Vector, q: Vector) -> tuple[Array, Array]:
    """``log x`` and Φ."""
    log_x = jnp.log1p(jnp.exp(v))
    return log_x, potential(log_x, q) / T - n * v / 2


def _edges(v: Array, log_mass: Array, log_loss: Array, smooth: Array, first: Vector, end: Vector) -> Array:
    """Edges that share out the folds of both densities and of f, with a panel for the gap between the well and the top."""
    level = jnp.maximum(log_mass - log_mass.max(0), log_loss - log_loss.max(0))
    alive = level > -LEVEL
    weight = jnp.where(alive, jnp.maximum(jnp.exp(level / FOLDS), FLOOR), 0.0)
    rise = jnp.diff(level, axis=0)
    share = jnp.clip((level[1:] + LEVEL) / jnp.where(rise == 0, 1.0, rise), 0, 1)
    crossing = v[1:] - jnp.diff(v, axis=0) * share
    low = jnp.where(~alive[:-1] & alive[1:], crossing, v[:-1])
    low = low.at[1:].set(jnp.where(~alive[1:-1] & alive[:-2], crossing[:-1], low[1:]))
    v = jnp.maximum(jnp.concatenate([low, jnp.where(~alive[-1:] & alive[-2:-1], crossing[-1:], v[-1:])]), first)
    width = jnp.diff(v, axis=0)
    folds = jnp.where(width > 0, jnp.abs(rise) + 0.5 * jnp.abs(jnp.diff(smooth, axis=0)), 0.0) + width
    part = (weight[1:] + weight[:-1]) / 2 * folds
    total = jnp.cumsum(part, axis=0)
    gap = ~alive[1:] & ~alive[:-1] & (total > 0) & (total < total[-1])
    long = jnp.sum(gap * width, axis=0)
    split, beyond = long > 0, jnp.cumsum(gap, axis=0) > 0
    outer = jnp.sum(part * beyond, axis=0) * split
    inner = total[-1] - outer
    count = jnp.where(split, jnp.clip(jnp.round((PANELS - 1) * inner / total[-1]), 1, PANELS - 2), PANELS)
    rest = (PANELS - 1 - count) / jnp.where(split, outer, 1.0)
    part = jnp.where(
        gap,
        width / jnp.where(split, long, 1.0),
        part * jnp.where(beyond & split, rest, count / jnp.maximum(inner, 1e-300)),
    )
    stops = jnp.concatenate([jnp.zeros_like(v[:1]), jnp.cumsum(part, axis=0)])
    stops = stops / jnp.maximum(stops[-1], 1e-300)
    edges = _interpolate(
        jnp.broadcast_to(jnp.linspace(0.0, 1 - 1e-12, PANELS + 1)[:, None], (PANELS + 1, v.shape[1])), stops, v
    )
    return edges.at[-1].set(jnp.where(edges[-1] > end - 1e-9, end, edges[-1]))


def _mesh(edges: Array, first: Vector, T: Vector, n: Vector, q: Vector) -> Mesh:
    length = jnp.diff(edges, axis=0)
    v = edges[:-1] + length * POINTS[:, None, None]
    log_x, climb = _drops(v, T, n, q)
    joined = edges[0] <= first
    start_v = first + jnp.log(jnp.asarray(START.nodes))[:, None]
    start_log_x = jnp.log1p(jnp.exp(start_v))
    start_height = potential(start_log_x, q)
    start_log_mass = n / 2 * first - q * start_log_x - start_height / T
    low = jnp.maximum((-q * log_x - climb).max((0, 1)), jnp.where(joined, start_log_mass.max(0), -jnp.inf))
    end_climb = _drops(edges[-1], T, n, q)[1]
    top = jnp.maximum(climb.max((0, 1)), end_climb)
    start_mass = jnp.where(joined, jnp.exp(jnp.where(joined, start_log_mass - low, 0.0)), 0.0) / 2
    start_log_stiff = start_height / T + (1 - n / 2) * first - top
    pull = jnp.exp(v[:, 0] - q * log_x[:, 0]) / T
    return Mesh(
        edges, length, v, log_x, potential(log_x, q),
        0.5 * jnp.exp(-q * log_x - climb - low) * length, jnp.exp(v + climb - top) * length,
        start_v, start_log_x, start_height, start_mass,
        jnp.where(joined, jnp.exp(jnp.where(joined, start_log_stiff, 0.0)), 0.0),
        1 / (n / 2 + jnp.arange(START_NODES)[:, None]), joined,
        n / 2 - pull - q * -jnp.expm1(-log_x[:, 0]), pull / 2, top + low, jnp.exp(end_climb - top),
    )  # fmt: skip


def _slow(bend: Array, source: Array) -> Array:
    """The slow root of ``p² − bend p + source = 0``."""
    bend = jnp.maximum(bend, 0.0)
    return 2 * source / (bend + jnp.sqrt(jnp.maximum(bend * bend - 4 * source, 0.0)) + 1e-9)


def _from_left(mesh: Mesh, nodes: Array, start: Array) -> tuple[Array, Array, Array]:
    powers = mesh.gain * along(START.to_powers, start)
    whole = jnp.cumsum(jnp.concatenate([powers.sum(0)[None], along(WEIGHTS, nodes)]), axis=0)
    return whole[:-1] + along(LEFT, nodes), along(START.from_powers, powers), whole


def _from_right(nodes: Array, start: Array) -> tuple[Array, Array, Array]:
    later = jnp.cumsum(along(WEIGHTS, nodes)[::-1], axis=0)[::-1]
    later = jnp.concatenate([later, jnp.zeros_like(later[:1])])
    rest = along(START.weights, start) - along(START.integrate, start)
    return later[1:] + along(RIGHT, nodes), later[0] + rest, later


def _step(mesh: Mesh, f: tuple[Array, Array], rate: Vector) -> Step:
    nodes, start = f
    free = mesh.joined
    flow, start_flow, whole = _from_left(mesh, mesh.mass * nodes, mesh.start_mass * start)
    fall = _slow(mesh.bend - 1, rate * mesh.source)
    slaved = mesh.mass[:, 0] * nodes[:, 0] / mesh.length[0] / jnp.maximum(mesh.bend - fall, 1.0)
    flow = flow + jnp.where(free, 0.0, slaved[0] - flow[0, 0])
    flow = flow.at[:, 0].set(jnp.where(free, flow[:, 0], slaved))
    loss, start_loss = mesh.stiff * flow, mesh.start_stiff * start_flow
    image, start_image, later = _from_right(loss, start_loss)
    total = later[0] + along(START.weights, start_loss)
    image, start_image, later = image / total, start_image / total, later / total

    def product(a: Array, b: Array, start_a: Array, start_b: Array) -> Array:
        inside = jnp.sum(mesh.gain * along(START.to_powers, mesh.start_mass * start_a * start_b), axis=0)
        return jnp.sum(along(WEIGHTS, mesh.mass * a * b), axis=0) + inside

    once, twice = product(nodes, image, start, start_image), product(image, image, start_image, start_image)
    log_time = jnp.log(once / product(nodes, nodes, start, start)) + jnp.log(total) + mesh.log_scale
    quotient = once / twice
    gap = mesh.mass * image * (quotient * image - nodes)
    gap = gap.at[:, 0].set(jnp.where(free, gap[:, 0], 0.0))
    start_gap = mesh.start_mass * start_image * (quotient * start_image - start)
    excess, start_excess, _ = _from_left(mesh, gap, start_gap)
    # from the left up to the panel that holds the middle of the mass, from the right beyond
    kept = along(WEIGHTS, mesh.mass * nodes * image)
    left = once - jnp.cumsum(kept[::-1], axis=0)[::-1] < 0.5 * once
    excess = jnp.where(left, excess, -_from_right(gap, start_gap)[0])
    slope = mesh.stiff * excess / (image * image) / total
    slope = slope.at[:, 0].set(jnp.where(free, slope[:, 0], 0.0))
    h, start_h, h_edges = _from_right(slope, mesh.start_stiff * start_excess / (start_image * start_image) / total)
    most = jnp.maximum(h.max((0, 1)), jnp.where(free, start_h.max(0), -jnp.inf))
    following = image * jnp.exp(h - most)
    outermost = later[1] * jnp.exp(h_edges[1] - most) * jnp.exp(along(RIGHT, fall) * mesh.length[0])
    following = following.at[:, 0].set(jnp.where(free, following[:, 0], outermost))
    start_following = jnp.where(free, start_image * jnp.exp(jnp.where(free, start_h - most, 0.0)), 1.0)
    return Step(log_time, (image, start_image), (flow, start_flow, whole[-1]), (following, start_following))


def _guess(
    generator: Generator, T: Vector, n: Vector, q: Vector, end: Vector
) -> tuple[Array, Array, Array, Vector, Array]:
    """v at nodes, log f, the logarithm of its dissipation, log λ, and whether there is no well below the threshold."""
    grid, driven = generator.grid, drive(generator, constant(generator))
    total = driven.density.sum()
    log_mean = jnp.log(T) - jnp.log(total) - generator.log_scale
    image = to_threshold(driven.density)
    y = grid.start_length * START.nodes[:, None]
    v = _flat(jnp.log(y), grid.log_y)
    log_f = _log(_flat(image.start, image.nodes) / total, -690.0)
    density = _flat(
        driven.density.start * START.nodes[:, None] / START.weights[:, None],
        driven.density.nodes * jnp.exp(grid.log_y) / jnp.maximum(grid.volume, 1e-300),
    )
    log_loss = _log(density / total)
    points = jnp.concatenate([v, end[None]])
    log_x = jnp.log1p(jnp.exp(points))
    source = jnp.exp(points - q * log_x) / (2 * T)
    bend = jnp.maximum(n / 2 - 1 - 2 * source, 0.0)
    ratio = bend**2 / (4 * source)
    where = jnp.argmin(ratio, axis=0)[None]
    bend_there, x_there, v_there = (jnp.take_along_axis(a, where, axis=0)[0] for a in (bend, log_x, points))
    flat = bend_there > 1
    tilt = jnp.clip(1 + q * jnp.expm1(-x_there), 0, 1)
    rate = jnp.where(flat, ratio.min(0) * (1 + 1.856 * (tilt / jnp.maximum(bend_there, 1.0)) ** (2 / 3)) ** 2, 0.0)
    bend, kappa = bend[:-1], rate * source[:-1]
    root = jnp.sqrt(jnp.maximum(bend**2 - 4 * kappa, 0.0))
    fall = jnp.where((v > v_there) & flat, (bend + root) / 2, 2 * kappa / (bend + root + 1))
    known = jnp.exp(jnp.minimum(log_loss - log_f, 700.0))
    extra = jnp.maximum(fall - known, 0.0)
    lost = jnp.cumsum((extra[1:] + extra[:-1]) / 2 * jnp.diff(v, axis=0), axis=0)
    lost = jnp.concatenate([jnp.zeros_like(v[:1]), lost])
    log_loss = jnp.where(extra > 0, jnp.log(jnp.maximum(fall, 1e-300)) + log_f, log_loss) - lost
    log_rate = jnp.maximum(log_mean, jnp.log(jnp.maximum(rate, 1e-300)))
    return v, log_f - lost, log_loss, log_rate, flat


def leading_time(generator: Generator, T: Vector, excess: Vector, n: Vector, q: Vector) -> tuple[Vector, Slopes]:
    """``log(h*/λ₁)`` and its derivatives in T, c, n, q, those of the Rayleigh quotient with f held fixed."""
    end = jnp.log(excess)
    v, log_f, log_loss, log_rate, flat = _guess(generator, T, n, q, end)
    first = jnp.minimum(jnp.log(start_length(T, excess, n, q)), jnp.log(n * T) - log_rate)
    climb = _drops(v, T, n, q)[1]
    log_loss = jnp.where(log_loss > -1e8, 2 * log_loss - v - climb, -1e9)
    more = START_NODES + NODES * PANELS - v.shape[0]
    v, log_f, log_loss = (jnp.concatenate([jnp.repeat(a[:1], more, axis=0), a]) for a in (v, log_f, log_loss))
    smooth = log_f - _log(-jnp.expm1(jnp.minimum(v - end, -1e-15)))
    smooth = smooth.at[-1].set(smooth[-2])
    held = jnp.zeros(T.shape, bool)
    edges = jnp.zeros((PANELS + 1, T.shape[0]))

    def place(carry: tuple[Array, ...], old: Array, move: Array) -> tuple[Mesh, tuple[Array, Array]]:
        v, log_f, log_loss, smooth = carry
        log_x, climb = _drops(v, T, n, q)
        points, log_mass = jnp.concatenate([v, end[None]]), -q * log_x - climb + 2 * log_f
        log_mass = jnp.concatenate([log_mass, jnp.full_like(v[:1], -1e9)])
        log_loss, level = (jnp.concatenate([a, a[-1:]]) for a in (log_loss, smooth))
        new = _edges(points, log_mass, log_loss, level, first, end)
        mesh = _mesh(jnp.where(move, new, old), first, T, n, q)
        at = _flat(mesh.start_v, mesh.v)
        level = _interpolate(at, v, smooth) + jnp.log(-jnp.expm1(jnp.minimum(at - end, -1e-15)))
        level = jnp.exp(level - level.max(0))
        nodes = jnp.moveaxis(level[START_NODES:].reshape(PANELS, NODES, -1), 1, 0)
        return mesh, (nodes, jnp.where(mesh.joined, level[:START_NODES], 1.0))

    def unfinished(state: tuple[Array, ...]) -> Array:
        return (state[0] == 0) | ((state[0] == 1) & jnp.any(flat & ~state[7]))

    def round_(state: Any) -> Any:
        i, v, log_f, log_loss, smooth, edges, log_rate, held, *_ = state
        mesh, f = place((v, log_f, log_loss, smooth), edges, (i == 0) | (flat & ~held))

        def unsettled(inner: tuple[Array, ...]) -> Array:
            return (inner[0] < STEPS) & jnp.any((inner[-1] > SETTLED) & ~inner[-2])

        def improve(inner: Any) -> Any:
            k, nodes, start, last_nodes, last_start, log_rate, held, change = inner
            step = _step(mesh, (nodes, start), jnp.exp(log_rate))
            new = jnp.log(T) - step.log_time
            # where rounding in the slaved tail grows from step to step, the last good function is held
            bad = ~(
                jnp.abs(new - log_rate)
                <= jnp.where(k < 2, jnp.where(k == 0, jnp.inf, 0.3), jnp.maximum(0.5 * change, 1e-8))
            )
            held = held | bad
            return (
                k + 1,
                jnp.where(bad, last_nodes, jnp.where(held, nodes, step.following[0])),
                jnp.where(bad, last_start, jnp.where(held, start, step.following[1])),
                nodes, start, jnp.where(bad, log_rate, new), held, jnp.abs(new - log_rate),
            )  # fmt: skip

        _, nodes, start, *_, log_rate, held, _ = jax.lax.while_loop(
            unsettled, improve, (jnp.zeros((), int), *f, *f, log_rate, held, jnp.full_like(log_rate, jnp.inf))
        )
        step = _step(mesh, (nodes, start), jnp.exp(log_rate))
        early = jnp.maximum(
            first, mesh.edges[0] + mesh.length[0] * (jnp.arange(START_NODES)[:, None] / START_NODES - 1)
        )
        fall = _slow(mesh.bend[0] - 1, jnp.exp(log_rate) * mesh.source[0])
        log_nodes = _log(nodes, -690.0)
        v = _flat(jnp.where(mesh.joined, mesh.start_v, early), mesh.v)
        log_f = _flat(
            jnp.where(mesh.joined, _log(start, -690.0), log_nodes[0, 0] + fall * (mesh.v[0, 0] - early)), log_nodes
        )
        log_loss = _flat(jnp.full_like(early, -1e9), _log(mesh.stiff / mesh.length * step.flow[0]) + _log(step.flow[0]))
        smooth = log_f - _log(-jnp.expm1(jnp.minimum(v - end, -1e-15)))
        return i + 1, v, log_f, log_loss, smooth, mesh.edges, log_rate, held, nodes, start

    blank = jnp.zeros((NODES, PANELS, T.shape[0])), jnp.zeros((START_NODES, T.shape[0]))
    state = (jnp.zeros((), int), v, log_f, log_loss, smooth, edges, log_rate, held, *blank)
    *_, edges, log_rate, _, nodes, start = jax.lax.while_loop(unfinished, round_, state)
    mesh, f = _mesh(edges, first, T, n, q), (nodes, start)
    step = _step(mesh, f, jnp.exp(log_rate))
    return step.log_time - jnp.log(T), _slopes(mesh, f, step, T, n, q, end)


def _slopes(mesh: Mesh, f: tuple[Array, Array], step: Step, T: Vector, n: Vector, q: Vector, end: Vector) -> Slopes:
    """Each derivative is a difference of two means, over the dissipation and over the mass."""
    powers = jnp.arange(START_NODES)[:, None]
    outer = WEIGHTS[:, None, None] * mesh.stiff * step.flow[0] ** 2
    inner = WEIGHTS[:, None, None] * mesh.mass * f[0] * step.image[0]
    gain_outer, gain_inner = 1 / (n / 2 + 1 + powers), 1 / (n / 2 + powers)
    raw_outer, raw_inner = mesh.start_stiff * step.flow[1] ** 2, mesh.start_mass * f[1] * step.image[1]
    start_outer = along(START.to_powers.T, gain_outer) * raw_outer
    start_inner = along(START.to_powers.T, gain_inner) * raw_inner
    total_outer = jnp.sum(outer, (0, 1)) + jnp.sum(start_outer, 0)
    total_inner = jnp.sum(inner, (0, 1)) + jnp.sum(start_inner, 0)

    def means(values: Array, start_values: Array) -> tuple[Array, Array]:
        lost = jnp.sum(outer * values, (0, 1)) + jnp.sum(start_outer * start_values, 0)
        kept = jnp.sum(inner * values, (0, 1)) + jnp.sum(start_inner * start_values, 0)
        return lost / total_outer, kept / total_inner

    climbed, stored = means(mesh.height, mesh.start_height)
    twisted, twisted_stored = means(
        potential_slope(mesh.log_x, mesh.height, q), potential_slope(mesh.start_log_x, mesh.start_height, q)
    )
    thinning = means(mesh.log_x, mesh.start_log_x)[1]
    # in the starting panel the mean of log y is taken power by power
    join = mesh.start_v[-1] - np.log(START.nodes[-1])
    far, near = means(mesh.v - join, jnp.zeros_like(mesh.start_v))
    far = far - jnp.sum(along(START.to_powers, raw_outer) * gain_outer**2, 0) / total_outer
    near = near - jnp.sum(along(START.to_powers, raw_inner) * gain_inner**2, 0) / total_inner
    at_threshold = jnp.where(mesh.edges[-1] >= end, mesh.at_end * step.flow[2] ** 2 / total_outer, 0.0)
    return (
        -1 / T - (climbed - stored) / T**2,
        at_threshold,
        -(far - near) / 2,
        (twisted - twisted_stored) / T - thinning,
    )
