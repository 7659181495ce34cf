"""Which minimum a point belongs to: where gradient descent leads from it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from escape_inference.trainers.curvature import Problem
from escape_inference.trainers.sgd import Recipe

GROWTH, SHRINKAGE = 1.1, 0.5
"""Of the learning rate after an iteration that lowered the loss, and after one that did not (which is taken back)."""
TOLERANCE = 1e-6
"""A relative rise of the loss below this is rounding."""


class Descent(NamedTuple):
    """Where descents ended: the points, their losses and gradient norms."""

    points: Float[Array, "m p"]
    losses: Float[Array, " m"]
    slopes: Float[Array, " m"]


class Goals(NamedTuple):
    """A descent ends within one of these balls, or where the gradient norm is below ``slope``."""

    centres: Float[Array, "k p"]
    radii: Float[Array, " k"]
    slope: Float[Array, ""]


def descend_one(
    level: Callable[[Array], Array], point: Float[Array, " p"], rate: Array, steps: Array, goals: Goals
) -> tuple[Float[Array, " p"], Float[Array, ""], Float[Array, ""]]:
    """Gradient descent of one point, for use inside compiled code: ``-> (point, loss, gradient norm)``.

    The learning rate grows while the loss falls; an iteration that would raise the loss is taken back and its rate halved, so
    that no curvature on the way is too large.
    """
    slope_at = jax.value_and_grad(level)

    def going(carry: tuple) -> Array:
        point, loss, slope, _, done = carry
        arrived = jnp.any(jnp.linalg.norm(goals.centres - point, axis=1) < goals.radii)
        return (done < steps) & (jnp.linalg.norm(slope) > goals.slope) & jnp.isfinite(loss) & ~arrived

    def body(carry: tuple) -> tuple:
        point, loss, slope, rate, done = carry
        trial = point - rate * slope
        new_loss, new_slope = slope_at(trial)
        lower = new_loss <= loss * (1 + TOLERANCE)
        point, loss, slope = (
            jnp.where(lower, new, old) for new, old in ((trial, point), (new_loss, loss), (new_slope, slope))
        )
        return point, loss, slope, rate * jnp.where(lower, GROWTH, SHRINKAGE), done + 1

    carry = jax.lax.while_loop(going, body, (point, *slope_at(point), rate, jnp.int32(0)))
    return carry[0], carry[1], jnp.linalg.norm(carry[2])


def descend(
    problem: Problem, points: Float[Array, "m p"], *, learning_rate: float, steps: int, gradient_norm: float
) -> Descent:
    """Gradient descent of several points of the full-batch loss.

    Args:
        problem: the loss.
        points: over the flattened parameters.
        learning_rate: of the first iteration; it adapts.
        steps: most iterations of each.
        gradient_norm: a point whose gradient norm is below this has arrived.

    Examples:
        >>> from escape_inference.trainers.curvature import make_problem
        >>> problem = make_problem(lambda theta, x: theta * x, jnp.zeros(1), jnp.ones((2, 1)), jnp.zeros((2, 1)))
        >>> done = descend(problem, jnp.array([[1.0], [-2.0]]), learning_rate=0.1, steps=200, gradient_norm=1e-3)
        >>> bool(jnp.all(jnp.abs(done.points) < 1e-3))
        True
    """
    numbers = jnp.float32(learning_rate), jnp.int32(steps), jnp.float32(gradient_norm)
    return _compiled_descents(problem.recipe)(problem.params, points, *numbers, problem.inputs, problem.targets)


@lru_cache(maxsize=32)
def _compiled_descents(recipe: Recipe) -> Callable:
    def descents(
        params: PyTree, points: Array, rate: Array, steps: Array, slope: Array, inputs: Array, targets: Array
    ) -> Descent:
        unravel = ravel_pytree(params)[1]
        goals = Goals(points[:1], jnp.zeros(1, points.dtype), slope)

        def one(point: Array) -> tuple[Array, Array, Array]:
            return descend_one(lambda at: recipe.mean_loss(unravel(at), inputs, targets), point, rate, steps, goals)

        return Descent(*jax.lax.map(one, points))

    return jax.jit(descents)


def rise_between(
    problem: Problem, start: Float[Array, " p"], ends: Float[Array, "m p"], *, pieces: int = 24
) -> Float[Array, " m"]:
    """How far the loss on the straight line from ``start`` to each end rises above the higher of the two ends.

    Without a rise, both belong to one well.
    """
    return _compiled_rises(problem.recipe, pieces)(problem.params, start, ends, problem.inputs, problem.targets)


@lru_cache(maxsize=32)
def _compiled_rises(recipe: Recipe, pieces: int) -> Callable:
    def rises(params: PyTree, start: Array, ends: Array, inputs: Array, targets: Array) -> Array:
        unravel = ravel_pytree(params)[1]

        def one(end: Array) -> Array:
            share = jnp.linspace(0.0, 1.0, pieces + 1, dtype=start.dtype)[:, None]
            line = (1 - share) * start + share * end
            levels = jax.lax.map(lambda at: recipe.mean_loss(unravel(at), inputs, targets), line)
            return jnp.max(levels) - jnp.maximum(levels[0], levels[-1])

        return jax.lax.map(one, ends)

    return jax.jit(rises)
