"""The path of lowest loss between two points, by the string method."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from escape_inference.trainers.curvature import Problem
from escape_inference.trainers.sgd import Recipe


def straight_path(start: Float[Array, " p"], end: Float[Array, " p"], images: int) -> Float[Array, "m p"]:
    """Points at equal distances on the straight line, the two ends included.

    >>> straight_path(jnp.zeros(2), jnp.array([2.0, 4.0]), 3).tolist()
    [[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]]
    """
    share = jnp.linspace(0.0, 1.0, images, dtype=start.dtype)[:, None]
    return (1 - share) * start + share * end


def spread_evenly(path: Float[Array, "m p"]) -> Float[Array, "m p"]:
    """Points at equal distances along the polygon through the given ones; the ends stay.

    >>> spread_evenly(jnp.array([[0.0, 0.0], [3.0, 0.0], [4.0, 0.0]])).tolist()
    [[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]]
    """
    lengths = jnp.linalg.norm(jnp.diff(path, axis=0), axis=1)
    place = jnp.concatenate([jnp.zeros(1, path.dtype), jnp.cumsum(lengths)])
    wanted = jnp.linspace(0.0, 1.0, len(path), dtype=path.dtype) * place[-1]
    piece = jnp.clip(jnp.searchsorted(place, wanted, side="right") - 1, 0, len(path) - 2)
    share = ((wanted - place[piece]) / jnp.maximum(lengths[piece], 1e-30))[:, None]
    moved = (1 - share) * path[piece] + share * path[piece + 1]
    return moved.at[0].set(path[0]).at[-1].set(path[-1])


def relax_path(
    problem: Problem, path: Float[Array, "m p"], *, iterations: int, learning_rate: float
) -> tuple[Float[Array, "m p"], Float[Array, " m"]]:
    """Let every point between the ends descend, and spread them evenly again, many times.

    The simplified string method (E, Ren and Vanden-Eijnden, J. Chem. Phys. 126, 164103, 2007): descent takes every point
    to the lowest path, and spreading evenly undoes what slides along it. Points lower than the start rest: they are past
    the barrier, and the second end need not be a minimum but may lie on a slope that falls without end.

    Args:
        problem: the loss.
        path: points over the flattened parameters, the two ends included, which stay.
        iterations: descents.
        learning_rate: of each, below 2 over the largest curvature.

    Returns:
        The path, and the full-batch loss at each of its points.
    """
    relax = _compiled_string(problem.recipe)
    return relax(
        problem.params, path, jnp.int32(iterations), jnp.float32(learning_rate), problem.inputs, problem.targets
    )


@lru_cache(maxsize=32)
def _compiled_string(recipe: Recipe) -> Callable:
    def relax(
        params: PyTree, path: Array, iterations: Array, learning_rate: Array, inputs: Array, targets: Array
    ) -> tuple[Array, Array]:
        unravel = ravel_pytree(params)[1]

        def level(point: Array) -> Array:
            return recipe.mean_loss(unravel(point), inputs, targets)

        def descend(_: Array, path: Array) -> Array:
            heights, slopes = jax.lax.map(jax.value_and_grad(level), path[1:-1])
            slopes = jnp.where((heights > floor)[:, None], slopes, 0.0)
            return spread_evenly(path.at[1:-1].add(-learning_rate * slopes))

        floor = level(path[0])
        path = jax.lax.fori_loop(0, iterations, descend, path)
        return path, jax.lax.map(level, path)

    return jax.jit(relax)
