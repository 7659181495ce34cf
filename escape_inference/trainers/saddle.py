"""The saddle between two minima: how high it is, and how sharply it falls off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree
from matfree import decomp

from escape_inference.errors import InputError
from escape_inference.trainers.curvature import Problem, make_problem
from escape_inference.trainers.density import compiled_rule
from escape_inference.trainers.hessian import eigenpairs
from escape_inference.trainers.losses import Apply, SampleLoss
from escape_inference.trainers.lowest_path import relax_path, straight_path
from escape_inference.trainers.minimum import Minimum, Progress, parameters_of
from escape_inference.trainers.sgd import Recipe

LANCZOS = 40
"""Most Lanczos iterations for the lowest eigenvalues."""
LOWEST = 5
"""Eigenvalues at the lower end that are looked at."""
NEGLIGIBLE = 1e-3
"""A negative eigenvalue counts if it is below minus this fraction of the largest one."""
LARGEST_STEP = 0.1
"""Of the search for the saddle, over the distance of two neighbours on the path."""
MIXED = 1e-3
"""Share of random directions in a starting vector that may be an eigenvector."""
FLATTEST = 1e-4
"""Smallest curvature that Newton's step of the search uses, over the largest one."""
PUSHES = 5
"""How often the search goes on, pushed along the second direction, from a stationary point with two that lead down."""
SAFE = 0.5
"""Learning rate of descents, over one divided by the largest curvature."""


@dataclass(frozen=True)
class Saddle:
    """The highest point of the lowest path that was found.

    Attributes:
        params: the parameters there, a pytree.
        loss_barrier: full-batch loss there, L^s.
        loss_barrier_se: how far the true stationary value may be, ``g^T |H|^-1 g / 2`` from the gradient left.
        hessian_saddle: absolute value of the negative eigenvalue, h^s, 1/time (NaN if there is none).
        hessian_saddle_se: its residual.
        gradient_norm: Euclidean norm of the full-batch gradient there.
        negative: number of negative eigenvalues among the lowest ones; 1 at a saddle that a path crosses.
        lowest: the lowest eigenvalues, 1/time.
        mode: the direction of the lowest one, of unit length, over the flattened parameters.
        path_losses: full-batch loss along the relaxed path, from the first minimum to the second.
        converged: a small gradient and exactly one negative eigenvalue.
        note: what is not as it should be, in a sentence; empty if converged.
    """

    params: PyTree
    loss_barrier: float
    loss_barrier_se: float
    hessian_saddle: float
    hessian_saddle_se: float
    gradient_norm: float
    negative: int
    lowest: Float[np.ndarray, " k"]
    mode: Float[np.ndarray, " p"]
    path_losses: Float[np.ndarray, " m"]
    converged: bool
    note: str

    @property
    def columns(self) -> dict[str, Any]:
        """What the measured table holds of it."""
        names = ("loss_barrier", "loss_barrier_se", "hessian_saddle", "hessian_saddle_se")
        return {"barrier": "saddle"} | {name: getattr(self, name) for name in names}


