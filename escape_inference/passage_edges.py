"""Where the panels of the passage integrals go: fine where the integrand turns, coarse where nothing is lost.

In ``v = log(c − 1)`` the passage integrals are governed by one function, ``Φ(v) = ΔU_q/T − n v/2``: its minimum is the well in
which most of the time is spent, its maximum is the top that has to be climbed (the threshold, or an inner barrier when the
noise grows faster than the loss). Panels cover the well and the top down to a relative weight of about e⁻¹⁸, skip the climb
between them in one step when it is long, and follow the slaved regions on either side with panels as long as the curvature
of Φ allows. Only accuracy depends on these choices, never consistency, so that short Newton iterations are enough.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from escape_inference.passage_potential import potential

Vector = Float[Array, " condition"]

WELL_LEVEL = 18.0
TOP_LEVEL = 16.5
FOLDS_PER_PANEL = 10.0
BEND_PER_PANEL = 14.0
LONGEST_PANEL = 2.5
SKIPPED = 3


class Shape(NamedTuple):
    """The function Φ at some v: its value, slope, and ``|Φ''|``."""

    height: Array
    slope: Array
    curvature: Array


def _crossing(shape: Callable[[Array], Shape], start: Array, low: Array, high: Array, target: Array) -> Array:
    """Where Φ, below ``target`` at ``low`` and above it at ``high``, crosses it: Newton kept inside the bracket."""
    v = start
    for _ in range(3):
        here = shape(v)
        gap = here.height - target
        low, high = jnp.where(gap < 0, v, low), jnp.where(gap < 0, high, v)
        new = v - gap / jnp.where(jnp.abs(here.slope) < 1e-9, 1e-9, here.slope)
        inside = (new >= jnp.minimum(low, high)) & (new <= jnp.maximum(low, high))
        v = jnp.where(inside, new, (low + high) / 2)
    return v


def start_length(temperature: Vector, excess: Vector, dimension: Vector, noise_exponent: Vector) -> Vector:
    """Length in ``c − 1`` of the starting panel, which holds the singular end of the integrals."""
    folds = 5.5 / (1 + dimension / 400)
    share = jnp.minimum(0.3, 10 / dimension)
    return jnp.minimum(share * excess, jnp.minimum(folds * temperature, 0.5 / (1 + 0.35 * jnp.abs(noise_exponent))))


def _stationary_points(balance: Vector, noise_exponent: Vector, end: Vector) -> tuple[Vector, Vector, Array]:
    """The well and the top, roots of ``v − q log(1 + eᵛ) = log(nT/2)``: one root for q ≤ 1, none or two for q > 1.

    Newton's method converges monotonically from outside, because the left-hand side is concave for q > 0 and convex for q < 0.
    Without a well both are the point where Φ is flattest. The third value tells whether there is a well.
    """
    q = noise_exponent
    crest = jnp.where(q > 1, jnp.minimum(-jnp.log(jnp.maximum(q - 1, 1e-12)), 60.0), 60.0)
    near, far = jnp.minimum(crest, end), jnp.maximum(crest, end)

    def step(v: Array, least: float, most: float) -> Array:
        grown = jnp.exp(v)
        tilt = jnp.clip(1 - q * grown / (1 + grown), least, most)
        return v - (v - q * jnp.log(1 + grown) - balance) / tilt

    has_well = crest - q * jnp.log(1 + jnp.exp(crest)) > balance
    well = jnp.minimum(balance, near)
    for _ in range(5):
        well = jnp.clip(step(well, 0.02, jnp.inf), -60.0, near)
    top = jnp.minimum(jnp.where(q > 1, -balance / jnp.maximum(q - 1, 1e-12), 60.0), far)
    for _ in range(4):
        top = jnp.clip(step(top, -jnp.inf, -0.02), crest, far)
    well = jnp.where(has_well, well, near)
    return well, jnp.maximum(jnp.where(has_well, jnp.minimum(top, end), near), well), has_well


def panel_edges(
    temperature: Vector, excess: Vector, dimension: Vector, noise_exponent: Vector, panels: int
) -> Float[Array, "edge condition"]:
    """Edges of the panels in ``v``, from the end of the starting panel (or a later point that is early enough) to the threshold.

    Args:
        temperature: T, positive.
        excess: c − 1, positive.
        dimension: n, positive.
        noise_exponent: q.
        panels: number of panels.

    Returns:
        ``panels + 1`` edges for each condition, not decreasing.
    """
    T, n, q = temperature, dimension, noise_exponent
    end = jnp.log(excess)
    first = jnp.log(start_length(T, excess, n, q))

    def shape(v: Array) -> Shape:
        y = jnp.exp(v)
        height = potential(jnp.log(1 + y), q)
        pull = y * (1 + (1 - q) * height) / ((1 + y) * T)
        return Shape(height / T - n / 2 * v, pull - n / 2, pull * (jnp.abs(1 - q * y / (1 + y)) + 0.05))

    well, top, has_well = _stationary_points(jnp.log(n * T / 2), q, end)

    # how far the well and the top reach
    bottom, peak = shape(well).height, shape(top)
    eta = 2 * WELL_LEVEL / n
    reach = jnp.log(1 + jnp.sqrt(2 * eta) + eta)
    foot = _crossing(shape, jnp.minimum(well + reach, top), well, top, bottom + WELL_LEVEL)
    steep = jnp.abs(peak.slope)
    depth = TOP_LEVEL + jnp.log1p(steep)
    reach = 2 * depth / (steep + jnp.sqrt(steep**2 + 2 * peak.curvature * depth) + 1e-300)
    shoulder = _crossing(shape, jnp.maximum(top - reach, well), well, top, peak.height - depth)
    beyond = _crossing(shape, jnp.minimum(top + reach, end), end, top, peak.height - depth)
    beyond = jnp.where(has_well, beyond, top)
    split = (shoulder > foot) & (peak.height - bottom > WELL_LEVEL + depth) & (foot > first)
    start = jnp.where(split, jnp.maximum(first, well - jnp.sqrt(2 * eta) - eta / 3), first)
    foot = jnp.where(split, foot, (well + top) / 2)
    shoulder = jnp.where(split, shoulder, foot)
    approach = 0.7 * well + 0.3 * jnp.minimum(start, well)
    tail = 0.6 * beyond + 0.4 * end
    marks = jnp.clip(jnp.stack([start, approach, well, foot, shoulder, top, beyond, tail, end]), start, end)

    # how many panels each stretch needs, rounded so that edges fall on the marks
    length = jnp.diff(marks, axis=0)
    at_marks, between = shape(marks), shape((marks[1:] + marks[:-1]) / 2)
    bend = jnp.sqrt(at_marks.curvature / BEND_PER_PANEL)
    bends = length * (bend[1:] + 4 * jnp.sqrt(between.curvature / BEND_PER_PANEL) + bend[:-1]) / 6
    folds = jnp.abs(jnp.diff(at_marks.height, axis=0)) / FOLDS_PER_PANEL
    climb = jnp.hypot(folds[2:6], 1.5 * bends[2:6])
    cost = length / LONGEST_PANEL + jnp.concatenate([bends[:2], climb, bends[6:]])
    cost = jnp.where((jnp.arange(len(cost))[:, None] == SKIPPED) & split, 0.0, cost)
    total = jnp.concatenate([jnp.zeros_like(end)[None], jnp.cumsum(cost, axis=0)])
    stops = jnp.round(total * ((panels - split) / jnp.maximum(total[-1], 1e-300)))
    stops = stops + jnp.where((jnp.arange(len(stops))[:, None] > SKIPPED) & split, 1.0, 0.0)
    width = jnp.maximum(jnp.diff(stops, axis=0), 0.5)
    share = jnp.clip((jnp.arange(1.0, panels)[:, None, None] - stops[:-1]) / width, 0, 1)
    # equal steps in the radius up to the top, in its logarithm beyond
    radius = jnp.exp(marks[:6] / 2)
    inner = radius[0] + jnp.sum(share[:, :5] * jnp.diff(radius, axis=0), axis=1)
    edges = jnp.clip(2 * jnp.log(inner) + jnp.sum(share[:, 5:] * length[5:], axis=1), start, end)
    return jnp.concatenate([start[None], edges, end[None]])