def find_saddle(
    apply: Apply,
    start: Minimum | PyTree,
    end: Minimum | PyTree,
    inputs: Array | np.ndarray,
    targets: Array | np.ndarray,
    *,
    images: int = 15,
    path_iterations: int = 300,
    refine_iterations: int = 100,
    gradient_norm: float = 1e-4,
    learning_rate: float | None = None,
    loss: str | SampleLoss = "mean_square",
    seed: int = 0,
    progress: Progress | None = None,
) -> Saddle:
    """Find the saddle on the path of lowest loss from one minimum to another.

    A path is relaxed by the string method; from its highest point the search climbs along the lowest eigenvector of the
    Hessian and descends in every other direction by Newton's step (min-mode following; Henkelman and Jonsson, J. Chem.
    Phys. 111, 7010, 1999), until the gradient is small; from a stationary point with a second direction that leads down, as
    a symmetric path may have, it goes on along that. Between minima of wide networks
    the barrier may vanish as the path relaxes (Draxler et al., ICML 2018): then there is no saddle, and ``note`` says so.

    Args:
        apply: ``(params, inputs) -> predictions``, any JAX function.
        start: the minimum that is left, a ``Minimum`` or a pytree of parameters.
        end: the minimum reached, or a point beyond the saddle that is lower than the start.
        inputs: samples first.
        targets: samples first.
        images: points of the path, both ends included.
        path_iterations: descents of the path.
        refine_iterations: most steps of the search for the saddle.
        gradient_norm: it ends below this gradient norm.
        learning_rate: of descents; None: half of one over the largest curvature at both ends and between them.
        loss: as in ``train_minimum``.
        seed: of the Lanczos starting vectors.
        progress: called as ``progress(iterations done, iterations to do, message)``.

    Raises:
        InputError: an argument that cannot be used, or a loss that is not finite on the way.

    Examples:
        The double well ``(x^2 - 1)^2`` has a saddle of height 1 and curvature -4 between its minima:

        >>> saddle = find_saddle(
        ...     lambda theta, x: theta * x, jnp.full(1, -1.0), jnp.full(1, 1.0), jnp.ones((2, 1)), jnp.zeros((2, 1)),
        ...     loss=lambda prediction, target: (prediction[0] ** 2 - 1) ** 2 + 0 * target[0], images=6)
        >>> round(saddle.loss_barrier, 4), round(saddle.hessian_saddle, 3), saddle.negative, saddle.converged
        (1.0, 4.0, 1, True)
    """
    if int(images) != images or images < 3:
        raise InputError(f"images: must be an integer of at least 3, got {images}.")
    problem = make_problem(apply, start, inputs, targets, loss=loss, seed=seed)
    origin, unravel = ravel_pytree(problem.params)
    goal = ravel_pytree(parameters_of(end))[0]
    if goal.shape != origin.shape or not bool(jnp.any(goal != origin)):
        raise InputError("end: must be another point with parameters of the same shapes.")
    path = straight_path(origin, goal, images)
    curvature = max(_top(problem, unravel(point)) for point in (origin, path[images // 2], goal))
    rate = SAFE / curvature if learning_rate is None else learning_rate
    if progress:
        progress(0, refine_iterations, "relaxing the path")
    path, levels = relax_path(problem, path, iterations=path_iterations, learning_rate=rate)
    heights = np.asarray(levels, float)
    if not np.all(np.isfinite(heights)):
        raise InputError("the loss is not finite along the path. Lower the learning rate.")
    highest = int(np.argmax(heights))
    if highest in (0, images - 1):
        note = "the loss has no maximum between the ends of the path: no barrier was found."
        return _describe(problem, unravel(path[highest]), heights, gradient_norm, curvature, note)
    point = path[highest]
    longest = LARGEST_STEP * float(jnp.linalg.norm(path[1] - path[0]))
    tangent = path[highest + 1] - path[highest - 1]
    search = _compiled_search(problem.recipe, min(LANCZOS, problem.dimension))
    pushes = 0
    for step in range(refine_iterations):
        numbers = jnp.float32(rate), jnp.float32(longest)
        new, tangent, slope = search(problem.params, point, tangent, *numbers, problem.inputs, problem.targets)
        if progress:
            progress(step + 1, refine_iterations, f"saddle, gradient norm {float(slope):.2g}")
        if not float(slope) > gradient_norm:
            values, _, vectors = _lowest(replace(problem, params=unravel(point)))
            if pushes == PUSHES or (values < -NEGLIGIBLE * curvature).sum() < 2:
                break
            pushes += 1
            new = point + longest * jnp.asarray(vectors[1])
        point = new
    return _describe(problem, unravel(point), heights, gradient_norm, curvature, "")


def _lowest(there: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The lowest eigenvalues, their residuals and eigenvectors."""
    return eigenpairs(there, "hessian", min(LOWEST, there.dimension), min(LANCZOS, there.dimension), lowest=True)


def _top(problem: Problem, params: PyTree) -> float:
    """The largest absolute eigenvalue, roughly."""
    there = replace(problem, params=params)
    iterations = min(12, problem.dimension)
    return float(max(abs(eigenpairs(there, "hessian", 1, iterations, lowest=low)[0][0]) for low in (False, True)))


@lru_cache(maxsize=32)
def _compiled_search(recipe: Recipe, iterations: int) -> Callable:
    """One step of min-mode following: ``-> (point, lowest eigenvector, gradient norm before the step)``.

    The Krylov space holds the gradient, so that Newton's step is taken in it: up along the lowest direction, down along
    every other, whatever the sign of its curvature.
    """

    def search(
        params: PyTree, point: Array, mode: Array, rate: Array, longest: Array, inputs: Array, targets: Array
    ) -> tuple[Array, Array, Array]:
        unravel = ravel_pytree(params)[1]
        slope, tangent = jax.linearize(jax.grad(lambda at: recipe.mean_loss(unravel(at), inputs, targets)), point)
        norm = jnp.linalg.norm(slope)
        start = _mixed(mode / jnp.linalg.norm(mode) + slope / jnp.maximum(norm, 1e-30))
        basis, matrix, *_ = decomp.tridiag_sym(iterations, reortho="full", custom_vjp=False)(tangent, start)
        values, vectors = jnp.linalg.eigh(matrix)
        along = vectors.T @ (basis @ slope)
        size = jnp.maximum(jnp.abs(values), FLATTEST * jnp.max(jnp.abs(values)))
        newton = jnp.where(jnp.arange(iterations) == 0, along, -along) / size
        step = basis.T @ (vectors @ newton) - rate * (slope - basis.T @ (basis @ slope))
        step = step * jnp.minimum(1.0, longest / jnp.maximum(jnp.linalg.norm(step), 1e-30))
        return point + step, basis.T @ vectors[:, 0], norm

    return jax.jit(search)


def _mixed(vector: Array) -> Array:
    """The vector with a little of every direction, since Lanczos cannot go on from an exact eigenvector."""
    noise = jax.random.normal(jax.random.key(0, impl="threefry2x32"), vector.shape, vector.dtype)
    return vector + MIXED * jnp.linalg.norm(vector) / vector.size**0.5 * noise


def _describe(
    problem: Problem, params: PyTree, heights: np.ndarray, wanted: float, curvature: float, note: str
) -> Saddle:
    """What is at the point that the search ended at."""
    there = replace(problem, params=params)
    level, gradient = jax.jit(jax.value_and_grad(problem.recipe.mean_loss))(params, problem.inputs, problem.targets)
    slope = ravel_pytree(gradient)[0]
    norm = float(jnp.linalg.norm(slope))
    iterations = min(LANCZOS, problem.dimension)
    values, residuals, vectors = _lowest(there)
    negative = int((values < -NEGLIGIBLE * curvature).sum())
    error = 0.0
    if norm > 0:
        rule = compiled_rule(problem.recipe, "hessian", iterations)
        nodes, weights = rule(params, problem.mask, _mixed(slope), problem.inputs, problem.targets)
        error = float(0.5 * norm**2 * jnp.sum(weights / jnp.maximum(jnp.abs(nodes), 1e-12)))
    if not note and not norm <= wanted:
        note = f"the gradient norm is {norm:.2g}, above {wanted:.2g}: more refine_iterations may help."
    if not note and negative != 1:
        note = f"there are {negative} negative eigenvalues: no simple saddle."
    return Saddle(
        params=params,
        loss_barrier=float(level),
        loss_barrier_se=error,
        hessian_saddle=float(-values[0]) if negative else float("nan"),
        hessian_saddle_se=float(residuals[0]) if negative else float("nan"),
        gradient_norm=norm,
        negative=negative,
        lowest=values,
        mode=vectors[0],
        path_losses=heights,
        converged=not note,
        note=note,
    )
